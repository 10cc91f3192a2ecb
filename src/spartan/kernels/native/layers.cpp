// Inference layers: packs inputs into cache-sized rows, then multiplies the sparse weights.

#include "layers.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "parallel.h"

namespace spartan {
namespace {

constexpr std::int64_t kWidest = 16;  // floats in the widest vector: lanes are a multiple

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Memory that a thread keeps for its next call, aligned to cache lines.
class Scratch {
 public:
  float* floats(std::int64_t n) {
    if (n > size_) {
      memory_.reset(new char[4 * n + 64]);
      size_ = n;
      const auto address = reinterpret_cast<std::uintptr_t>(memory_.get());
      aligned_ = reinterpret_cast<float*>((address + 63) & ~std::uintptr_t{63});
      std::fill_n(aligned_, n, 0.0f);
    }
    return aligned_;
  }

 private:
  std::unique_ptr<char[]> memory_;
  std::int64_t size_ = 0;
  float* aligned_ = nullptr;
};

thread_local Scratch inputs_of_thread, sums_of_thread;

// Computes items one after the other: packs the inputs of each into z, in `runs` steps, then
// computes its `parts`. Threads have items of their own; if there are too few for that, all work on
// the same ones.
template <class Pack, class Compute>
void each_item(std::int64_t items, std::int64_t runs, std::int64_t parts, std::int64_t z_size,
               int threads, Pack pack, Compute compute) {
  if (items % threads == 0 || items >= 4 * threads) {
    parallel(items, threads, [&](int, std::int64_t item) {
      float* z = inputs_of_thread.floats(z_size);
      for (std::int64_t run = 0; run < runs; ++run) pack(item, run, z);
      for (std::int64_t part = 0; part < parts; ++part) compute(item, part, z);
    });
    return;
  }
  const std::int64_t wave = std::min<std::int64_t>(items, threads);
  float* z = inputs_of_thread.floats(wave * z_size);
  for (std::int64_t begin = 0; begin < items; begin += wave) {
    const std::int64_t now = std::min(wave, items - begin);
    parallel(now * runs, threads, [&](int, std::int64_t task) {
      pack(begin + task / runs, task % runs, z + task / runs * z_size);
    });
    parallel(now * parts, threads, [&](int, std::int64_t task) {
      compute(begin + task / parts, task % parts, z + task / parts * z_size);
    });
  }
}

// Bundles to compute at a time: few enough that their sums stay in the second-level cache, and
// parts enough for all threads.
std::int64_t bundles_per_part(const Weights& w, int lanes, std::int64_t tasks, int threads) {
  const std::int64_t most = std::max<std::int64_t>(1, (1 << 18) / (4 * lanes * w.entries.height));
  const std::int64_t wanted = threads == 1 || tasks >= 4 * threads ? 1 : 4 * threads;
  return std::clamp<std::int64_t>(ceil_div(w.bundles, wanted), 1, most);
}

// Sums of the bundles [first, last) over all inputs; returns rows x lanes, unless there is an
// ending.
float* sum_up(const ProductLoops& loops, const Weights& w, std::int64_t first, std::int64_t last,
              const float* z, int lanes, const Ending* ending) {
  const std::int64_t height = w.entries.height;
  float* sums = sums_of_thread.floats((last - first) * height * lanes);
  for (std::int64_t b = 0; b < w.blocks; ++b)
    loops.multiply(w.entries, b * w.bundles + first, b * w.bundles + last, z + w.bases[b],
                   b == 0 ? w.bias + first * height : nullptr, sums, lanes,
                   b == w.blocks - 1 ? ending : nullptr);
  return sums;
}

// Lanes to compute: those past the last position are left out.
int live_lanes(std::int64_t positions) {
  return static_cast<int>(ceil_div(positions, kWidest) * kWidest);
}

// Whether sums can go straight to the output, whole vectors and bundles at a time.
bool ends_directly(const Weights& w, std::int64_t last, std::int64_t count, const Output& out) {
  return count == live_lanes(count) && last * w.entries.height <= w.outputs &&
         out.activation != kGelu;
}

}  // namespace

void linear(const ProductLoops& loops, const Weights& w, const Matrix& m, const float* x,
            bool feature_major, int lanes, const Output& out, int threads) {
  const std::int64_t items = ceil_div(m.positions, lanes), height = w.entries.height;
  const std::int64_t step = bundles_per_part(w, lanes, items, threads);
  // One item that already lies in memory as z should.
  const bool packed = m.position_stride == 1 && m.input_stride == lanes && m.positions == lanes;
  constexpr std::int64_t kRun = 256;  // inputs to pack at a time

  const auto pack = [&](std::int64_t item, std::int64_t run, float* z) {
    const std::int64_t position = item * lanes, first = run * kRun;
    const std::int64_t count = std::min<std::int64_t>(lanes, m.positions - position);
    const std::int64_t rows = std::min(kRun, m.inputs - first);
    const float* from = x + first * m.input_stride + position * m.position_stride;
    float* to = z + first * lanes;
    if (m.position_stride == 1)
      for (std::int64_t i = 0; i < rows; ++i)
        std::memcpy(to + i * lanes, from + i * m.input_stride, 4 * count);
    else
      loops.transpose(from, m.position_stride, count, rows, to, lanes);
  };
  const auto compute = [&](std::int64_t item, std::int64_t part, const float* z) {
    const std::int64_t position = item * lanes, row = part * step * height;
    const std::int64_t count = std::min<std::int64_t>(lanes, m.positions - position);
    const std::int64_t last = std::min((part + 1) * step, w.bundles);
    const std::int64_t rows = std::min(last * height, w.outputs) - row;
    // z has rows of `lanes`, also where fewer are live.
    const std::int64_t feature_at = row * m.positions + position;
    const Ending ending = {out.y + feature_at, m.positions,
                           out.addend ? out.addend + feature_at : nullptr, out.activation == kRelu};
    const bool direct = feature_major && ends_directly(w, last, count, out);
    const float* sums = sum_up(loops, w, part * step, last, packed ? x : z, live_lanes(count),
                               direct ? &ending : nullptr);
    if (direct) return;
    if (feature_major) {
      const std::int64_t at = feature_at;
      loops.finish(sums, live_lanes(count), out.addend ? out.addend + at : nullptr, out.y + at,
                   m.positions, rows, count, out.activation);
      return;
    }
    const std::int64_t at = position * w.outputs + row;
    loops.transpose(sums, live_lanes(count), rows, count, out.y + at, w.outputs);
    if (out.addend || out.activation != kLinear)
      loops.finish(out.y + at, w.outputs, out.addend ? out.addend + at : nullptr, out.y + at,
                   w.outputs, count, rows, out.activation);
  };
  each_item(items, packed ? 0 : ceil_div(m.inputs, kRun), ceil_div(w.bundles, step),
            packed ? 0 : m.inputs * lanes, threads, pack, compute);
}

namespace {

// Copies what the outputs of one item read: for each channel and kernel column a plane
// z[phase][row][image][column].
class Packer {
 public:
  Packer(const ProductLoops& loops, const Convolution& c, const float* x)
      : loops_(loops), c_(c), x_(x) {
    // In a row of z the inputs of neighbouring images follow each other with the same stride.
    even_ =
        c.group == 1 || (c.columns == c.column_stride * c.out_columns && c.x_image == c.columns);
    size_ = (c.channels - 1) * c.x_channel + (c.rows - 1) * c.x_row + (c.images - 1) * c.x_image +
            c.columns;
    period_ = std::lcm(c.row_size(), kWidest);
    keep_.resize(c.kernel_columns * period_);
    for (std::int64_t k = 0; k < c.kernel_columns; ++k)
      for (std::int64_t i = 0; i < period_; ++i) {
        const std::int64_t column = i % c.out_columns * c.column_stride + shift(k);
        keep_[k * period_ + i] = column >= 0 && column < c.columns ? -1 : 0;
      }
  }

