// Kernels for units of several weights: blocks, channels, rows of N:M patterns.

#pragma once

#include <cstdint>

#include "loops.h"

namespace spartan {

// A tensor of (rows, inputs, kernel positions), divided into units of block[0] x block[1] x
// block[2] weights; strides say where in the tensor of units their values lie.
struct Grid {
  std::int64_t shape[3], block[3], strides[3];

  Row row() const { return {shape[1], shape[2], block[1], block[2]}; }
};

// Sums |x|, or x y, over each unit.
void pool(const Loops&, const Grid&, const float* x, const float* y, float* units, int threads);

// latent <- theta if given, weight <- theta times the factor of its unit.
void scale(const Loops&, const Grid&, const float* theta, const float* factors, float* latent,
           float* weight, int threads);

// g <- m g + sign(theta) term, with m and term of the unit.
void pull_back_units(const Loops&, const Grid&, float* grad, const float* theta, const float* m,
                     const float* terms, int threads);

}  // namespace spartan
