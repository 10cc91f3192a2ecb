// Reading torch tensors through their attributes in Python.

#include "arguments.h"

#include <algorithm>
#include <numeric>

namespace spartan {
namespace {

// Names that are looked up at every call, made once and never destroyed.
PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

PyObject* attribute(PyObject* object, PyObject* name) {
  PyObject* found = PyObject_GetAttr(object, name);
  if (!found) PyErr_Clear();
  return found;
}

PyObject* call(PyObject* object, PyObject* method) {
  PyObject* found = PyObject_CallMethodNoArgs(object, method);
  if (!found) PyErr_Clear();
  return found;
}

bool is_true(PyObject* value) {
  const bool found = value == Py_True;
  Py_XDECREF(value);
  return found;
}

std::int64_t number(PyObject* value, bool& ok) {
  const std::int64_t found = value ? PyLong_AsLongLong(value) : -1;
  if (!value || PyErr_Occurred()) {
    PyErr_Clear();
    ok = false;
  }
  Py_XDECREF(value);
  return found;
}

Sizes numbers(PyObject* tuple) {
  Sizes found;
  if (tuple && PyTuple_Check(tuple))
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); ++i)
      found.push_back(PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i)));
  Py_XDECREF(tuple);
  PyErr_Clear();
  return found;
}

// torch.float32 and its like, by name; a handful of them.
PyObject* dtype_object(const char* name) {
  static std::vector<std::pair<std::string, PyObject*>> known;
  for (const auto& [known_name, object] : known)
    if (known_name == name) return object;
  PyObject* torch = PyImport_ImportModule("torch");
  PyObject* object = torch ? PyObject_GetAttrString(torch, name) : nullptr;
  Py_XDECREF(torch);
  if (!object) PyErr_Clear();
  known.emplace_back(name, object);
  return object;
}

// Whether the entries fill one run of memory, in whichever order of dimensions.
bool fills_memory(const Sizes& shape, const Sizes& strides) {
  std::vector<std::size_t> order(shape.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](std::size_t a, std::size_t b) { return strides[a] < strides[b]; });
  std::int64_t run = 1;
  for (const std::size_t d : order) {
    if (shape[d] == 1) continue;
    if (strides[d] != run) return false;
    run *= shape[d];
  }
  return true;
}

}  // namespace

void refuse(const std::string& argument, const std::string& problem) {
  throw std::invalid_argument(argument + " " + problem);
}

Sizes read_shape(nb::handle tensor) noexcept {
  static PyObject* name = interned("size");
  return numbers(call(tensor.ptr(), name));
}

Sizes read_strides(nb::handle tensor) noexcept {
  static PyObject* name = interned("stride");
  return numbers(call(tensor.ptr(), name));
}

TensorFacts read_tensor(nb::handle tensor, const char* dtype) noexcept {
  static PyObject* dtype_name = interned("dtype");
  static PyObject* is_cpu = interned("is_cpu");
  static PyObject* is_contiguous = interned("is_contiguous");
  static PyObject* numel = interned("numel");
  static PyObject* data_ptr = interned("data_ptr");
  TensorFacts facts;
  PyObject* object = tensor.ptr();
  PyObject* found = attribute(object, dtype_name);
  const bool fits = found && found == dtype_object(dtype);
  Py_XDECREF(found);
  if (!fits) {
    facts.problem = std::string("must be a tensor of torch.") + dtype;
    return facts;
  }
  if (!is_true(attribute(object, is_cpu))) {
    facts.problem = "must be on the CPU";
    return facts;
  }
  if (!is_true(call(object, is_contiguous))) {
    facts.strides = read_strides(tensor);
    const Sizes shape = read_shape(tensor);
    if (facts.strides.size() != shape.size()) {
      facts.problem = "must be strided, not sparse";
      return facts;
    }
    facts.gaps = !fills_memory(shape, facts.strides);
  }
  bool ok = true;
  facts.size = number(call(object, numel), ok);
  facts.address = static_cast<std::uintptr_t>(number(call(object, data_ptr), ok));
  if (!ok) facts.problem = "has no memory that can be read";
  return facts;
}

}  // namespace spartan
