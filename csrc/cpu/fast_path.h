// The fast path: one call from Python checks whether the tensors fit, a second one allocates the
// results and runs the kernel. The check must be quick, so it gives no reasons: a call that is
// refused goes through the operators, whose errors explain what is wrong.
#pragma once

#include <pybind11/pybind11.h>

#include "tensor.h"

namespace dk {

// Objects and functions of torch, set once by configure() and never freed.
struct Torch {
  // The only classes accepted: subclasses may intercept operations on their objects.
  PyTypeObject *tensor_class, *parameter_class;
  PyObject *is_neg, *requires_grad;  // a method of tensors; the name of a property
  PyObject* empty_strided;           // (size, stride, dtype) -> tensor on the CPU
  PyObject *int32, *float32, *float64;
  int32_t (*num_threads)(uint32_t*);
  const bool* forked;  // true in a child of fork(), which has none of the parent's threads
};
inline Torch torch{};

// The number of threads that kernels may use.
inline int threads() {
  uint32_t threads = 1;
  if (!*torch.forked && torch.num_threads(&threads))
    throw std::runtime_error("torch_get_num_threads failed");
  return int(threads);
}

// The view of a tensor; false for another class, for a tensor without memory (torch's ZeroTensor),
// and for one with the negative bit (a lazy negation, which a DLPack view does not show).
inline bool borrowed(pybind11::handle object, DLTensorAbi* t) {
  PyTypeObject* const kind = Py_TYPE(object.ptr());
  if (kind != torch.tensor_class && kind != torch.parameter_class) return false;
  if (exchange->borrow(object.ptr(), t)) {
    PyErr_Clear();
    return false;
  }
  if (!has_memory(*t)) return false;
  PyObject* const pending = PyObject_CallOneArg(torch.is_neg, object.ptr());
  if (!pending) PyErr_Clear();
  Py_XDECREF(pending);  // still comparable: Py_False is never freed
  return pending == Py_False;
}

inline bool requires_grad(pybind11::handle tensor) {
  PyObject* const required = PyObject_GetAttr(tensor.ptr(), torch.requires_grad);
  if (!required) throw pybind11::error_already_set();
  Py_DECREF(required);  // still comparable: Py_True is never freed
  return required == Py_True;
}

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
