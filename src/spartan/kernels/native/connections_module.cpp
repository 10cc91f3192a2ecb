// Python bindings of connections.h: products of always-sparse layers.

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>

#include <optional>
#include <vector>

#include "arguments.h"
#include "connections.h"
#include "instruction_sets.h"

namespace spartan {
namespace {

using namespace nb::literals;
using Indices = Flat<std::int32_t>;
using Keys = Flat<std::int64_t>;

void require_below(const Indices& indices, std::int64_t end, const char* name) {
  bool sound = true;
  for (std::int64_t i = 0; i < indices.size; ++i)
    sound &= 0 <= indices.data[i] && indices.data[i] < end;
  require(sound, name, "has an index that is out of range");
}

// Connections sorted by one end, divided into blocks of other ends; made once for each graph.
class ConnectionLines {
 public:
  ConnectionLines(Indices starts, Indices others, std::optional<Indices> order, std::int64_t ends,
                  std::int64_t blocks, Threads threads)
      : ends(ends), others_(std::move(others)), order_(std::move(order)) {
    require_rising(starts.checked("starts"), others_.checked("others").size, "starts");
    require_below(others_, ends, "others");
    if (order_) require_below(order_->checked("order", others_.size), others_.size, "order");
    count = starts.size - 1;
    require(blocks > 0, "blocks", "must be at least 1");
    begins_.resize((blocks + 1) * count);
    divide(starts.data, others_.data, count, blocks, (ends + blocks - 1) / blocks, begins_.data(),
           threads);
    lines_ = {begins_.data(), others_.data, count, blocks};
  }

  const Lines& lines() const { return lines_; }
  std::int64_t connections() const { return others_.size; }
  // Where each connection is in the order that values have.
  const std::int32_t* order() const {
    require(order_.has_value(), "lines", "must have an order");
    return order_->data;
  }

  std::int64_t count, ends;

