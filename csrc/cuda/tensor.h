// Device tensors from Python: the checks between a Python object and a pointer that a kernel reads.
#pragma once

#include "../cpu/tensor.h"
#include "types.h"

namespace dk {

// DLPack type code and bits of what the kernels store.
template <class T>
struct DType;
#define DK_DTYPE(T, CODE, NAME)                                 \
  template <>                                                   \
  struct DType<T> {                                             \
    static constexpr uint8_t code = CODE, bits = 8 * sizeof(T); \
    static constexpr const char* name = NAME;                   \
  }
DK_DTYPE(int16_t, 0, "int16");
DK_DTYPE(int32_t, 0, "int32");
DK_DTYPE(f16, 2, "float16");
DK_DTYPE(float, 2, "float32");
DK_DTYPE(double, 2, "float64");
DK_DTYPE(bf16, 4, "bfloat16");
#undef DK_DTYPE

template <class T>
bool is_type(const DLTensorAbi& t) {
  return t.type_code == DType<T>::code && t.type_bits == DType<T>::bits && t.type_lanes == 1;
}

#ifdef DK_EMULATE
constexpr int32_t kDeviceType = 1;  // CPU
#else
constexpr int32_t kDeviceType = 2;  // CUDA
#endif

// Checks the tensors of one call: contiguous, of the expected type and shape, all on one device.
class Checker {
 public:
  int device() const { return device_; }

  template <class T>
  T* pointer(pybind11::handle object, const char* name, std::initializer_list<int64_t> shape,
             int alignment = 1) {
    const DLTensorAbi t = borrow(object, name);
    const std::string prefix = std::string(name) + ": Expected ";
    if (!is_type<T>(t))
      throw pybind11::type_error(prefix + "dtype " + DType<T>::name + ", got another dtype");
    bool same = t.ndim == int32_t(shape.size());
    for (int32_t i = 0; same && i < t.ndim; ++i) same = t.shape[i] == shape.begin()[i];
    if (!same)
      throw pybind11::value_error(prefix + "shape " +
                                  shape_text(shape.begin(), int64_t(shape.size())) + ", got " +
                                  shape_text(t.shape, t.ndim));
    int64_t elements = 1;
    bool contiguous = true;
    for (int32_t i = t.ndim; i-- > 0;) {
      if (t.strides && t.shape[i] > 1 && t.strides[i] != elements) contiguous = false;
      elements *= t.shape[i];
    }
    if (!contiguous && elements > 0)
      throw pybind11::value_error(prefix + "a contiguous tensor, got a strided one");
    check_device(t, prefix);
    char* data = static_cast<char*>(t.data) + t.byte_offset;
    if (reinterpret_cast<uintptr_t>(data) % alignment)
      throw pybind11::value_error(prefix + std::to_string(alignment) +
                                  "-byte alignment, got another address");
    return reinterpret_cast<T*>(data);
  }

  template <class T>
  T* pointer_or_null(pybind11::handle object, const char* name,
                     std::initializer_list<int64_t> shape, int alignment = 1) {
    return object.is_none() ? nullptr : pointer<T>(object, name, shape, alignment);
  }

 private:
  void check_device(const DLTensorAbi& t, const std::string& prefix) {
    if (t.device_type != kDeviceType)
      throw pybind11::value_error(prefix + "a CUDA tensor, got one on another kind of device");
    if (device_ >= 0 && t.device_id != device_)
      throw pybind11::value_error(prefix + "device " + std::to_string(device_) + ", got device " +
                                  std::to_string(t.device_id));
    device_ = t.device_id;
  }
  int device_ = -1;
};

}  // namespace dk
