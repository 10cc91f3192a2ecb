#include "selection.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <memory>

#include "parallel.h"

namespace spartan {
namespace {

// Kept costs are compared with this relative slack, so that a sum such as 3 x 0.1 still fits 0.3.
constexpr double kSlack = 1e-12;
// Two wide digits are fewest passes; many bins are much work for few entries.
constexpr Digit kWide[] = {{16, 16}, {0, 16}};
constexpr Digit kNarrow[] = {{21, 11}, {10, 11}, {0, 10}};
constexpr std::int64_t kMany = 1 << 20;

std::int32_t key_of(float score) {
  std::int32_t bits;
  score += 0.0f;
  std::memcpy(&bits, &score, sizeof bits);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

float score_of(std::int32_t key) {
  float score;
  key ^= (key >> 31) & 0x7fffffff;
  std::memcpy(&score, &key, sizeof score);
  return score;
}

struct Boundary {
  std::int32_t key;
  double left;  // budget left for the entries with this key
  double ties;  // what all of them cost
};

class Search {
 public:
  Search(const Loops& loops, const Request& request)
      : loops_(loops), request_(request), chunks_(chunks_of(request.sizes)),
        finite_(chunks_.size()), masses_(chunks_.size()) {}

  // Looks among the entries whose score lies in the bracket. False if the boundary is not there.
  bool from_bracket(Boundary& boundary) {
    const std::int32_t low = key_of(request_.low), high = key_of(request_.high);
    std::vector<std::int64_t> offsets(chunks_.size() + 1, 0);
    for (std::size_t c = 0; c < chunks_.size(); ++c)
      offsets[c + 1] = offsets[c] + std::max(chunks_[c].size / 64, kSmall);
    const std::unique_ptr<std::int32_t[]> found(new std::int32_t[offsets.back()]);
    std::vector<Near> near(chunks_.size());
    parallel(chunks_.size(), request_.threads, [&](int, std::int64_t c) {
      visit(c);
      near[c] = loops_.near(data(c), chunks_[c].size, scores(c), low, high,
                            found.get() + offsets[c], offsets[c + 1] - offsets[c]);
    });

    visited_ = true;

    std::vector<std::int64_t> above(request_.sizes.size(), 0);
    std::vector<Candidate> candidates;
    for (std::size_t c = 0; c < chunks_.size(); ++c) {
      if (near[c].found < 0) return false;
      above[chunks_[c].tensor] += near[c].above;
      for (std::int64_t i = 0; i < near[c].found; ++i)
        candidates.push_back({found[offsets[c] + i], static_cast<std::int32_t>(chunks_[c].tensor)});
    }
    double spent = 0;
    for (std::size_t t = 0; t < above.size(); ++t) spent += request_.costs[t] * above[t];
    return !reaches(spent) && among(candidates, spent, boundary);
  }

  // Digit by digit, from the top: a histogram of those that share the digits found so far.
  Boundary from_histograms() {
    std::int64_t entries = 0;
    for (std::int64_t size : request_.sizes) entries += size;
    return entries < kMany ? by_digits(std::begin(kNarrow), std::end(kNarrow))
                           : by_digits(std::begin(kWide), std::end(kWide));
  }

  // Distributes what is left over the entries at the boundary, by position.
  std::vector<std::int64_t> stops(Boundary boundary) const {
    if (boundary.ties <= boundary.left * (1 + kSlack)) return request_.sizes;
    std::vector<std::int64_t> counts(chunks_.size());
    parallel(chunks_.size(), request_.threads, [&](int, std::int64_t c) {
      counts[c] = loops_.count(data(c), chunks_[c].size, scores(c), boundary.key);
    });
    std::vector<std::int64_t> stops(request_.sizes.size(), 0);
    double left = boundary.left;
    for (std::size_t c = 0; c < chunks_.size(); ++c) {
      const Chunk& chunk = chunks_[c];
      const double cost = request_.costs[chunk.tensor];
      const double fitting = std::floor(left / cost * (1 + kSlack));
      if (fitting < static_cast<double>(counts[c])) {
        stops[chunk.tensor] = chunk.begin + position(c, boundary.key, fitting);
        return stops;
      }
      left -= cost * counts[c];
      stops[chunk.tensor] = chunk.begin + chunk.size;
    }
    return stops;
  }

  bool finite() const {
    return std::all_of(finite_.begin(), finite_.end(), [](char ok) { return ok; });
  }

  Mass mass() const { return total(masses_, chunks_, request_.costs); }

 private:
  struct Candidate {
    std::int32_t key, tensor;
  };
  static constexpr std::int64_t kSmall = 256;

  const float* data(std::int64_t c) const { return at<const float>(request_.tensors, chunks_[c]); }
  Scores scores(std::int64_t c) const {
    return {request_.scales[chunks_[c].tensor], request_.absolute};
  }
  bool reaches(double spent) const { return spent >= request_.budget * (1 - kSlack); }

  // What is wanted of each chunk besides the boundary, while it is in the cache.
  void visit(std::int64_t c) {
    finite_[c] = loops_.finite(data(c), chunks_[c].size);
    if (request_.dual)
      masses_[c] = loops_.mass(data(c), chunks_[c].size, scores(c), *request_.dual,
                               request_.dropped);
  }

  // Quickselect by cost: splits at the median until one key is left.
  bool among(std::vector<Candidate>& candidates, double spent, Boundary& boundary) const {
    const auto cost = [&](auto begin, auto end) {
      double total = 0;
      for (; begin != end; ++begin) total += request_.costs[begin->tensor];
      return total;
    };
    auto begin = candidates.begin(), end = candidates.end();
    if (!reaches(spent + cost(begin, end))) return false;
    while (begin != end) {
      const auto middle = begin + (end - begin) / 2;
      std::nth_element(begin, middle, end,
                       [](const auto& a, const auto& b) { return a.key > b.key; });
      const std::int32_t key = middle->key;
      const auto ties = std::partition(begin, end, [&](const auto& c) { return c.key > key; });
      const auto rest = std::partition(ties, end, [&](const auto& c) { return c.key == key; });
      const double larger = cost(begin, ties), equal = cost(ties, rest);
      if (reaches(spent + larger)) {
        end = ties;
      } else if (reaches(spent + larger + equal)) {
        boundary = {key, request_.budget - spent - larger, equal};
        return true;
      } else {
        spent += larger + equal;
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
    double spent = 0, ties = 0;
    for (; digit != end; ++digit) {
      const std::vector<double> bins = histogram(*digit, prefix);
      const std::size_t bin = walk(bins, spent);
      prefix = prefix << digit->bits | static_cast<std::uint32_t>(bin);
      ties = bins[bin];
      visited_ = true;
    }
    return {static_cast<std::int32_t>(prefix ^ 0x80000000u), request_.budget - spent, ties};
  }

  // Cost per bin. Counts are summed for each cost apart: integers, whatever the order.
  std::vector<double> histogram(Digit digit, std::uint32_t prefix) {
    std::vector<double> costs = request_.costs;
    std::sort(costs.begin(), costs.end());
    costs.erase(std::unique(costs.begin(), costs.end()), costs.end());
    const std::size_t size = std::size_t{1} << digit.bits;
    std::vector<double> total(size, 0.0);
    for (double cost : costs) {
      std::vector<std::int64_t> members;
      for (std::size_t c = 0; c < chunks_.size(); ++c)
        if (request_.costs[chunks_[c].tensor] == cost) members.push_back(c);
      const int workers =
          static_cast<int>(std::min<std::int64_t>(request_.threads, members.size()));
      std::vector<std::uint32_t> bins(size * std::max(workers, 1), 0);
      parallel(members.size(), workers, [&](int worker, std::int64_t i) {
        const std::int64_t c = members[i];
        if (!visited_) visit(c);
        loops_.histogram(data(c), chunks_[c].size, scores(c), digit, prefix,
                         bins.data() + size * worker);
      });
      for (std::size_t i = 0; i < bins.size(); ++i) total[i % size] += cost * bins[i];
    }
    return total;
  }

  // The first bin, from the top, at which the budget is reached; adds the cost above it to spent.
  std::size_t walk(const std::vector<double>& bins, double& spent) const {
    std::size_t bin = bins.size() - 1, lowest = 0;
    while (bins[lowest] == 0) ++lowest;
    for (; bin > lowest && !reaches(spent + bins[bin]); --bin) spent += bins[bin];
    return bin;
  }

  const Loops& loops_;
  const Request& request_;
  const std::vector<Chunk> chunks_;
  std::vector<char> finite_;
  std::vector<Mass> masses_;
  bool visited_ = false;
};

}  // namespace

Cut find_cut(const Loops& loops, const Request& request) {
  Search search(loops, request);
  Boundary boundary{};
  if (request.low >= request.high || !search.from_bracket(boundary))
    boundary = search.from_histograms();
  return {search.finite(), score_of(boundary.key), search.stops(boundary), search.mass()};
}

}  // namespace spartan