 private:
  Indices others_;
  std::optional<Indices> order_;
  std::vector<std::int32_t> begins_;
  Lines lines_;
};

const ConnectionLoops& loops() { return *current_set().connections; }

// Panels of (panels, features, samples), in which samples are neighbours.
template <class T>
Panels<T> panels_of(const View<float>& x, const char* name, const Sizes& shape) {
  x.checked(name, shape);
  require(x.strides[2] == 1 || shape[2] <= 1, name, "must have neighbouring samples");
  return {x.data, x.strides[0], x.strides[1]};
}

void bound_forward(const ConnectionLines& lines, const Flat<float>& values,
                   const std::optional<Flat<float>>& bias, const View<float>& x,
                   const View<float>& y, Threads threads) {
  values.checked("values", lines.connections());
  if (bias) bias->checked("bias", lines.count);
  x.checked("x", 3);
  const Batch batch = {x.shape[0], x.shape[2]};
  forward(loops(), lines.lines(), batch, values.data, bias ? bias->data : nullptr,
          panels_of<const float>(x, "x", {batch.panels, lines.ends, batch.lanes}),
          panels_of<float>(y, "y", {batch.panels, lines.count, batch.lanes}), threads);
}

void bound_backward(const ConnectionLines& lines, const Flat<float>& values, const View<float>& x,
                    const View<float>& dy, const View<float>& dx, const Flat<float>& dvalues,
                    Threads threads) {
  values.checked("values", lines.connections());
  dvalues.checked("dvalues", lines.connections());
  x.checked("x", 3);
  const Batch batch = {x.shape[0], x.shape[2]};
  const Sizes inputs = {batch.panels, lines.count, batch.lanes};
  backward(loops(), lines.lines(), batch, values.data, lines.order(),
           panels_of<const float>(x, "x", inputs),
           panels_of<const float>(dy, "dy", {batch.panels, lines.ends, batch.lanes}),
           panels_of<float>(dx, "dx", inputs), dvalues.data, threads);
}

void bound_pairs(const ConnectionLines& lines, const View<float>& dy, const View<float>& x,
                 const Flat<float>& dvalues, Threads threads) {
  dvalues.checked("dvalues", lines.connections());
  x.checked("x", 3);
  const Batch batch = {x.shape[0], x.shape[2]};
  pairs(loops(), lines.lines(), batch,
        panels_of<const float>(dy, "dy", {batch.panels, lines.count, batch.lanes}),
        panels_of<const float>(x, "x", {batch.panels, lines.ends, batch.lanes}), dvalues.data,
        threads);
}

void bound_gather_samples(const View<float>& x, const Flat<float>& out, Threads threads) {
  x.checked("x", 3);
  require(x.strides[1] == 1, "x", "must have neighbouring features");
  const Batch batch = {x.shape[0], x.shape[2]};
  const std::int64_t features = x.shape[1];
  out.checked("out", batch.panels * features * batch.lanes);
  gather_samples(*current_set().products, {x.data, x.strides[0], x.strides[2]}, batch, features,
                 out.data, threads);
}

void bound_transpose(const Indices& starts, const Indices& others, const Indices& column_starts,
                     const Indices& column_lines, const Indices& order) {
  require_rising(starts.checked("starts"), others.checked("others").size, "starts");
  column_starts.checked("column_starts");
  require(column_starts.size > 0, "column_starts",
          "must have one entry more than there are columns");
  require_below(others, column_starts.size - 1, "others");
  column_lines.checked("column_lines", others.size);
  order.checked("order", others.size);
  transpose(starts.data, others.data, starts.size - 1, column_starts.size - 1, column_starts.data,
            column_lines.data, order.data);
}

std::uint32_t bound_checksum(const Indices& indices) {
  indices.checked("indices");
  return checksum(indices.data, indices.size);
}

void bound_merge(const Keys& first, const Keys& second, const Keys& merged, const Keys& places) {
  first.checked("first");
  second.checked("second");
  merged.checked("merged", first.size + second.size);
  places.checked("places", first.size);
  merge(first.data, second.data, first.size, second.size, merged.data, places.data);
}

void bound_members(const Keys& keys, const Keys& known, const Flat<bool>& found) {
  keys.checked("keys");
  known.checked("known");
  found.checked("found", keys.size);
  members(keys.data, known.data, keys.size, known.size, found.data);
}

}  // namespace

void bind_connections(nb::class_<Kernels>& kernels) {
  const nb::kw_only named;
  nb::class_<ConnectionLines>(kernels, "ConnectionLines")
      .def(
          nb::init<Indices, Indices, std::optional<Indices>, std::int64_t, std::int64_t, Threads>(),
          named, "starts"_a, "others"_a, "order"_a.none(), "ends"_a, "blocks"_a, "threads"_a);
  kernels.def_static("connections_forward", &bound_forward, Release(), named, "lines"_a, "values"_a,
                     "bias"_a.none(), "x"_a, "y"_a, "threads"_a);
  kernels.def_static("connections_backward", &bound_backward, Release(), named, "lines"_a,
                     "values"_a, "x"_a, "dy"_a, "dx"_a, "dvalues"_a, "threads"_a);
  kernels.def_static("connections_pairs", &bound_pairs, Release(), named, "lines"_a, "dy"_a, "x"_a,
                     "dvalues"_a, "threads"_a);
  kernels.def_static("connections_gather_samples", &bound_gather_samples, Release(), named, "x"_a,
                     "out"_a, "threads"_a);
  kernels.def_static("connections_checksum", &bound_checksum, Release(), named, "indices"_a);
  kernels.def_static("connections_transpose", &bound_transpose, Release(), named, "starts"_a,
                     "others"_a, "column_starts"_a, "column_lines"_a, "order"_a);
  kernels.def_static("connections_merge", &bound_merge, Release(), named, "first"_a, "second"_a,
                     "merged"_a, "places"_a);
  kernels.def_static("connections_members", &bound_members, Release(), named, "keys"_a, "known"_a,
                     "found"_a);
}

}  // namespace spartan
