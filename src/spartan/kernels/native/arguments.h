// Tensors as Python passes them, checked once a call: dtype, device, shape and order in memory.
//
// They are read through the attributes that torch.Tensor has in Python, so that no torch header is
// needed and one build serves every torch version. Reading takes place under the interpreter's
// lock, as arguments are converted; what is wrong is told by `require`, with the argument's name.

#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "tensors.h"

namespace spartan {

namespace nb = nanobind;

using Sizes = std::vector<std::int64_t>;
using Release = nb::call_guard<nb::gil_scoped_release>;

// The name of T among torch's dtypes. Unsigned 16-bit numbers travel as int16.
template <class T>
struct DtypeOf;
template <>
struct DtypeOf<float> {
  static constexpr const char* name = "float32";
};
template <>
struct DtypeOf<bool> {
  static constexpr const char* name = "bool";
};
template <>
struct DtypeOf<std::uint16_t> {
  static constexpr const char* name = "int16";
};
template <>
struct DtypeOf<std::int32_t> {
  static constexpr const char* name = "int32";
};
template <>
struct DtypeOf<std::int64_t> {
  static constexpr const char* name = "int64";
};

// What is known of one tensor. `strides` is empty if it is contiguous.
struct TensorFacts {
  std::uintptr_t address = 0;
  std::int64_t size = 0;
  Sizes strides;
  bool gaps = false;    // its entries do not fill one run of memory
  std::string problem;  // empty if it is a tensor of the dtype, on the CPU
};

// Reads a tensor; never raises.
TensorFacts read_tensor(nb::handle tensor, const char* dtype) noexcept;
// Empty if they cannot be read.
Sizes read_shape(nb::handle tensor) noexcept;
Sizes read_strides(nb::handle tensor) noexcept;

[[noreturn]] void refuse(const std::string& argument, const std::string& problem);

inline void require(bool condition, const char* argument, const char* problem) {
  if (!condition) refuse(argument, problem);
}

// A contiguous tensor, seen as one run of entries.
template <class T>
struct Flat {
  T* data = nullptr;
  std::int64_t size = 0;
  std::string problem;
  nb::object owner;  // keeps the memory, where a call stores what it is given

  const Flat& checked(const char* name) const {
    if (!problem.empty()) refuse(name, problem);
    return *this;
  }
  const Flat& checked(const char* name, std::int64_t wanted) const {
    checked(name);
    if (size != wanted)
      refuse(name, "has " + std::to_string(size) + " entries, not " + std::to_string(wanted));
    return *this;
  }
};

// A tensor with its shape and strides.
template <class T>
struct View {
  T* data = nullptr;
  Sizes shape, strides;
  std::string problem;

  const View& checked(const char* name, const Sizes& wanted) const {
    if (!problem.empty()) refuse(name, problem);
    if (shape != wanted) refuse(name, "has another shape than it must have");
    return *this;
  }
  // Whether entries lie at these strides; those of dimensions of one entry do not matter.
  bool lies_at(const Sizes& wanted) const {
    for (std::size_t d = 0; d < shape.size(); ++d)
      if (shape[d] > 1 && strides[d] != wanted[d]) return false;
    return true;
  }
  const View& checked(const char* name, std::size_t dimensions) const {
    if (!problem.empty()) refuse(name, problem);
    if (shape.size() != dimensions)
      refuse(name, "must have " + std::to_string(dimensions) + " dimensions");
    return *this;
  }
};

// Tensors whose entries are visited in the order of memory.
template <class T>
struct List {
  Pointers addresses;
  Sizes sizes;
  std::vector<Sizes> strides;  // of each, empty where it is contiguous
  std::string problem;
  nb::object owner;  // keeps the tensors while the interpreter's lock is released

