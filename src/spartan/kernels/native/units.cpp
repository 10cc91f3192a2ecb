// Pools weights over pruning units, and scales weights by unit values, band by band.

#include "units.h"

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "tensors.h"

namespace spartan {
namespace {

// Position, in the tensor of units, of each unit of a row.
std::vector<std::int64_t> offsets(const Grid& grid) {
  const std::int64_t inner = grid.shape[2] / grid.block[2];
  std::vector<std::int64_t> result(grid.row().units());
  for (std::size_t u = 0; u < result.size(); ++u)
    result[u] = static_cast<std::int64_t>(u) / inner * grid.strides[1] +
                static_cast<std::int64_t>(u) % inner * grid.strides[2];
  return result;
}

// The values of a row's units, one for each weight of the row.
void expand(const Grid& grid, const float* units, const std::vector<std::int64_t>& offsets,
            float* row) {
  const std::int64_t inner = grid.shape[2] / grid.block[2], depth = grid.block[2];
  const std::int64_t cols = grid.block[1];
  for (std::size_t u = 0; u < offsets.size(); u += inner) {
    if (inner == 1) {  // a unit is one run of weights
      row = std::fill_n(row, cols * depth, units[offsets[u]]);
      continue;
    }
    for (std::int64_t i = 0; i < cols; ++i)
      for (std::int64_t k = 0; k < inner; ++k) row = std::fill_n(row, depth, units[offsets[u + k]]);
  }
}

// Calls f(worker, first row, last row) for runs of rows that lie in one row of units.
template <class F>
void each_band(const Grid& grid, int threads, F f) {
  const std::int64_t most = std::max<std::int64_t>(1, kChunk / grid.row().size());
  const std::int64_t height = std::min(grid.block[0], most);
  const std::int64_t per_block = (grid.block[0] + height - 1) / height;
  const std::int64_t bands = grid.shape[0] / grid.block[0] * per_block;
  // Low bands come in batches: a task should be worth its dispatch.
  const std::int64_t batch = std::max<std::int64_t>(1, most / height);
  parallel((bands + batch - 1) / batch, threads, [&](int worker, std::int64_t task) {
    for (std::int64_t b = task * batch; b < std::min(bands, (task + 1) * batch); ++b) {
      const std::int64_t block = b / per_block * grid.block[0];
      const std::int64_t first = block + b % per_block * height;
      f(worker, first, std::min(first + height, block + grid.block[0]));
    }
  });
}

}  // namespace

void pool(const Loops& loops, const Grid& grid, const float* x, const float* y, float* units,
          int threads) {
  const Row row = grid.row();
  const auto places = offsets(grid);
  std::vector<std::vector<double>> sums(threads, std::vector<double>(row.units()));
  parallel(grid.shape[0] / grid.block[0], threads, [&](int worker, std::int64_t block) {
    double* sum = sums[worker].data();
    std::fill(sum, sum + row.units(), 0.0);
    for (std::int64_t r = block * grid.block[0]; r < (block + 1) * grid.block[0]; ++r)
      loops.pool_row(x + r * row.size(), y ? y + r * row.size() : nullptr, row, sum);
    float* out = units + block * grid.strides[0];
    for (std::size_t u = 0; u < places.size(); ++u) out[places[u]] = static_cast<float>(sum[u]);
  });
}

void scale(const Loops& loops, const Grid& grid, const float* theta, const float* factors,
           float* latent, float* weight, int threads) {
  const std::int64_t size = grid.row().size();
  const auto places = offsets(grid);
  std::vector<std::vector<float>> rows(threads, std::vector<float>(size));
  each_band(grid, threads, [&](int worker, std::int64_t first, std::int64_t last) {
    float* row = rows[worker].data();
    expand(grid, factors + first / grid.block[0] * grid.strides[0], places, row);
    for (std::int64_t r = first; r < last; ++r)
      loops.scale_row(theta + r * size, row, latent ? latent + r * size : nullptr,
                      weight + r * size, size);
  });
}

void pull_back_units(const Loops& loops, const Grid& grid, float* grad, const float* theta,
                     const float* m, const float* terms, int threads) {
  const std::int64_t size = grid.row().size();
  const auto places = offsets(grid);
  std::vector<std::vector<float>> rows(threads, std::vector<float>(2 * size));
  each_band(grid, threads, [&](int worker, std::int64_t first, std::int64_t last) {
    float *m_row = rows[worker].data(), *term_row = m_row + size;
    const std::int64_t base = first / grid.block[0] * grid.strides[0];
    expand(grid, m + base, places, m_row);
    expand(grid, terms + base, places, term_row);
    for (std::int64_t r = first; r < last; ++r)
      loops.pull_back_row(grad + r * size, theta + r * size, m_row, term_row, size);
  });
}

}  // namespace spartan
