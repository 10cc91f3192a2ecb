// Finds the top-k threshold: among entries near the last one first, then by histograms.

#include "selection.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <memory>
#include <numeric>

#include "keys.h"
#include "parallel.h"

namespace spartan {
namespace {

// Kept costs are compared with this slack, relative to the budget, so that 3 x 0.1 still fits 0.3.
constexpr double kSlack = 1e-12;
// Two wide digits are fewest passes; many bins are much work for few entries.
constexpr Digit kWide[] = {{16, 16}, {0, 16}};
constexpr Digit kNarrow[] = {{21, 11}, {10, 11}, {0, 10}};
constexpr std::int64_t kMany = 1 << 20;
constexpr std::size_t kFewCosts = 8;

// Numbers of entries for each distinct cost. Integers, so that sums have no order; costs are
// multiplied in at the end.
using Counts = std::vector<std::int64_t>;

struct Boundary {
  std::int32_t key;
  double left;  // budget left for the entries with this key
  double ties;  // what all of them cost
  std::int64_t number;
};

class Search {
 public:
  Search(const Loops& loops, const ScanRequest& request)
      : loops_(loops),
        request_(request),
        slack_(kSlack * request.budget),
        costs_(request.costs),
        chunks_(chunks_of(request.sizes)),
        finite_(chunks_.size()),
        masses_(chunks_.size()) {
    std::sort(costs_.begin(), costs_.end());
    costs_.erase(std::unique(costs_.begin(), costs_.end()), costs_.end());
    for (double cost : request.costs)
      kind_.push_back(std::lower_bound(costs_.begin(), costs_.end(), cost) - costs_.begin());
  }

  // Looks among the entries whose score lies in the bracket. False if the boundary is not there.
  bool from_bracket(Boundary& boundary) {
    const std::int32_t low = key_of(request_.low), high = key_of(request_.high);
    std::vector<std::int64_t> offsets(chunks_.size() + 1, 0);
    for (std::size_t c = 0; c < chunks_.size(); ++c)
      offsets[c + 1] = offsets[c] + std::max(chunks_[c].size / 64, kSmall);
    std::unique_ptr<std::int32_t[]> found(new std::int32_t[offsets.back()]);
    std::vector<Near> near(chunks_.size());
    parallel(chunks_.size(), request_.threads, [&](int, std::int64_t c) {
      visit(c);
      near[c] = loops_.near(data(c), chunks_[c].size, scores(c), low, high,
                            found.get() + offsets[c], offsets[c + 1] - offsets[c]);
    });
    visited_ = true;

    Counts above(costs_.size(), 0);
    std::vector<Candidate> candidates;
    for (std::size_t c = 0; c < chunks_.size(); ++c) {
      if (near[c].found < 0) return false;
      above[kind(c)] += near[c].above;
      for (std::int64_t i = 0; i < near[c].found; ++i)
        candidates.push_back({found[offsets[c] + i], static_cast<std::int32_t>(kind(c))});
    }
    if (reaches(above) || !among(candidates, above, boundary)) return false;
    near_ = std::move(near), found_ = std::move(found), offsets_ = std::move(offsets);
    return true;
  }

  // Digit by digit, from the top: a histogram of those that share the digits found so far.
  Boundary from_histograms() {
    std::int64_t entries = 0;
    for (std::int64_t size : request_.sizes) entries += size;
    return entries < kMany || costs_.size() > kFewCosts
               ? by_digits(std::begin(kNarrow), std::end(kNarrow))
               : by_digits(std::begin(kWide), std::end(kWide));
  }

