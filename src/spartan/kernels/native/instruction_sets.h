// Which instruction sets this machine has (baseline, AVX2, AVX-512), and which one runs.

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

// What Python calls: a class with nothing but static methods, so that its type can be named there.
struct Kernels {};

void bind_layers(nanobind::class_<Kernels>&);
void bind_connections(nanobind::class_<Kernels>&);
void bind_mixing(nanobind::class_<Kernels>&);
void bind_buffers(nanobind::class_<Kernels>&);

}  // namespace spartan
