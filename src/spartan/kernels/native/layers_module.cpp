// The part of the Python module that serves layers with sparse weights.

#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>

#include "instruction_sets.h"
#include "layers.h"

namespace nb = nanobind;

namespace spartan {
namespace {

using Address = std::uintptr_t;
using Numbers = std::vector<std::int64_t>;
using Release = nb::call_guard<nb::gil_scoped_release>;

template <class T>
const T* read(Address address) {
  return reinterpret_cast<const T*>(address);
}

// Addresses: values, offsets, starts, bases, bias.
Weights weights_of(const std::vector<Address>& w, const Numbers& sizes) {
  if (w.size() != 5 || sizes.size() != 4) throw std::invalid_argument("weights: 5 and 4 numbers");
  const Entries entries = {read<float>(w[0]), read<std::uint16_t>(w[1]), read<std::int32_t>(w[2]),
                           static_cast<int>(sizes[3])};
  return {entries, read<std::int64_t>(w[3]), read<float>(w[4]), sizes[0], sizes[1], sizes[2]};
}

Output output_of(Address y, Address addend, int activation) {
  return {reinterpret_cast<float*>(y), read<float>(addend), static_cast<Activation>(activation)};
}

void bound_linear(const std::vector<Address>& weights, const Numbers& sizes, const Numbers& matrix,
                  Address x, bool feature_major, int lanes, Address y, Address addend,
                  int activation, int threads) {
  const Matrix m = {matrix.at(0), matrix.at(1), matrix.at(2), matrix.at(3)};
  linear(*current_set().products, weights_of(weights, sizes), m, read<float>(x), feature_major,
         lanes, output_of(y, addend, activation), threads);
}

void bound_convolution(const std::vector<Address>& weights, const Numbers& sizes, const Numbers& n,
                       Address x, int lanes, Address y, Address addend, int activation,
                       int threads) {
  if (n.size() != 22) throw std::invalid_argument("a convolution has 22 numbers");
  Convolution c;
  static_assert(sizeof c == 22 * sizeof n[0]);
  std::copy(n.begin(), n.end(), reinterpret_cast<std::int64_t*>(&c));
  convolution(*current_set().products, weights_of(weights, sizes), c, read<float>(x), lanes,
              output_of(y, addend, activation), threads);
}

// Addresses: values, offsets, starts, rows, bias.
void bound_vector(const std::vector<Address>& w, std::int64_t slices, std::int64_t outputs,
                  Address x, Address y, Address addend, int activation, int threads) {
  if (w.size() != 5) throw std::invalid_argument("weights have 5 addresses");
  const Entries entries = {read<float>(w[0]), read<std::uint16_t>(w[1]), read<std::int32_t>(w[2]),
                           16};
  vector(*current_set().products, entries, read<std::int32_t>(w[3]), slices, read<float>(w[4]),
         outputs, read<float>(x), output_of(y, addend, activation), threads);
}

}  // namespace

void bind_layers(nb::module_& m) {
  m.def("linear", &bound_linear, Release());
  m.def("convolution", &bound_convolution, Release());
  m.def("vector", &bound_vector, Release());
}

}  // namespace spartan
