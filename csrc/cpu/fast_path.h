// The fast path of a small layer: one call from Python says whether tensors fit, a second one
// allocates what the kernel writes. All of this runs before every call, so it gives no reasons: a
// call that is refused goes through the operators, which explain what is wrong.
#pragma once

#include <pybind11/pybind11.h>

#include "tensor.h"

namespace dk {

// Objects and functions of torch, besides its exchange table; set once by configure(), kept
// forever.
struct Torch {
  // Classes whose objects are nothing but tensors: subclasses may intercept what is done to them.
  PyTypeObject *tensor_class, *parameter_class;
  PyObject *is_neg, *requires_grad;  // the method of a tensor; the name of its property
  PyObject* empty_strided;           // (size, stride, dtype) -> tensor on the CPU
  PyObject *int32, *float32, *float64;
  int32_t (*num_threads)(uint32_t*);
  const bool* forked;  // a child made by fork() has none of its parent's threads
};
inline Torch torch{};

// As many as kernels may use.
inline int threads() {
  uint32_t threads = 1;
  if (!*torch.forked && torch.num_threads(&threads))
    throw std::runtime_error("torch_get_num_threads failed");
  return int(threads);
}

// A tensor's view, unless only Python can tell what is to be done with the object: it is of another
// class, or its sign is still to be flipped (DLPack does not say).
inline bool borrowed(pybind11::handle object, DLTensorAbi* t) {
  PyTypeObject* const kind = Py_TYPE(object.ptr());
  if (kind != torch.tensor_class && kind != torch.parameter_class) return false;
  if (exchange->borrow(object.ptr(), t)) {
    PyErr_Clear();
    return false;
  }
  PyObject* const pending = PyObject_CallOneArg(torch.is_neg, object.ptr());
  if (!pending) PyErr_Clear();
  Py_XDECREF(pending);  // a bool: it lives on
  return pending == Py_False;
}

inline bool requires_grad(pybind11::handle tensor) {
  PyObject* const required = PyObject_GetAttr(tensor.ptr(), torch.requires_grad);
  if (!required) throw pybind11::error_already_set();
  Py_DECREF(required);  // a bool: it lives on
  return required == Py_True;
}

// A pair of numbers as Python has it.
inline pybind11::object pair(int64_t first, int64_t second) {
  PyObject* const made = PyTuple_New(2);
  if (!made) throw pybind11::error_already_set();
  PyTuple_SET_ITEM(made, 0, PyLong_FromLongLong(first));
  PyTuple_SET_ITEM(made, 1, PyLong_FromLongLong(second));
  return pybind11::reinterpret_steal<pybind11::object>(made);
}

// An uninitialized tensor [rows, columns]; strides: pair(columns, 1).
inline pybind11::object new_tensor(int64_t rows, int64_t columns, const pybind11::object& strides,
                                   PyObject* dtype) {
  const pybind11::object size = pair(rows, columns);
  PyObject* const arguments[] = {size.ptr(), strides.ptr(), dtype};
  PyObject* const made = PyObject_Vectorcall(torch.empty_strided, arguments, 3, nullptr);
  if (!made) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(made);
}

}  // namespace dk
