// Sparse weights times dense activations: the inner loops, once per instruction set (products.inc).

#pragma once

#include <cstdint>

namespace spartan {

// Weights of bundles of `height` rows that share their columns. An entry is one column of a bundle:
// `height` values, and where its input begins in z.
struct Entries {
  const float* values;
  const std::uint16_t* offsets;
  const std::int32_t* starts;  // of each bundle's entries; one more than there are bundles
  int height;                  // 1, 4, 8 or 16
};

enum Activation { kLinear, kRelu, kGelu };

// Where sums go when they are complete, instead of back to where they were.
struct Ending {
  float* out;
  std::int64_t stride;  // of rows
  const float* addend;  // lies like out; may be null
  bool relu;
};

struct ProductLoops {
  // sums[row][lane] = start[row] + sum over entries of value * z[offset + lane], for `lanes` lanes,
  // a multiple of 16. Without `start`, adds to what sums holds. `ending` may be null.
  void (*multiply)(const Entries&, std::int64_t first, std::int64_t last, const float* z,
                   const float* start, float* sums, int lanes, const Ending* ending);

  // y[row] = sum of values * x[column], for slices of 16 rows: step by step, one entry of each row.
  // `rows` says which rows a slice holds; -1 where it holds fewer than 16.
  void (*gather)(const Entries&, const std::int32_t* rows, std::int64_t first, std::int64_t last,
                 const float* x, float* y);
  // The same for bundles of 16 rows that share their columns.
  void (*broadcast)(const Entries&, std::int64_t first, std::int64_t last, const float* x,
                    float* y);

  // out[col * out_stride + row] = in[row * in_stride + col].
  void (*transpose)(const float* in, std::int64_t in_stride, std::int64_t rows, std::int64_t cols,
                    float* out, std::int64_t out_stride);
  // Rows of `size`: to[i] = keep[i % period] ? from[stride * i] : 0. Rows of `to` are neighbours;
  // `period` is a multiple of 16.
  void (*pick)(const float* from, std::int64_t from_row, std::int64_t stride, std::int64_t rows,
               std::int64_t size, const std::int32_t* keep, std::int64_t period, float* to);
  // out = activation(x + addend), for rows of n; `addend` may be null and lies like out, which may
  // be x.
  void (*finish)(const float* x, std::int64_t x_stride, const float* addend, float* out,
                 std::int64_t out_stride, std::int64_t rows, std::int64_t n, Activation);
};

const ProductLoops& baseline_products();
const ProductLoops& avx2_products();
const ProductLoops& avx512_products();

}  // namespace spartan