  // Distributes what is left over the entries at the boundary, by position.
  std::vector<std::int64_t> tie_ends(const Boundary& boundary) const {
    if (boundary.ties <= boundary.left + slack_) return request_.sizes;
    std::vector<std::int64_t> tie_ends(request_.sizes.size(), 0);
    if (boundary.number == 1) return tie_ends;
    std::vector<std::int64_t> counts(chunks_.size());
    parallel(chunks_.size(), request_.threads, [&](int, std::int64_t c) {
      counts[c] = loops_.count(data(c), chunks_[c].size, scores(c), boundary.key);
    });
    Counts taken(costs_.size(), 0);
    for (std::size_t c = 0; c < chunks_.size(); ++c) {
      const Chunk& chunk = chunks_[c];
      const double left = boundary.left - cost_of(taken) + slack_;
      const double fitting = std::max(std::floor(left / request_.costs[chunk.tensor]), 0.0);
      if (fitting < static_cast<double>(counts[c])) {
        tie_ends[chunk.tensor] = chunk.begin + position(c, boundary.key, fitting);
        return tie_ends;
      }
      taken[kind(c)] += counts[c];
      tie_ends[chunk.tensor] = chunk.begin + chunk.size;
    }
    return tie_ends;
  }

  // How many entries of each tensor lie above the boundary.
  std::vector<std::int64_t> above(const Boundary& boundary) {
    if (near_.empty()) count_above(boundary.key);
    std::vector<std::int64_t> above(request_.sizes.size(), 0);
    for (std::size_t c = 0; c < chunks_.size(); ++c) {
      above[chunks_[c].tensor] += near_[c].above;
      for (std::int64_t i = 0; i < near_[c].found; ++i)
        above[chunks_[c].tensor] += found_[offsets_[c] + i] > boundary.key;
    }
    return above;
  }

  bool finite() const {
    return std::all_of(finite_.begin(), finite_.end(), [](char ok) { return ok; });
  }

  Mass mass() const { return total(masses_, chunks_, request_.costs); }

 private:
  struct Candidate {
    std::int32_t key, kind;
  };
  static constexpr std::int64_t kSmall = 256;

  const float* data(std::int64_t c) const { return at<const float>(request_.tensors, chunks_[c]); }
  Scores scores(std::int64_t c) const {
    return {request_.scales[chunks_[c].tensor], request_.absolute};
  }
  std::size_t kind(std::int64_t c) const { return kind_[chunks_[c].tensor]; }

  double cost_of(const Counts& counts) const {
    double cost = 0;
    for (std::size_t k = 0; k < costs_.size(); ++k) cost += costs_[k] * counts[k];
    return cost;
  }
  // One more pass, where the boundary was not found among the entries near the last one.
  void count_above(std::int32_t key) {
    near_.resize(chunks_.size());
    parallel(chunks_.size(), request_.threads, [&](int, std::int64_t c) {
      near_[c] = loops_.near(data(c), chunks_[c].size, scores(c), key + 1, key + 1, nullptr, 0);
    });
  }

  bool reaches(const Counts& counts) const { return cost_of(counts) >= request_.budget - slack_; }

  Boundary boundary_at(std::int32_t key, const Counts& above, const Counts& ties) const {
    const std::int64_t number = std::accumulate(ties.begin(), ties.end(), std::int64_t{0});
    return {key, request_.budget - cost_of(above), cost_of(ties), number};
  }

  // What is wanted of each chunk besides the boundary, while it is in the cache.
  void visit(std::int64_t c) {
    finite_[c] = loops_.finite(data(c), chunks_[c].size);
    if (request_.dual)
      masses_[c] =
          loops_.mass(data(c), chunks_[c].size, scores(c), *request_.dual, request_.dropped);
  }

  // Quickselect by cost: splits at the median until one key is left.
  bool among(std::vector<Candidate>& candidates, Counts above, Boundary& boundary) const {
    const auto with = [&](Counts counts, auto begin, auto end) {
      for (; begin != end; ++begin) ++counts[begin->kind];
      return counts;
    };
    auto begin = candidates.begin(), end = candidates.end();
    if (!reaches(with(above, begin, end))) return false;
    while (begin != end) {
      const auto middle = begin + (end - begin) / 2;
      std::nth_element(begin, middle, end,
                       [](const auto& a, const auto& b) { return a.key > b.key; });
      const std::int32_t key = middle->key;
      const auto ties = std::partition(begin, end, [&](const auto& c) { return c.key > key; });
      const auto rest = std::partition(ties, end, [&](const auto& c) { return c.key == key; });
      const Counts larger = with(above, begin, ties), reached = with(larger, ties, rest);
      if (reaches(larger)) {
        end = ties;
      } else if (reaches(reached)) {
        boundary = boundary_at(key, larger, with(Counts(costs_.size(), 0), ties, rest));
        return true;
      } else {
        above = reached;
        begin = rest;
      }
    }
    return false;
  }

