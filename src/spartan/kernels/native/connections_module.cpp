// The part of the Python module that serves layers which store single connections.

#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "connections.h"
#include "instruction_sets.h"

namespace nb = nanobind;

namespace spartan {
namespace {

using Address = std::uintptr_t;
using Numbers = std::vector<std::int64_t>;
using Release = nb::call_guard<nb::gil_scoped_release>;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// Addresses of cuts and other ends, number of lines and of blocks.
Lines lines_of(const Numbers& n) {
  if (n.size() != 4) throw std::invalid_argument("lines are 4 numbers");
  return {pointer<const std::int32_t>(n[0]), pointer<const std::int32_t>(n[1]), n[2], n[3]};
}

Batch batch_of(const Numbers& n) {
  if (n.size() != 2) throw std::invalid_argument("a batch is 2 numbers");
  return {n[0], n[1]};
}

// Address, floats from panel to panel and from row to row.
template <class T>
Panels<T> panels_of(const Numbers& n) {
  if (n.size() != 3) throw std::invalid_argument("panels are 3 numbers");
  return {pointer<T>(n[0]), n[1], n[2]};
}

const ConnectionLoops& loops() { return *current_set().connections; }

void bound_forward(const Numbers& lines, const Numbers& batch, Address values, Address bias,
                   const Numbers& z, const Numbers& y, int threads) {
  forward(loops(), lines_of(lines), batch_of(batch), pointer<const float>(values),
          pointer<const float>(bias), panels_of<const float>(z), panels_of<float>(y), threads);
}

void bound_backward(const Numbers& lines, const Numbers& batch, Address values, Address order,
                    const Numbers& x, const Numbers& dy, const Numbers& dx, Address dvalues,
                    int threads) {
  backward(loops(), lines_of(lines), batch_of(batch), pointer<const float>(values),
           pointer<const std::int32_t>(order), panels_of<const float>(x),
           panels_of<const float>(dy), panels_of<float>(dx), pointer<float>(dvalues), threads);
}

void bound_pairs(const Numbers& lines, const Numbers& batch, const Numbers& dy, const Numbers& x,
                 Address dvalues, int threads) {
  pairs(loops(), lines_of(lines), batch_of(batch), panels_of<const float>(dy),
        panels_of<const float>(x), pointer<float>(dvalues), threads);
}

void bound_gather_samples(const Numbers& in, const Numbers& batch, std::int64_t features,
                          Address out, int threads) {
  gather_samples(*current_set().products, panels_of<const float>(in), batch_of(batch), features,
                 pointer<float>(out), threads);
}

void bound_transpose(Address starts, Address others, std::int64_t lines, std::int64_t columns,
                     Address column_starts, Address column_lines, Address order) {
  transpose(pointer<const std::int32_t>(starts), pointer<const std::int32_t>(others), lines,
            columns, pointer<std::int32_t>(column_starts), pointer<std::int32_t>(column_lines),
            pointer<std::int32_t>(order));
}

void bound_merge(Address first, Address second, std::int64_t first_count,
                 std::int64_t second_count, Address merged, Address places) {
  merge(pointer<const std::int64_t>(first), pointer<const std::int64_t>(second), first_count,
        second_count, pointer<std::int64_t>(merged), pointer<std::int64_t>(places));
}

void bound_members(Address keys, Address known, std::int64_t count, std::int64_t known_count,
                   Address found) {
  members(pointer<const std::int64_t>(keys), pointer<const std::int64_t>(known), count, known_count,
          pointer<bool>(found));
}

void bound_cut(Address starts, Address others, std::int64_t lines, std::int64_t blocks,
               std::int64_t per_block, Address cuts, int threads) {
  cut(pointer<const std::int32_t>(starts), pointer<const std::int32_t>(others), lines, blocks,
      per_block, pointer<std::int32_t>(cuts), threads);
}

}  // namespace

void bind_connections(nb::module_& m) {
  m.def("connections_forward", &bound_forward, Release());
  m.def("connections_backward", &bound_backward, Release());
  m.def("connections_pairs", &bound_pairs, Release());
  m.def("connections_gather_samples", &bound_gather_samples, Release());
  m.def("connections_transpose", &bound_transpose, Release());
  m.def("connections_merge", &bound_merge, Release());
  m.def("connections_members", &bound_members, Release());
  m.def("connections_cut", &bound_cut, Release());
}

}  // namespace spartan
