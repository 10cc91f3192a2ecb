// Threads and cache blocks around the loops of connections.h; transposing and merging.

#include "connections.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "parallel.h"

namespace spartan {
namespace {

// Lines a thread takes at a time: many, because each sweep reads the blocks anew.
constexpr std::int64_t kFewest = 64, kTasks = 4;

// Calls f(panel, part) for all panels, lines and blocks. The blocks of a line follow each other in
// one thread, and so do the panels if `panels_together`.
template <class F>
void sweep(const Lines& lines, const Batch& batch, bool panels_together, int threads, F f) {
  const std::int64_t most = std::max<std::int64_t>(1, lines.count / kFewest);
  const std::int64_t chunks = std::min<std::int64_t>(most, threads > 1 ? kTasks * threads : 1);
  const std::int64_t groups = panels_together ? 1 : batch.panels;
  const std::int64_t together = panels_together ? batch.panels : 1;
  parallel(chunks * groups, threads, [&](int, std::int64_t task) {
    const std::int64_t chunk = task % chunks, panel = task / chunks;
    const std::int64_t first = lines.count * chunk / chunks;
    const std::int64_t last = lines.count * (chunk + 1) / chunks;
    for (std::int64_t p = panel; p < panel + together; ++p)
      for (std::int64_t block = 0; block < lines.blocks; ++block)
        f(p, Part{first, last, block, batch.lanes, block == 0});
  });
}

}  // namespace

void forward(const ConnectionLoops& loops, const Lines& by_output, const Batch& batch,
             const float* values, const float* bias, Panels<const float> z, Panels<float> y,
             int threads) {
  sweep(by_output, batch, false, threads, [&](std::int64_t p, const Part& part) {
    loops.forward(by_output, part, values, bias, z.at(p), y.at(p));
  });
}

void backward(const ConnectionLoops& loops, const Lines& by_input, const Batch& batch,
              const float* values, const std::int32_t* order, Panels<const float> x,
              Panels<const float> dy, Panels<float> dx, float* dvalues, int threads) {
  sweep(by_input, batch, true, threads, [&](std::int64_t p, const Part& part) {
    loops.backward(by_input, part, values, order, x.at(p), dy.at(p), dx.at(p), dvalues, p == 0);
  });
}

void pairs(const ConnectionLoops& loops, const Lines& by_output, const Batch& batch,
           Panels<const float> dy, Panels<const float> x, float* dvalues, int threads) {
  sweep(by_output, batch, true, threads, [&](std::int64_t p, const Part& part) {
    loops.pairs(by_output, part, dy.at(p), x.at(p), dvalues, p == 0);
  });
}

void gather_samples(const ProductLoops& loops, Panels<const float> in, const Batch& batch,
                    std::int64_t features, float* out, int threads) {
  constexpr std::int64_t chunk = 256;
  const std::int64_t chunks = (features + chunk - 1) / chunk;
  parallel(batch.panels * chunks, threads, [&](int, std::int64_t task) {
    const std::int64_t panel = task / chunks, begin = task % chunks * chunk;
    loops.transpose(in.first + panel * in.panel + begin, in.row, batch.lanes,
                    std::min(chunk, features - begin),
                    out + (panel * features + begin) * batch.lanes, batch.lanes);
  });
}

void transpose(const std::int32_t* starts, const std::int32_t* others, std::int64_t lines,
               std::int64_t columns, std::int32_t* column_starts, std::int32_t* column_lines,
               std::int32_t* order) {
  std::fill_n(column_starts, columns + 1, 0);
  const std::int64_t count = starts[lines];
  for (std::int64_t e = 0; e < count; ++e) ++column_starts[others[e] + 1];
  std::partial_sum(column_starts, column_starts + columns + 1, column_starts);
  std::vector<std::int32_t> next(column_starts, column_starts + columns);
  for (std::int64_t line = 0; line < lines; ++line)
    for (std::int32_t e = starts[line]; e < starts[line + 1]; ++e) {
      const std::int32_t place = next[others[e]]++;
      column_lines[place] = static_cast<std::int32_t>(line);
      order[place] = e;
    }
}

std::uint32_t checksum(const std::int32_t* indices, std::int64_t count) {
  constexpr std::int64_t lanes = 16;
  std::uint32_t sums[lanes] = {};
  std::int64_t i = 0;
  for (; i + lanes <= count; i += lanes)
    for (std::int64_t lane = 0; lane < lanes; ++lane) {
      const std::uint32_t index = static_cast<std::uint32_t>(indices[i + lane]);
      sums[lane] = ((sums[lane] << 5 | sums[lane] >> 27) ^ index) * 0x9E3779B1u;
    }
  std::uint32_t sum = 0;
  for (const std::uint32_t lane : sums) sum = sum * 31 + lane;
  for (; i < count; ++i) sum = sum * 31 + static_cast<std::uint32_t>(indices[i]);
  return sum;
}

void merge(const std::int64_t* first, const std::int64_t* second, std::int64_t first_count,
           std::int64_t second_count, std::int64_t* merged, std::int64_t* places) {
  std::int64_t i = 0, j = 0;
  while (i < first_count || j < second_count) {
    const bool take_first = j == second_count || (i < first_count && first[i] < second[j]);
    merged[i + j] = take_first ? first[i] : second[j];
    if (take_first) {
      places[i] = i + j;
      ++i;
    } else {
      ++j;
    }
  }
}

void members(const std::int64_t* keys, const std::int64_t* known, std::int64_t count,
             std::int64_t known_count, bool* found) {
  std::int64_t k = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    while (k < known_count && known[k] < keys[i]) ++k;
    found[i] = k < known_count && known[k] == keys[i];
  }
}

void divide(const std::int32_t* starts, const std::int32_t* others, std::int64_t lines,
            std::int64_t blocks, std::int64_t per_block, std::int32_t* begins, int threads) {
  constexpr std::int64_t chunk = 4096;
  parallel((lines + chunk - 1) / chunk, threads, [&](int, std::int64_t task) {
    for (std::int64_t line = task * chunk; line < std::min(lines, (task + 1) * chunk); ++line) {
      std::int32_t e = starts[line];
      for (std::int64_t block = 0; block <= blocks; ++block) {
        const std::int64_t bound = block * per_block;
        while (e < starts[line + 1] && (block == blocks || others[e] < bound)) ++e;
        begins[block * lines + line] = e;
      }
    }
  });
}

}  // namespace spartan
