// Python binding of mixing.h: attention weights of the SPARTAN memory.

#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "arguments.h"
#include "instruction_sets.h"
#include "mixing.h"
#include "parallel.h"

namespace spartan {
namespace {

using namespace nb::literals;

constexpr std::int64_t kPositions = 64;  // that a thread takes at a time

void bound_mix(const View<float>& of_parents, const View<float>& of_children,
               const View<float>& weights, std::int64_t chosen, float temperature,
               Threads threads) {
  of_parents.checked("of_parents", 2);
  of_children.checked("of_children", 2);
  const std::int64_t positions = of_parents.shape[0], parents = of_parents.shape[1];
  const std::int64_t values = of_children.shape[1];
  require(of_children.shape[0] == positions && parents > 0 && values % parents == 0, "of_children",
          "must be (positions, parents x children)");
  require(of_parents.lies_at({parents, 1}), "of_parents", "must be contiguous");
  require(of_children.lies_at({values, 1}), "of_children", "must be contiguous");
  weights.checked("weights", of_children.shape);
  require(weights.lies_at({values, 1}), "weights", "must lie as of_children");
  require(1 <= chosen && chosen <= parents, "chosen", "must be a number of parents");
  const Memory memory{parents, values / parents, chosen, values, temperature};
  const MixingLoops& loops = *current_set().mixing;
  parallel((positions + kPositions - 1) / kPositions, threads, [&](int, std::int64_t task) {
    const std::int64_t begin = task * kPositions;
    std::vector<std::uint32_t> keys(whole_vectors(parents));
    std::vector<std::int64_t> places(chosen);
    std::vector<float> terms(whole_vectors(chosen * (1 + memory.children)));
    const Logits part{of_parents.data + begin * parents, of_children.data + begin * values};
    loops.mix(memory, part, std::min(kPositions, positions - begin), weights.data + begin * values,
              {keys.data(), places.data(), terms.data()});
  });
}

}  // namespace

void bind_mixing(nb::class_<Kernels>& kernels) {
  kernels.def_static("mix", &bound_mix, Release(), nb::kw_only(), "of_parents"_a, "of_children"_a,
                     "weights"_a, "chosen"_a, "temperature"_a, "threads"_a);
}

}  // namespace spartan
