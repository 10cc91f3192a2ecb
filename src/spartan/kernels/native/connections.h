// Sparse-dense products of always-sparse layers, forward and backward.
//
// Activations are feature-major: a row for each feature, in which samples (lanes) are neighbours,
// so that one connection is a few vector operations. Every sum has one order, whatever the threads.

#pragma once

#include <cstdint>

#include "products.h"

namespace spartan {

// Connections sorted by one end, the line, and within a line by the other. A block is a range of
// other ends whose rows stay in the cache while all lines are swept.
struct Lines {
  const std::int32_t* begins;  // (blocks + 1, lines): where the line's part of each block begins
  const std::int32_t* others;  // of each connection
  std::int64_t count, blocks;
};

// Rows of lanes, of one panel: samples that are processed together.
template <class T>
struct Rows {
  T* first;
  std::int64_t stride;

  T* operator[](std::int64_t row) const { return first + row * stride; }
};

// What a sweep over some lines and one block works on.
struct Part {
  std::int64_t first, last, block;
  std::int64_t lanes;
  bool begins;  // whether sums of this panel's rows begin, instead of being continued
};

struct ConnectionLoops {
  // y[line] (+)= sum of values * z[other]; begins with bias, or 0 if that is null.
  void (*forward)(const Lines&, const Part&, const float* values, const float* bias,
                  Rows<const float> z, Rows<float> y);
  // dx[line] (+)= sum of values[order] * dy[other], dvalues[order] (+)= x[line] . dy[other]
  void (*backward)(const Lines&, const Part&, const float* values, const std::int32_t* order,
                   Rows<const float> x, Rows<const float> dy, Rows<float> dx, float* dvalues,
                   bool first_panel);
  // dvalues (+)= dy[line] . x[other]
  void (*pairs)(const Lines&, const Part&, Rows<const float> dy, Rows<const float> x,
                float* dvalues, bool first_panel);
};

const ConnectionLoops& baseline_connections();
const ConnectionLoops& avx2_connections();
const ConnectionLoops& avx512_connections();

// Panels of a batch: all have the same lanes, and lie `panel` floats apart.
template <class T>
struct Panels {
  T* first;
  std::int64_t panel, row;

  Rows<T> at(std::int64_t p) const { return {first + p * panel, row}; }
};

struct Batch {
  std::int64_t panels, lanes;
};

void forward(const ConnectionLoops&, const Lines& by_output, const Batch&, const float* values,
             const float* bias, Panels<const float> z, Panels<float> y, int threads);
void backward(const ConnectionLoops&, const Lines& by_input, const Batch&, const float* values,
              const std::int32_t* order, Panels<const float> x, Panels<const float> dy,
              Panels<float> dx, float* dvalues, int threads);
void pairs(const ConnectionLoops&, const Lines& by_output, const Batch&, Panels<const float> dy,
           Panels<const float> x, float* dvalues, int threads);

// Makes samples neighbours: out[panel][feature][sample] = in[panel][sample][feature].
void gather_samples(const ProductLoops&, Panels<const float> in, const Batch&,
                    std::int64_t features, float* out, int threads);

// From connections sorted by (line, other) to the same sorted by (other, line).
void transpose(const std::int32_t* starts, const std::int32_t* others, std::int64_t lines,
               std::int64_t columns, std::int32_t* column_starts, std::int32_t* column_lines,
               std::int32_t* order);
// Another number, nearly always, when any index is another; as fast as memory.
std::uint32_t checksum(const std::int32_t* indices, std::int64_t count);
// Where the part of each block begins in each line.
void divide(const std::int32_t* starts, const std::int32_t* others, std::int64_t lines,
            std::int64_t blocks, std::int64_t per_block, std::int32_t* begins, int threads);

// Merges two lists that rise and share nothing; says where the keys of the first one are.
void merge(const std::int64_t* first, const std::int64_t* second, std::int64_t first_count,
           std::int64_t second_count, std::int64_t* merged, std::int64_t* places);

// Says of each key whether it is known; both lists rise.
void members(const std::int64_t* keys, const std::int64_t* known, std::int64_t count,
             std::int64_t known_count, bool* found);

}  // namespace spartan