  void pack(std::int64_t channel, std::int64_t k, std::int64_t image, std::int64_t images,
            std::int64_t out_row, float* z) const {
    const std::int64_t size = c_.row_size();
    for (std::int64_t phase = 0; phase < c_.phases(); ++phase) {
      const auto row_of = [&](std::int64_t r) {
        return (out_row + r) * c_.row_stride + phase - c_.row_padding;
      };
      std::int64_t first = 0, last = c_.phase_rows();
      while (first < last && row_of(first) < 0) ++first;
      while (last > first && row_of(last - 1) >= c_.rows) --last;
      std::fill_n(z, first * size, 0.0f);
      if (first < last)
        copy_rows(channel, k, image, images, row_of(first), last - first, z + first * size);
      std::fill_n(z + last * size, (c_.phase_rows() - last) * size, 0.0f);
      z += c_.phase_rows() * size;
    }
  }

 private:
  std::int64_t shift(std::int64_t k) const { return k * c_.column_dilation - c_.column_padding; }

  void copy_rows(std::int64_t channel, std::int64_t k, std::int64_t image, std::int64_t images,
                 std::int64_t row, std::int64_t rows, float* z) const {
    const std::int64_t begin =
        channel * c_.x_channel + row * c_.x_row + image * c_.x_image + shift(k);
    const std::int64_t step = c_.x_row * c_.row_stride;
    const std::int64_t reach = (c_.row_size() - 1) * c_.column_stride + 1;
    const bool inside = begin >= 0 && begin + (rows - 1) * step + reach <= size_;
    if (even_ && inside && images == c_.group) {
      const bool one_run = step == c_.row_size() && c_.column_stride == 1;
      loops_.pick(x_ + begin, step, c_.column_stride, one_run ? 1 : rows,
                  one_run ? rows * c_.row_size() : c_.row_size(), keep_.data() + k * period_,
                  period_, z);
      return;
    }
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t n = 0; n < images; ++n)
        for (std::int64_t i = 0; i < c_.out_columns; ++i)
          z[r * c_.row_size() + n * c_.out_columns + i] =
              keep_[k * period_ + i] ? x_[begin + r * step + n * c_.x_image + i * c_.column_stride]
                                     : 0.0f;
  }

