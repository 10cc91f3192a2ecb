// The loops of each instruction set this machine has, and those that run.

#pragma once

#include <nanobind/nanobind.h>

#include <string>
#include <vector>

#include "connections.h"
#include "loops.h"
#include "mixing.h"
#include "products.h"

namespace spartan {

struct InstructionSet {
  const Loops* loops;
  const ProductLoops* products;
  const ConnectionLoops* connections;
  const MixingLoops* mixing;
};

const InstructionSet& current_set();
std::vector<std::string> instruction_sets();
void use_instruction_set(const std::string& name);

void bind_layers(nanobind::module_&);
void bind_connections(nanobind::module_&);
void bind_mixing(nanobind::module_&);
void bind_buffers(nanobind::module_&);

}  // namespace spartan
