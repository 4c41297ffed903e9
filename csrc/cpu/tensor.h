// Tensors from Python without linking to torch: the structures of the DLPack exchange ABI
// (dlpack.org, version 1.x) that are needed to borrow a tensor, and the checks before a raw pointer
// is used.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <string>

namespace dk {

struct DLTensorAbi {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct DLExchangeAbi {
  uint32_t major, minor;
  const DLExchangeAbi* previous;
  void *allocate, *from_object, *to_object;
  int (*borrow)(void* object, DLTensorAbi* out);  // a view, valid while the tensor lives
  void* current_stream;
};

struct Type {
  uint8_t code, bits;  // of DLPack
  const char* name;
};
constexpr Type kInt32{0, 32, "int32"}, kFloat32{2, 32, "float32"}, kFloat64{2, 64, "float64"},
    kFloat16{2, 16, "float16"}, kBfloat16{4, 16, "bfloat16"};

inline bool has_type(const DLTensorAbi& t, Type type) {
  return t.type_code == type.code && t.type_bits == type.bits && t.type_lanes == 1;
}

// The table behind torch.Tensor.__dlpack_c_exchange_api__, set once by configure().
inline const DLExchangeAbi* exchange = nullptr;

inline DLTensorAbi borrow(pybind11::handle object, const char* name) {
  DLTensorAbi t;
  if (exchange && !exchange->borrow(object.ptr(), &t)) return t;
  PyErr_Clear();
  if (!exchange || !PyObject_HasAttrString(object.ptr(), "__dlpack__"))
    throw pybind11::type_error(std::string(name) + ": Expected a torch.Tensor, got " +
                               Py_TYPE(object.ptr())->tp_name);
  if (exchange->borrow(object.ptr(), &t))
    throw pybind11::error_already_set();  // the error of torch
  return t;
}

inline std::string shape_text(const int64_t* shape, int64_t ndim) {
  std::string text = "[";
  for (int64_t i = 0; i < ndim; ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

constexpr int32_t kCpu = 1;

inline bool has_shape(const DLTensorAbi& t, std::initializer_list<int64_t> shape) {
  bool same = t.ndim == int32_t(shape.size());
  for (int32_t i = 0; same && i < t.ndim; ++i) same = t.shape[i] == shape.begin()[i];
  return same;
}

inline bool is_empty(const DLTensorAbi& t) {
  bool empty = false;
  for (int32_t i = 0; i < t.ndim; ++i) empty |= t.shape[i] == 0;
  return empty;
}

inline bool is_contiguous(const DLTensorAbi& t) {
  int64_t stride = 1;
  bool contiguous = true;
  for (int32_t i = t.ndim; i-- > 0;) {
    if (t.strides && t.shape[i] != 1 && t.strides[i] != stride) contiguous = false;
    stride *= t.shape[i];
  }
  return contiguous || is_empty(t);
}

// False for torch's ZeroTensor.
inline bool has_memory(const DLTensorAbi& t) { return t.data || is_empty(t); }

// Whether t is a contiguous CPU tensor of exactly this type and shape.
inline bool fits(const DLTensorAbi& t, Type type, std::initializer_list<int64_t> shape) {
  return t.device_type == kCpu && has_type(t, type) && has_shape(t, shape) && is_contiguous(t) &&
         has_memory(t);
}

// Throws the reason why t does not fit.
[[noreturn]] inline void refuse(const DLTensorAbi& t, const char* name, Type type,
                                std::initializer_list<int64_t> shape) {
  if (t.device_type != kCpu)
    throw pybind11::value_error(std::string(name) + ": Expected a CPU tensor, got another device");
  if (!has_type(t, type))
    throw pybind11::type_error(std::string(name) + ": Expected dtype " + type.name +
                               ", got another dtype");
  if (!has_shape(t, shape))
    throw pybind11::value_error(std::string(name) + ": Expected shape " +
                                shape_text(shape.begin(), int64_t(shape.size())) + ", got " +
                                shape_text(t.shape, t.ndim));
  if (!has_memory(t))
    throw pybind11::value_error(std::string(name) + ": Expected a tensor in memory, got none");
  throw pybind11::value_error(std::string(name) +
                              ": Expected a contiguous tensor, got a strided one");
}

// Pointer to the data of a tensor; throws unless it fits.
inline void* checked(pybind11::handle object, const char* name, Type type,
                     std::initializer_list<int64_t> shape) {
  const DLTensorAbi t = borrow(object, name);
  if (!fits(t, type, shape)) refuse(t, name, type, shape);
  return static_cast<char*>(t.data) + t.byte_offset;
}

template <class T>
T* pointer(pybind11::handle object, const char* name, std::initializer_list<int64_t> shape) {
  constexpr Type type = sizeof(T) == 8 ? kFloat64 : kFloat32;
  return static_cast<T*>(checked(object, name, type, shape));
}

template <class T>
T* pointer_or_null(pybind11::handle object, const char* name,
                   std::initializer_list<int64_t> shape) {
  return object.is_none() ? nullptr : pointer<T>(object, name, shape);
}

}  // namespace dk
