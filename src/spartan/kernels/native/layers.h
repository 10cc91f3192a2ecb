// Linear and convolution layers with sparse weights, on inputs of any batch.
//
// Activations are feature-major while computed on: z holds one row per input (for convolutions: per
// input and kernel position), one lane per output position. The weights are cut into blocks of
// inputs whose part of z fits the first-level cache.

#pragma once

#include <cstdint>

#include "products.h"

namespace spartan {

struct Weights {
  Entries entries;            // bundles of block 0, then those of block 1, …
  const std::int64_t* bases;  // where each block's inputs begin in z
  const float* bias;          // bundles x height
  std::int64_t blocks, bundles, outputs;
};

// An output, and what is added to it before the activation (same layout; may be null).
struct Output {
  float* y;
  const float* addend;
  Activation activation;
};

// inputs x positions; one of the strides is 1.
struct Matrix {
  std::int64_t inputs, positions, input_stride, position_stride;
};

// y is positions x outputs, or outputs x positions if `feature_major`.
void linear(const ProductLoops&, const Weights&, const Matrix&, const float* x, bool feature_major,
            int lanes, const Output&, int threads);

// Items are groups of `group` images times runs of `height` output rows. Columns are neighbours in
// memory; the images of a group of several are rows of one matrix: their stride is their width.
struct Convolution {
  std::int64_t channels, rows, images, columns;
  std::int64_t out_rows, out_columns;
  std::int64_t kernel_rows, kernel_columns;
  std::int64_t row_stride, column_stride, row_padding, column_padding;
  std::int64_t row_dilation, column_dilation;
  std::int64_t group, height;
  std::int64_t x_channel, x_row, x_image;  // strides in memory
  std::int64_t y_channel, y_row, y_image;

  std::int64_t phases() const { return row_stride < reach() + 1 ? row_stride : reach() + 1; }
  std::int64_t reach() const { return (kernel_rows - 1) * row_dilation; }
  std::int64_t phase_rows() const { return height + reach() / row_stride; }
  std::int64_t row_size() const { return group * out_columns; }
  std::int64_t plane() const { return phases() * phase_rows() * row_size(); }
};

void convolution(const ProductLoops&, const Weights&, const Convolution&, const float* x, int lanes,
                 const Output&, int threads);

// One sample: weights in slices of 16 rows (see products.h), or in bundles of 16 if `rows` is null.
void vector(const ProductLoops&, const Entries&, const std::int32_t* rows, std::int64_t slices,
            const float* bias, std::int64_t outputs, const float* x, const Output&, int threads);

}  // namespace spartan