  // Where, in a chunk, the entries with a key stop to fit.
  std::int64_t position(std::int64_t c, std::int32_t key, double fitting) const {
    for (std::int64_t i = 0; i < chunks_[c].size; ++i)
      if (loops_.count(data(c) + i, 1, scores(c), key) && fitting-- < 1) return i;
    return chunks_[c].size;
  }

  Boundary by_digits(const Digit* digit, const Digit* end) {
    std::uint32_t prefix = 0;
    Counts above(costs_.size(), 0), ties;
    for (; digit != end; ++digit) {
      const std::vector<Counts> bins = histogram(*digit, prefix);
      const std::size_t bin = bin_of_budget(bins, above);
      prefix = prefix << digit->bits | static_cast<std::uint32_t>(bin);
      ties = at_bin(bins, bin);
      visited_ = true;
    }
    return boundary_at(static_cast<std::int32_t>(prefix ^ 0x80000000u), above, ties);
  }

  // For each distinct cost, the number of entries in each bin.
  std::vector<Counts> histogram(Digit digit, std::uint32_t prefix) {
    const std::size_t size = std::size_t{1} << digit.bits;
    std::vector<Counts> total(costs_.size(), Counts(size, 0));
    for (std::size_t k = 0; k < costs_.size(); ++k) {
      std::vector<std::int64_t> members;
      for (std::size_t c = 0; c < chunks_.size(); ++c)
        if (kind(c) == k) members.push_back(c);
      const int workers =
          static_cast<int>(std::min<std::int64_t>(request_.threads, members.size()));
      std::vector<std::uint32_t> bins(size * std::max(workers, 1), 0);
      parallel(members.size(), workers, [&](int worker, std::int64_t i) {
        const std::int64_t c = members[i];
        if (!visited_) visit(c);
        loops_.histogram(data(c), chunks_[c].size, scores(c), digit, prefix,
                         bins.data() + size * worker);
      });
      for (std::size_t i = 0; i < bins.size(); ++i) total[k][i % size] += bins[i];
    }
    return total;
  }

  Counts at_bin(const std::vector<Counts>& bins, std::size_t bin) const {
    Counts counts;
    for (const Counts& of_cost : bins) counts.push_back(of_cost[bin]);
    return counts;
  }

  // The first bin, from the top, at which the budget is reached; adds what lies above it.
  std::size_t bin_of_budget(const std::vector<Counts>& bins, Counts& above) const {
    std::size_t bin = bins[0].size() - 1, lowest = 0;
    const auto empty = [&](std::size_t i) {
      return std::all_of(bins.begin(), bins.end(), [&](const Counts& c) { return c[i] == 0; });
    };
    while (empty(lowest)) ++lowest;
    for (; bin > lowest; --bin) {
      if (empty(bin)) continue;
      Counts reached = above;
      for (std::size_t k = 0; k < bins.size(); ++k) reached[k] += bins[k][bin];
      if (reaches(reached)) break;
      above = reached;
    }
    return bin;
  }

  const Loops& loops_;
  const ScanRequest& request_;
  const double slack_;
  std::vector<double> costs_;      // distinct
  std::vector<std::size_t> kind_;  // of each tensor: the place of its cost among them
  const std::vector<Chunk> chunks_;
  std::vector<char> finite_;
  std::vector<Mass> masses_;
  bool visited_ = false;
  // What was seen near the last boundary: the keys found in chunk c begin at offsets_[c].
  std::vector<Near> near_;
  std::unique_ptr<std::int32_t[]> found_;
  std::vector<std::int64_t> offsets_;
};

}  // namespace

Cutoff find_cutoff(const Loops& loops, const ScanRequest& request) {
  Search search(loops, request);
  Boundary boundary{};
  if (request.low >= request.high || !search.from_bracket(boundary))
    boundary = search.from_histograms();
  return {search.finite(), score_of(boundary.key), search.tie_ends(boundary),
          request.counted ? search.above(boundary) : std::vector<std::int64_t>(), search.mass()};
}

}  // namespace spartan