  const List& checked(const char* name) const {
    if (!problem.empty()) refuse(name, problem);
    return *this;
  }
};

// Refuses `starts` unless they rise from 0 to `end`.
template <class T>
void require_rising(const Flat<T>& starts, std::int64_t end, const char* name) {
  bool sound = starts.size > 0 && starts.data[0] == 0 && starts.data[starts.size - 1] == end;
  for (std::int64_t i = 1; sound && i < starts.size; ++i)
    sound = starts.data[i - 1] <= starts.data[i];
  require(sound, name, "must rise from 0 to the number of entries");
}

// A number of threads: at least one.
struct Threads {
  int count = 1;
  operator int() const { return count; }
};

// Refuses `list` unless its tensors have the sizes and the memory order of those of `like`.
template <class T, class U>
void require_alike(const List<T>& list, const char* name, const List<U>& like) {
  list.checked(name);
  if (list.sizes != like.sizes) refuse(name, "has other sizes than the first list of tensors");
  if (list.strides != like.strides)
    refuse(name, "lies in another memory order than the first list");
}

}  // namespace spartan

namespace nanobind::detail {

template <class T>
struct type_caster<spartan::Flat<T>> {
  NB_TYPE_CASTER(spartan::Flat<T>, const_name("torch.Tensor"))

  bool from_python(handle source, std::uint8_t, cleanup_list*) noexcept {
    spartan::TensorFacts facts = spartan::read_tensor(source, spartan::DtypeOf<T>::name);
    value.data = reinterpret_cast<T*>(facts.address);
    value.size = facts.size;
    value.problem = std::move(facts.problem);
    if (value.problem.empty() && !facts.strides.empty()) value.problem = "must be contiguous";
    value.owner = borrow(source);
    return true;
  }
};

template <class T>
struct type_caster<spartan::View<T>> {
  NB_TYPE_CASTER(spartan::View<T>, const_name("torch.Tensor"))

  bool from_python(handle source, std::uint8_t, cleanup_list*) noexcept {
    spartan::TensorFacts facts = spartan::read_tensor(source, spartan::DtypeOf<T>::name);
    value.data = reinterpret_cast<T*>(facts.address);
    value.problem = std::move(facts.problem);
    if (value.problem.empty()) {
      value.shape = spartan::read_shape(source);
      value.strides = spartan::read_strides(source);
    }
    return true;
  }
};

template <>
struct type_caster<spartan::Threads> {
  NB_TYPE_CASTER(spartan::Threads, const_name("int"))

  bool from_python(handle source, std::uint8_t, cleanup_list*) noexcept {
    const long count = PyLong_Check(source.ptr()) ? PyLong_AsLong(source.ptr()) : 0;
    if (PyErr_Occurred()) PyErr_Clear();
    value.count = static_cast<int>(count);
    return 0 < count && count < 1 << 16;
  }
};

template <class T>
struct type_caster<spartan::List<T>> {
  NB_TYPE_CASTER(spartan::List<T>, const_name("collections.abc.Sequence[torch.Tensor]"))

  bool from_python(handle source, std::uint8_t, cleanup_list*) noexcept {
    PyObject* items = PySequence_Tuple(source.ptr());
    if (!items) {
      PyErr_Clear();
      return false;
    }
    value.owner = steal(items);
    const Py_ssize_t count = PyTuple_GET_SIZE(items);
    value.addresses.reserve(count);
    value.sizes.reserve(count);
    value.strides.reserve(count);
    for (Py_ssize_t i = 0; i < count && value.problem.empty(); ++i) {
      handle item = PyTuple_GET_ITEM(items, i);
      spartan::TensorFacts facts = spartan::read_tensor(item, spartan::DtypeOf<T>::name);
      value.addresses.push_back(facts.address);
      value.sizes.push_back(facts.size);
      value.strides.push_back(std::move(facts.strides));
      if (facts.gaps) facts.problem = "must fill its memory without gaps";
      if (!facts.problem.empty()) value.problem = std::to_string(i) + ": " + facts.problem;
    }
    return true;
  }
};

}  // namespace nanobind::detail
