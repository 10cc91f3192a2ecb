// The Python module. Tensors come as addresses and sizes: no torch header is needed, so that one
// build serves every torch version. Callers vouch for dtype, device and contiguity.

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "instruction_sets.h"
#include "keys.h"
#include "loops.h"
#include "parallel.h"
#include "selection.h"
#include "tensors.h"
#include "units.h"

namespace nb = nanobind;

namespace spartan {
namespace {

using Sizes = std::vector<std::int64_t>;
using Bracket = std::tuple<float, float>;
using DualTuple = std::tuple<float, float, float>;
using MassTuple = std::tuple<double, double, double>;
using Release = nb::call_guard<nb::gil_scoped_release>;

Dual dual_of(const DualTuple& dual) {
  return {std::get<0>(dual), std::get<1>(dual), std::get<2>(dual)};
}

std::vector<bool> finite(const Pointers& tensors, const Sizes& sizes, int threads) {
  const auto chunks = chunks_of(sizes);
  std::vector<char> ok(chunks.size());
  parallel(chunks.size(), threads, [&](int, std::int64_t c) {
    ok[c] = current_set().loops->finite(at<const float>(tensors, chunks[c]), chunks[c].size);
  });
  std::vector<bool> result(sizes.size(), true);
  for (std::size_t c = 0; c < chunks.size(); ++c)
    if (!ok[c]) result[chunks[c].tensor] = false;
  return result;
}

MassTuple tuple_of(const Mass& mass) { return {mass.mass, mass.slope, mass.curve}; }

std::tuple<bool, float, Sizes, MassTuple> scan(
    const Pointers& tensors, const Sizes& sizes, const std::vector<float>& scales,
    const std::vector<double>& costs, bool absolute, double budget, Bracket bracket,
    const std::optional<DualTuple>& dual, bool dropped, int threads) {
  const Dual wanted = dual ? dual_of(*dual) : Dual{};
  const Request request{tensors,
                        sizes,
                        scales,
                        costs,
                        absolute,
                        budget,
                        std::get<0>(bracket),
                        std::get<1>(bracket),
                        dual ? &wanted : nullptr,
                        dropped,
                        threads};
  Cut cut = find_cut(*current_set().loops, request);
  return {cut.finite, cut.threshold, std::move(cut.stops), tuple_of(cut.mass)};
}

MassTuple mass(const Pointers& tensors, const Sizes& sizes, const std::vector<float>& scales,
               const std::vector<double>& costs, bool absolute, DualTuple dual, bool dropped,
               int threads) {
  const auto chunks = chunks_of(sizes);
  std::vector<Mass> parts(chunks.size());
  parallel(chunks.size(), threads, [&](int, std::int64_t c) {
    parts[c] = current_set().loops->mass(at<const float>(tensors, chunks[c]), chunks[c].size,
                               {scales[chunks[c].tensor], absolute}, dual_of(dual), dropped);
  });
  return tuple_of(total(parts, chunks, costs));
}

void project(const Pointers& thetas, const Pointers& latents, const Pointers& weights,
             const Pointers& masks, const Sizes& sizes, const std::vector<float>& scales,
             const std::vector<float>& thresholds, const Sizes& stops,
             const std::optional<std::vector<DualTuple>>& duals, int threads) {
  const bool given = thresholds.empty();
  const auto chunks = chunks_of(sizes);
  parallel(chunks.size(), threads, [&](int, std::int64_t c) {
    const std::size_t t = chunks[c].tensor;
    const Dual dual = duals ? dual_of((*duals)[t]) : Dual{};
    const auto run = [&](std::int64_t begin, std::int64_t end, bool ties) {
      if (begin >= end) return;
      const Chunk part = {t, begin, end - begin};
      bool* mask = at<bool>(masks, part);
      // Entries equal to the threshold are kept before the stop only.
      const std::int32_t smallest = given ? 0 : key_of(thresholds[t]) + (ties ? 0 : 1);
      const Gate gate = {smallest, given ? mask : nullptr};
      float* latent = latents.empty() ? nullptr : at<float>(latents, part);
      current_set().loops->project(at<const float>(thetas, part), latent, at<float>(weights, part), mask,
                         part.size, {scales[t], true}, gate, duals ? &dual : nullptr);
    };
    const std::int64_t begin = chunks[c].begin, end = begin + chunks[c].size;
    const std::int64_t stop = given ? end : std::clamp(stops[t], begin, end);
    run(begin, stop, true);
    run(stop, end, false);
  });
}

std::tuple<double, double> earn(const Pointers& grads, const Pointers& thetas, const Sizes& sizes,
                                const std::vector<float>& scales, const std::vector<double>& costs,
                                const std::vector<DualTuple>& duals, int threads) {
  const auto chunks = chunks_of(sizes);
  std::vector<Earned> parts(chunks.size());
  parallel(chunks.size(), threads, [&](int, std::int64_t c) {
    const std::size_t t = chunks[c].tensor;
    parts[c] = current_set().loops->earn(at<const float>(grads, chunks[c]),
                               at<const float>(thetas, chunks[c]), chunks[c].size,
                               {scales[t], true}, dual_of(duals[t]));
  });
  double earned = 0, spread = 0;
  for (std::size_t c = 0; c < chunks.size(); ++c) {
    earned += parts[c].earned;
    spread += costs[chunks[c].tensor] * parts[c].spread;
  }
  return {earned, spread};
}

void pull_back(const Pointers& grads, const Pointers& thetas, const Sizes& sizes,
               const std::vector<float>& scales, const std::vector<double>& costs,
               const std::vector<DualTuple>& duals, double price, int threads) {
  const auto chunks = chunks_of(sizes);
  parallel(chunks.size(), threads, [&](int, std::int64_t c) {
    const std::size_t t = chunks[c].tensor;
    const Dual dual = dual_of(duals[t]);
    const float cost = static_cast<float>(costs[t]);
    current_set().loops->pull_back(at<float>(grads, chunks[c]), at<const float>(thetas, chunks[c]),
                         chunks[c].size, {scales[t], true}, dual, dual.beta * scales[t] * cost,
                         cost, static_cast<float>(price));
  });
}

void mask(const Pointers& tensors, const Pointers& masks, const Sizes& sizes, int threads) {
  const auto chunks = chunks_of(sizes);
  parallel(chunks.size(), threads, [&](int, std::int64_t c) {
    current_set().loops->zero_outside(at<float>(tensors, chunks[c]), at<const bool>(masks, chunks[c]),
                   chunks[c].size);
  });
}

// Shape, block and strides, one after the other.
Grid grid_of(const std::vector<std::int64_t>& numbers) {
  if (numbers.size() != 9) throw std::invalid_argument("a grid has nine numbers");
  Grid grid;
  std::copy_n(numbers.begin(), 3, grid.shape);
  std::copy_n(numbers.begin() + 3, 3, grid.block);
  std::copy_n(numbers.begin() + 6, 3, grid.strides);
  return grid;
}

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void pool_units(const Sizes& grid, std::uintptr_t x, std::uintptr_t y, std::uintptr_t units,
                int threads) {
  pool(*current_set().loops, grid_of(grid), pointer<const float>(x), pointer<const float>(y),
       pointer<float>(units), threads);
}

void scale_by_units(const Sizes& grid, std::uintptr_t theta, std::uintptr_t factors,
                    std::uintptr_t latent, std::uintptr_t weight, int threads) {
  scale(*current_set().loops, grid_of(grid), pointer<const float>(theta), pointer<const float>(factors),
        pointer<float>(latent), pointer<float>(weight), threads);
}

void pull_back_by_units(const Sizes& grid, std::uintptr_t grad, std::uintptr_t theta,
                        std::uintptr_t m, std::uintptr_t terms, int threads) {
  pull_back_units(*current_set().loops, grid_of(grid), pointer<float>(grad), pointer<const float>(theta),
                  pointer<const float>(m), pointer<const float>(terms), threads);
}

}  // namespace

NB_MODULE(_native, m) {
  bind_layers(m);
  bind_connections(m);
  bind_mixing(m);
  bind_buffers(m);
  m.def("instruction_sets", &instruction_sets);
  m.def("use_instruction_set", &use_instruction_set);
  m.def("use_runner", [](std::uintptr_t address) { runner() = reinterpret_cast<Runner>(address); });
  m.def("finite", &finite, Release());
  m.def("scan", &scan, Release());
  m.def("mass", &mass, Release());
  m.def("project", &project, Release());
  m.def("earn", &earn, Release());
  m.def("pull_back", &pull_back, Release());
  m.def("mask", &mask, Release());
  m.def("pool_units", &pool_units, Release());
  m.def("scale_by_units", &scale_by_units, Release());
  m.def("pull_back_by_units", &pull_back_by_units, Release());
}

}  // namespace spartan
