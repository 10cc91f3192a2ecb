// Binding of the loops that mix a memory's values.

#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "instruction_sets.h"
#include "mixing.h"
#include "parallel.h"

namespace nb = nanobind;

namespace spartan {
namespace {

constexpr std::int64_t kPositions = 64;  // that a thread takes at a time

void bound_mix(std::uintptr_t of_parents, std::uintptr_t of_children, std::int64_t positions,
               std::int64_t parents, std::int64_t children, std::int64_t chosen, float temperature,
               std::uintptr_t weights, int threads) {
  const Memory memory{parents, children, chosen, parents * children, temperature};
  const MixingLoops& loops = *current_set().mixing;
  const Logits from{reinterpret_cast<const float*>(of_parents),
                    reinterpret_cast<const float*>(of_children)};
  auto* to = reinterpret_cast<float*>(weights);
  parallel((positions + kPositions - 1) / kPositions, threads, [&](int, std::int64_t task) {
    const std::int64_t begin = task * kPositions;
    std::vector<std::uint32_t> keys(whole_vectors(parents));
    std::vector<std::int64_t> places(chosen);
    std::vector<float> terms(whole_vectors(chosen * (1 + children)));
    const Logits part{from.of_parents + begin * parents,
                      from.of_children + begin * memory.values};
    loops.mix(memory, part, std::min(kPositions, positions - begin), to + begin * memory.values,
              {keys.data(), places.data(), terms.data()});
  });
}

}  // namespace

void bind_mixing(nb::module_& m) {
  m.def("mix", &bound_mix, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace spartan
