// Python bindings of layers.h: sparse linear and convolution layers for inference.

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <stdexcept>

#include "arguments.h"
#include "instruction_sets.h"
#include "layers.h"

namespace spartan {
namespace {

using namespace nb::literals;

// Weights in blocks of inputs, as layers.h wants them; checked when made, then used at every call.
class BlockedWeights {
 public:
  BlockedWeights(Flat<float> values, Flat<std::uint16_t> offsets, Flat<std::int32_t> starts,
                 Flat<std::int64_t> bases, Flat<float> bias, std::int64_t bundles,
                 std::int64_t outputs, int height)
      : values_(std::move(values)),
        offsets_(std::move(offsets)),
        starts_(std::move(starts)),
        bases_(std::move(bases)),
        bias_(std::move(bias)) {
    require(height == 1 || height == 4 || height == 8 || height == 16, "height",
            "must be 1, 4, 8 or 16");
    require(outputs <= bundles * height, "outputs", "must not be more than the bundles hold");
    offsets_.checked("offsets");
    bases_.checked("bases");
    values_.checked("values", offsets_.size * height);
    starts_.checked("starts", bases_.size * bundles + 1);
    bias_.checked("bias", bundles * height);
    require_rising(starts_, offsets_.size, "starts");
    reach_ = farthest(bundles);
    const Entries entries = {values_.data, offsets_.data, starts_.data, height};
    weights_ = {entries, bases_.data, bias_.data, bases_.size, bundles, outputs};
  }

  const Weights& weights() const { return weights_; }
  // Refuses packed inputs of `size` floats if entries lie behind the last row of `row` floats.
  void require_within(std::int64_t size, std::int64_t row) const {
    require(reach_ < 0 || reach_ + row <= size, "weights", "read inputs that x does not have");
  }

 private:
  // Where the entry farthest behind lies among the packed inputs; -1 if there is none.
  std::int64_t farthest(std::int64_t bundles) const {
    std::int64_t reach = -1;
    for (std::int64_t b = 0; b < bases_.size; ++b) {
      require(bases_.data[b] >= 0, "bases", "must not be negative");
      for (std::int64_t e = starts_.data[b * bundles]; e < starts_.data[(b + 1) * bundles]; ++e)
        reach = std::max<std::int64_t>(reach, bases_.data[b] + offsets_.data[e]);
    }
    return reach;
  }

  std::int64_t reach_;
  Flat<float> values_;
  Flat<std::uint16_t> offsets_;
  Flat<std::int32_t> starts_;
  Flat<std::int64_t> bases_;
  Flat<float> bias_;
  Weights weights_;
};

// Weights in slices of 16 rows, for one sample at a time; `rows` is empty if they are in order.
class SlicedWeights {
 public:
  SlicedWeights(Flat<float> values, Flat<std::uint16_t> columns, Flat<std::int32_t> starts,
                Flat<std::int32_t> rows, Flat<float> bias, std::int64_t inputs,
                std::int64_t outputs)
      : inputs(inputs),
        outputs(outputs),
        values_(std::move(values)),
        columns_(std::move(columns)),
        starts_(std::move(starts)),
        rows_(std::move(rows)),
        bias_(std::move(bias)) {
    values_.checked("values");
    columns_.checked("columns");
    starts_.checked("starts");
    rows_.checked("rows");
    slices = starts_.size - 1;
    const std::int64_t steps = values_.size / 16, own = rows_.size ? 16 * steps : steps;
    require(columns_.size == own, "columns", "must be as many as the values, or one for each step");
    require(!rows_.size || rows_.size == 16 * slices, "rows", "must be 16 for each slice");
    bias_.checked("bias");
    require(bias_.size >= outputs, "bias", "must have one entry for each output");
    require_rising(starts_, steps, "starts");
    require(outputs <= 16 * slices, "outputs", "must not be more than the slices hold");
    for (std::int64_t i = 0; i < columns_.size; ++i)
      require(columns_.data[i] < inputs, "columns", "must be inputs of the layer");
    for (std::int64_t i = 0; i < rows_.size; ++i)
      require(-1 <= rows_.data[i] && rows_.data[i] < outputs, "rows", "must be outputs, or -1");
  }

  Entries entries() const { return {values_.data, columns_.data, starts_.data, 16}; }
  const std::int32_t* rows() const { return rows_.size ? rows_.data : nullptr; }
  const float* bias() const { return bias_.data; }

  std::int64_t inputs, outputs, slices;

