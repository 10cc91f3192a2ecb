// Python bindings of the mask-update kernels, over lists of tensors.
//
// Every argument has a name and is given by it, tensors are checked by `arguments.h`, and the
// interpreter's lock is released while the loops run.

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

#include "arguments.h"
#include "instruction_sets.h"
#include "keys.h"
#include "loops.h"
#include "parallel.h"
#include "selection.h"
#include "tensors.h"
#include "units.h"

namespace spartan {
namespace {

using namespace nb::literals;
using Bracket = std::tuple<float, float>;
using DualTuple = std::tuple<float, float, float>;
using Duals = std::vector<DualTuple>;
using MassTuple = std::tuple<double, double, double>;
using Floats = List<float>;

Dual dual_of(const DualTuple& dual) {
  return {std::get<0>(dual), std::get<1>(dual), std::get<2>(dual)};
}

MassTuple tuple_of(const Mass& mass) { return {mass.mass, mass.slope, mass.curve}; }

template <class T>
void require_one_each(const std::vector<T>& numbers, const char* name, const Floats& tensors) {
  require(numbers.size() == tensors.sizes.size(), name, "must have one entry for each tensor");
}

const Loops& loops() { return *current_set().loops; }

std::vector<bool> finite(const Floats& tensors, Threads threads) {
  const auto chunks = chunks_of(tensors.checked("tensors").sizes);
  std::vector<char> ok(chunks.size());
  parallel(chunks.size(), threads, [&](int, std::int64_t c) {
    ok[c] = loops().finite(at<const float>(tensors.addresses, chunks[c]), chunks[c].size);
  });
  std::vector<bool> result(tensors.sizes.size(), true);
  for (std::size_t c = 0; c < chunks.size(); ++c)
    if (!ok[c]) result[chunks[c].tensor] = false;
  return result;
}

std::tuple<bool, float, Sizes, Sizes, MassTuple> scan(const Floats& tensors,
                                                      const std::vector<float>& scales,
                                                      const std::vector<double>& costs,
                                                      bool absolute, double budget, Bracket bracket,
                                                      const std::optional<DualTuple>& dual,
                                                      bool dropped, bool counted, Threads threads) {
  require(!tensors.checked("tensors").sizes.empty(), "tensors", "must not be empty");
  require_one_each(scales, "scales", tensors);
  require_one_each(costs, "costs", tensors);
  const Dual wanted = dual ? dual_of(*dual) : Dual{};
  const ScanRequest request{tensors.addresses,
                            tensors.sizes,
                            scales,
                            costs,
                            absolute,
                            budget,
                            std::get<0>(bracket),
                            std::get<1>(bracket),
                            dual ? &wanted : nullptr,
                            dropped,
                            counted,
                            threads};
  Cutoff cutoff = find_cutoff(loops(), request);
  return {cutoff.finite, cutoff.threshold, std::move(cutoff.tie_ends), std::move(cutoff.above),
          tuple_of(cutoff.mass)};
}

MassTuple mass(const Floats& tensors, const std::vector<float>& scales,
               const std::vector<double>& costs, bool absolute, DualTuple dual, bool dropped,
               Threads threads) {
  const auto chunks = chunks_of(tensors.checked("tensors").sizes);
  require_one_each(scales, "scales", tensors);
  require_one_each(costs, "costs", tensors);
  std::vector<Mass> parts(chunks.size());
  parallel(chunks.size(), threads, [&](int, std::int64_t c) {
    parts[c] = loops().mass(at<const float>(tensors.addresses, chunks[c]), chunks[c].size,
                            {scales[chunks[c].tensor], absolute}, dual_of(dual), dropped);
  });
  return tuple_of(total(parts, chunks, costs));
}

void project(const Floats& thetas, const Floats& latents, const Floats& weights,
             const List<bool>& masks, const std::vector<float>& scales,
             const std::optional<std::vector<float>>& thresholds,
             const std::optional<Sizes>& tie_ends, const std::optional<Duals>& duals,
             Threads threads) {
  thetas.checked("thetas");
  const bool copies = !latents.addresses.empty(), given = !thresholds;
  if (copies) require_alike(latents, "latents", thetas);
  require_alike(weights, "weights", thetas);
  require_alike(masks, "masks", thetas);
  require_one_each(scales, "scales", thetas);
  require(given == !tie_ends, "tie_ends", "goes with thresholds");
  if (!given) {
    require_one_each(*thresholds, "thresholds", thetas);
    require_one_each(*tie_ends, "tie_ends", thetas);
  }
  if (duals) require_one_each(*duals, "duals", thetas);
  const auto chunks = chunks_of(thetas.sizes);
  parallel(chunks.size(), threads, [&](int, std::int64_t c) {
    const std::size_t t = chunks[c].tensor;
    const Dual dual = duals ? dual_of((*duals)[t]) : Dual{};
    const auto run = [&](std::int64_t begin, std::int64_t end, bool ties) {
      if (begin >= end) return;
      const Chunk part = {t, begin, end - begin};
      bool* mask = at<bool>(masks.addresses, part);
      // Entries equal to the threshold are kept before the end of the ties only.
      const std::int32_t smallest = given ? 0 : key_of((*thresholds)[t]) + (ties ? 0 : 1);
      const KeepRule rule = {smallest, given ? mask : nullptr};
      float* latent = copies ? at<float>(latents.addresses, part) : nullptr;
      loops().project(at<const float>(thetas.addresses, part), latent,
                      at<float>(weights.addresses, part), mask, part.size, {scales[t], true}, rule,
                      duals ? &dual : nullptr);
    };
    const std::int64_t begin = chunks[c].begin, end = begin + chunks[c].size;
    const std::int64_t ties = given ? end : std::clamp((*tie_ends)[t], begin, end);
    run(begin, ties, true);
    run(ties, end, false);
  });
}

void require_for_gradients(const Floats& grads, const Floats& thetas,
                           const std::vector<float>& scales, const std::vector<double>& costs,
                           const Duals& duals) {
  grads.checked("grads");
  require_alike(thetas, "thetas", grads);
  require_one_each(scales, "scales", grads);
  require_one_each(costs, "costs", grads);
  require_one_each(duals, "duals", grads);
}

std::tuple<double, double> earn(const Floats& grads, const Floats& thetas,
                                const std::vector<float>& scales, const std::vector<double>& costs,
                                const Duals& duals, Threads threads) {
  require_for_gradients(grads, thetas, scales, costs, duals);
  const auto chunks = chunks_of(grads.sizes);
  std::vector<Earned> parts(chunks.size());
  parallel(chunks.size(), threads, [&](int, std::int64_t c) {
    const std::size_t t = chunks[c].tensor;
    parts[c] = loops().earn(at<const float>(grads.addresses, chunks[c]),
                            at<const float>(thetas.addresses, chunks[c]), chunks[c].size,
                            {scales[t], true}, dual_of(duals[t]));
  });
  double earned = 0, spread = 0;
  for (std::size_t c = 0; c < chunks.size(); ++c) {
    earned += parts[c].earned;
    spread += costs[chunks[c].tensor] * parts[c].spread;
  }
  return {earned, spread};
}

void pull_back(const Floats& grads, const Floats& thetas, const std::vector<float>& scales,
               const std::vector<double>& costs, const Duals& duals, double price,
               Threads threads) {
  require_for_gradients(grads, thetas, scales, costs, duals);
  const auto chunks = chunks_of(grads.sizes);
  parallel(chunks.size(), threads, [&](int, std::int64_t c) {
    const std::size_t t = chunks[c].tensor;
    const Dual dual = dual_of(duals[t]);
    const float cost = static_cast<float>(costs[t]);
    loops().pull_back(at<float>(grads.addresses, chunks[c]),
                      at<const float>(thetas.addresses, chunks[c]), chunks[c].size,
                      {scales[t], true}, dual, dual.beta * scales[t] * cost, cost,
                      static_cast<float>(price));
  });
}

void damp(const Floats& grads, const Floats& thetas, const std::vector<float>& scales,
          const Duals& duals, const std::vector<float>& per_mask, Threads threads) {
  grads.checked("grads");
  require_alike(thetas, "thetas", grads);
  require_one_each(scales, "scales", grads);
  require_one_each(duals, "duals", grads);
  require_one_each(per_mask, "per_mask", grads);
  const auto chunks = chunks_of(grads.sizes);
  parallel(chunks.size(), threads, [&](int, std::int64_t c) {
    const std::size_t t = chunks[c].tensor;
    loops().damp(at<float>(grads.addresses, chunks[c]),
                 at<const float>(thetas.addresses, chunks[c]), chunks[c].size, {scales[t], true},
                 dual_of(duals[t]), per_mask[t]);
  });
}

void mask(const Floats& tensors, const List<bool>& masks, Threads threads) {
  tensors.checked("tensors");
  require_alike(masks, "masks", tensors);
  const auto chunks = chunks_of(tensors.sizes);
  parallel(chunks.size(), threads, [&](int, std::int64_t c) {
    loops().zero_outside(at<float>(tensors.addresses, chunks[c]),
                         at<const bool>(masks.addresses, chunks[c]), chunks[c].size);
  });
}

std::int64_t weights_of(const Grid& grid) { return grid.shape[0] * grid.shape[1] * grid.shape[2]; }

std::int64_t units_of(const Grid& grid) {
  std::int64_t count = 1;
  for (int d = 0; d < 3; ++d) count *= grid.shape[d] / grid.block[d];
  return count;
}

// Shape, block and strides, one after the other.
Grid grid_of(const Sizes& numbers) {
  require(numbers.size() == 9, "grid", "must have nine numbers");
  Grid grid;
  std::copy_n(numbers.begin(), 3, grid.shape);
  std::copy_n(numbers.begin() + 3, 3, grid.block);
  std::copy_n(numbers.begin() + 6, 3, grid.strides);
  std::int64_t last = 0;
  for (int d = 0; d < 3; ++d) {
    const bool divides = grid.block[d] > 0 && grid.shape[d] % grid.block[d] == 0;
    require(divides && grid.strides[d] >= 0, "grid", "must divide the weight");
    last += (grid.shape[d] / grid.block[d] - 1) * grid.strides[d];
  }
  require(last < units_of(grid) || !weights_of(grid), "grid", "must lead to its units");
  return grid;
}

void pool_units(const Sizes& grid, const Flat<float>& x, const std::optional<Flat<float>>& y,
                const Flat<float>& units, Threads threads) {
  const Grid g = grid_of(grid);
  x.checked("x", weights_of(g));
  if (y) y->checked("y", weights_of(g));
  units.checked("units", units_of(g));
  pool(loops(), g, x.data, y ? y->data : nullptr, units.data, threads);
}

void scale_by_units(const Sizes& grid, const Flat<float>& theta, const Flat<float>& factors,
                    const std::optional<Flat<float>>& latent, const Flat<float>& weight,
                    Threads threads) {
  const Grid g = grid_of(grid);
  theta.checked("theta", weights_of(g));
  factors.checked("factors", units_of(g));
  if (latent) latent->checked("latent", weights_of(g));
  weight.checked("weight", weights_of(g));
  scale(loops(), g, theta.data, factors.data, latent ? latent->data : nullptr, weight.data,
        threads);
}

void pull_back_by_units(const Sizes& grid, const Flat<float>& grad, const Flat<float>& theta,
                        const Flat<float>& m, const Flat<float>& terms, Threads threads) {
  const Grid g = grid_of(grid);
  grad.checked("grad", weights_of(g));
  theta.checked("theta", weights_of(g));
  m.checked("m", units_of(g));
  terms.checked("terms", units_of(g));
  pull_back_units(loops(), g, grad.data, theta.data, m.data, terms.data, threads);
}

}  // namespace

NB_MODULE(_native, m) {
  nb::class_<Kernels> kernels(m, "Kernels");
  bind_layers(kernels);
  bind_connections(kernels);
  bind_mixing(kernels);
  bind_buffers(kernels);
  kernels.def_static("instruction_sets", &instruction_sets);
  kernels.def_static("use_instruction_set", &use_instruction_set, "name"_a);
  kernels.def_static(
      "use_runner", [](std::uintptr_t address) { runner() = reinterpret_cast<Runner>(address); },
      "address"_a);
  const nb::kw_only named;
  kernels.def_static("finite", &finite, Release(), named, "tensors"_a, "threads"_a);
  kernels.def_static("scan", &scan, Release(), named, "tensors"_a, "scales"_a, "costs"_a,
                     "absolute"_a, "budget"_a, "bracket"_a, "dual"_a.none(), "dropped"_a,
                     "counted"_a, "threads"_a);
  kernels.def_static("mass", &mass, Release(), named, "tensors"_a, "scales"_a, "costs"_a,
                     "absolute"_a, "dual"_a, "dropped"_a, "threads"_a);
  kernels.def_static("project", &project, Release(), named, "thetas"_a, "latents"_a, "weights"_a,
                     "masks"_a, "scales"_a, "thresholds"_a.none(), "tie_ends"_a.none(),
                     "duals"_a.none(), "threads"_a);
  kernels.def_static("earn", &earn, Release(), named, "grads"_a, "thetas"_a, "scales"_a, "costs"_a,
                     "duals"_a, "threads"_a);
  kernels.def_static("pull_back", &pull_back, Release(), named, "grads"_a, "thetas"_a, "scales"_a,
                     "costs"_a, "duals"_a, "price"_a, "threads"_a);
  kernels.def_static("damp", &damp, Release(), named, "grads"_a, "thetas"_a, "scales"_a, "duals"_a,
                     "per_mask"_a, "threads"_a);
  kernels.def_static("mask", &mask, Release(), named, "tensors"_a, "masks"_a, "threads"_a);
  kernels.def_static("pool_units", &pool_units, Release(), named, "grid"_a, "x"_a, "y"_a.none(),
                     "units"_a, "threads"_a);
  kernels.def_static("scale_by_units", &scale_by_units, Release(), named, "grid"_a, "theta"_a,
                     "factors"_a, "latent"_a.none(), "weight"_a, "threads"_a);
  kernels.def_static("pull_back_by_units", &pull_back_by_units, Release(), named, "grid"_a,
                     "grad"_a, "theta"_a, "m"_a, "terms"_a, "threads"_a);
}

}  // namespace spartan