  const ProductLoops& loops_;
  const Convolution& c_;
  const float* x_;
  bool even_;
  std::int64_t size_;  // floats of x
  std::int64_t period_;
  std::vector<std::int32_t> keep_;
};

}  // namespace

void convolution(const ProductLoops& loops, const Weights& w, const Convolution& c, const float* x,
                 int lanes, const Output& out, int threads) {
  const std::int64_t bands = ceil_div(c.out_rows, c.height);
  const std::int64_t items = ceil_div(c.images, c.group) * bands;
  const std::int64_t tiles = ceil_div(c.height * c.row_size(), lanes);
  const std::int64_t step = bundles_per_part(w, lanes, items * tiles, threads);
  const std::int64_t parts = ceil_div(w.bundles, step), height = w.entries.height;
  const std::int64_t plane = c.plane();
  constexpr std::int64_t kRun = 16;  // channels to pack at a time
  const Packer packer(loops, c, x);

  struct Item {
    std::int64_t image, images, row, rows;
  };
  const auto item_of = [&](std::int64_t i) {
    const std::int64_t image = i / bands * c.group, row = i % bands * c.height;
    return Item{image, std::min(c.group, c.images - image), row,
                std::min(c.height, c.out_rows - row)};
  };
  const auto pack = [&](std::int64_t i, std::int64_t run, float* z) {
    const Item item = item_of(i);
    for (std::int64_t ch = run * kRun; ch < std::min((run + 1) * kRun, c.channels); ++ch)
      for (std::int64_t k = 0; k < c.kernel_columns; ++k)
        packer.pack(ch, k, item.image, item.images, item.row,
                    z + (ch * c.kernel_columns + k) * plane);
  };
  const auto compute = [&](std::int64_t i, std::int64_t task, const float* z) {
    const Item item = item_of(i);
    const std::int64_t lane = task / parts * lanes, first = task % parts * step;
    const std::int64_t positions = item.rows * c.row_size() - lane;
    if (positions <= 0) return;
    const std::int64_t count = std::min<std::int64_t>(lanes, positions);
    const int live = live_lanes(count);
    const std::int64_t last = std::min(first + step, w.bundles);
    const std::int64_t rows = std::min(last * height, w.outputs) - first * height;
    const bool whole = item.images == c.group && c.y_row == c.row_size();
    const std::int64_t base = first * height * c.y_channel;
    const std::int64_t at = base + item.row * c.y_row + item.image * c.y_image + lane;
    const Ending ending = {out.y + at, c.y_channel, out.addend ? out.addend + at : nullptr,
                           out.activation == kRelu};
    const bool direct = whole && ends_directly(w, last, count, out);
    const float* sums = sum_up(loops, w, first, last, z + lane, live, direct ? &ending : nullptr);
    if (direct) return;
    // Runs of positions that are neighbours in the output too.
    for (std::int64_t p = 0; p < count;) {
      const std::int64_t row = (lane + p) / c.row_size(), in_row = (lane + p) % c.row_size();
      const std::int64_t left = whole ? count - p : std::min(count - p, c.row_size() - in_row);
      const std::int64_t valid = item.images * c.out_columns - in_row;
      const std::int64_t n = whole ? left : std::min(left, valid);
      if (n > 0) {
        const std::int64_t to = base + (item.row + row) * c.y_row + item.image * c.y_image + in_row;
        loops.finish(sums + p, live, out.addend ? out.addend + to : nullptr, out.y + to,
                     c.y_channel, rows, n, out.activation);
      }
      p += left;
    }
  };
  // Vectors may be read past an item's last position.
  each_item(items, ceil_div(c.channels, kRun), tiles * parts,
            c.channels * c.kernel_columns * plane + lanes, threads, pack, compute);
}

void vector(const ProductLoops& loops, const Entries& entries, const std::int32_t* rows,
            std::int64_t slices, const float* bias, std::int64_t outputs, const float* x,
            const Output& out, int threads) {
  constexpr std::int64_t kSlice = 16;
  const std::int64_t step = std::max<std::int64_t>(1, ceil_div(slices, 4 * threads));
  float* sums = inputs_of_thread.floats(slices * kSlice);
  parallel(threads == 1 ? 1 : ceil_div(slices, step), threads, [&](int, std::int64_t task) {
    const std::int64_t first = threads == 1 ? 0 : task * step;
    const std::int64_t last = threads == 1 ? slices : std::min(first + step, slices);
    if (rows)
      loops.gather(entries, rows, first, last, x, sums);
    else
      loops.broadcast(entries, first, last, x, sums);
  });
  loops.finish(sums, 0, bias, sums, 0, 1, outputs, kLinear);
  loops.finish(sums, 0, out.addend, out.y, 0, 1, outputs, out.activation);
}

}  // namespace spartan