 private:
  Flat<float> values_;
  Flat<std::uint16_t> columns_;
  Flat<std::int32_t> starts_;
  Flat<std::int32_t> rows_;
  Flat<float> bias_;
};

// Rows of packed inputs fill whole vectors.
void require_lanes(int lanes) {
  require(lanes > 0 && lanes % 16 == 0, "lanes", "must be a multiple of 16");
}

Activation activation_of(int number) {
  require(kLinear <= number && number <= kGelu, "activation", "must be 0, 1 or 2");
  return static_cast<Activation>(number);
}

using Addend = std::optional<View<float>>;

Output output_of(const View<float>& y, const Addend& addend, int activation) {
  if (addend) {
    addend->checked("addend", y.shape);
    require(addend->lies_at(y.strides), "addend", "must lie in memory as y does");
  }
  return {y.data, addend ? addend->data : nullptr, activation_of(activation)};
}

void bound_linear(const BlockedWeights& weights, const View<float>& x, const View<float>& y,
                  const Addend& addend, std::int64_t inputs, bool feature_major, int lanes,
                  int activation, Threads threads) {
  x.checked("x", 2);
  const std::int64_t samples = x.shape[0], outputs = weights.weights().outputs;
  require(x.shape[1] == inputs, "x", "must be (samples, inputs)");
  require(x.strides[0] == 1 || x.strides[1] == 1, "x", "must have a stride of 1");
  y.checked("y", Sizes{samples, outputs});
  const Sizes order = feature_major ? Sizes{1, samples} : Sizes{outputs, 1};
  require(y.lies_at(order), "y", "lies in another memory order");
  require_lanes(lanes);
  weights.require_within(inputs * lanes, lanes);
  const Matrix matrix = {inputs, samples, x.strides[1], x.strides[0]};
  linear(*current_set().products, weights.weights(), matrix, x.data, feature_major, lanes,
         output_of(y, addend, activation), threads);
}

void bound_vector(const SlicedWeights& weights, const Flat<float>& x, const Flat<float>& y,
                  const std::optional<Flat<float>>& addend, int activation, Threads threads) {
  x.checked("x", weights.inputs);
  y.checked("y", weights.outputs);
  if (addend) addend->checked("addend", weights.outputs);
  const Output output = {y.data, addend ? addend->data : nullptr, activation_of(activation)};
  vector(*current_set().products, weights.entries(), weights.rows(), weights.slices, weights.bias(),
         weights.outputs, x.data, output, threads);
}

// Sizes of a convolution on inputs of one size; strides of its tensors are added at each call.
Convolution make_convolution(std::int64_t channels, std::int64_t rows, std::int64_t images,
                             std::int64_t columns, const Sizes& out, const Sizes& kernel,
                             const Sizes& stride, const Sizes& padding, const Sizes& dilation,
                             std::int64_t group, std::int64_t height) {
  for (const Sizes* pair : {&out, &kernel, &stride, &padding, &dilation})
    require(pair->size() == 2, "sizes", "must be two numbers each");
  for (const Sizes* pair : {&out, &kernel, &stride, &dilation})
    require((*pair)[0] > 0 && (*pair)[1] > 0, "sizes", "must be positive");
  require(padding[0] >= 0 && padding[1] >= 0, "padding", "must not be negative");
  for (const std::int64_t size : {channels, rows, images, columns, group, height})
    require(size > 0, "sizes", "must be positive");
  Convolution c{};
  c.channels = channels, c.rows = rows, c.images = images, c.columns = columns;
  c.out_rows = out[0], c.out_columns = out[1];
  c.kernel_rows = kernel[0], c.kernel_columns = kernel[1];
  c.row_stride = stride[0], c.column_stride = stride[1];
  c.row_padding = padding[0], c.column_padding = padding[1];
  c.row_dilation = dilation[0], c.column_dilation = dilation[1];
  c.group = group, c.height = height;
  return c;
}

void bound_convolution(const BlockedWeights& weights, const Convolution& sizes,
                       const View<float>& x, const View<float>& y, const Addend& addend, int lanes,
                       int activation, Threads threads) {
  Convolution c = sizes;
  x.checked("x", Sizes{c.images, c.channels, c.rows, c.columns});
  y.checked("y", Sizes{c.images, weights.weights().outputs, c.out_rows, c.out_columns});
  require(x.strides[3] == 1 || c.columns == 1, "x", "must have neighbouring columns");
  require(y.strides[3] == 1 || c.out_columns == 1, "y", "must have neighbouring columns");
  c.x_channel = x.strides[1], c.x_row = x.strides[2], c.x_image = x.strides[0];
  require_lanes(lanes);
  const std::int64_t packed = c.channels * c.kernel_columns * c.plane();
  weights.require_within(packed, c.height * c.row_size());
  c.y_channel = y.strides[1], c.y_row = y.strides[2], c.y_image = y.strides[0];
  convolution(*current_set().products, weights.weights(), c, x.data, lanes,
              output_of(y, addend, activation), threads);
}

}  // namespace

void bind_layers(nb::class_<Kernels>& kernels) {
  const nb::kw_only named;
  nb::class_<BlockedWeights>(kernels, "BlockedWeights")
      .def(nb::init<Flat<float>, Flat<std::uint16_t>, Flat<std::int32_t>, Flat<std::int64_t>,
                    Flat<float>, std::int64_t, std::int64_t, int>(),
           named, "values"_a, "offsets"_a, "starts"_a, "bases"_a, "bias"_a, "bundles"_a,
           "outputs"_a, "height"_a);
  nb::class_<SlicedWeights>(kernels, "SlicedWeights")
      .def(nb::init<Flat<float>, Flat<std::uint16_t>, Flat<std::int32_t>, Flat<std::int32_t>,
                    Flat<float>, std::int64_t, std::int64_t>(),
           named, "values"_a, "columns"_a, "starts"_a, "rows"_a, "bias"_a, "inputs"_a, "outputs"_a);
  nb::class_<Convolution>(kernels, "Convolution")
      .def(nb::new_(&make_convolution), named, "channels"_a, "rows"_a, "images"_a, "columns"_a,
           "out"_a, "kernel"_a, "stride"_a, "padding"_a, "dilation"_a, "group"_a, "height"_a);
  kernels.def_static("linear", &bound_linear, Release(), named, "weights"_a, "x"_a, "y"_a,
                     "addend"_a.none(), "inputs"_a, "feature_major"_a, "lanes"_a, "activation"_a,
                     "threads"_a);
  kernels.def_static("vector", &bound_vector, Release(), named, "weights"_a, "x"_a, "y"_a,
                     "addend"_a.none(), "activation"_a, "threads"_a);
  kernels.def_static("convolution", &bound_convolution, Release(), named, "weights"_a, "sizes"_a,
                     "x"_a, "y"_a, "addend"_a.none(), "lanes"_a, "activation"_a, "threads"_a);
}

}  // namespace spartan
