// Detects the instruction sets of the processor, and switches between their loops.

#include "instruction_sets.h"

#include <stdexcept>

namespace spartan {
namespace {

std::vector<InstructionSet> supported() {
  std::vector<InstructionSet> sets = {
      {&baseline_loops(), &baseline_products(), &baseline_connections(), &baseline_mixing()}};
#if defined(SPARTAN_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    sets.push_back({&avx2_loops(), &avx2_products(), &avx2_connections(), &avx2_mixing()});
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      sets.push_back(
          {&avx512_loops(), &avx512_products(), &avx512_connections(), &avx512_mixing()});
  }
#endif
  return sets;
}

InstructionSet& current() {
  static InstructionSet set = supported().back();
  return set;
}

}  // namespace

const InstructionSet& current_set() { return current(); }

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet& set : supported()) names.emplace_back(set.loops->name);
  return names;
}

void use_instruction_set(const std::string& name) {
  for (const InstructionSet& set : supported())
    if (name == set.loops->name) {
      current() = set;
      return;
    }
  throw std::invalid_argument("this machine has no instruction set " + name);
}

}  // namespace spartan
