// What the binding asks of the CUDA runtime: the current device, its limits, versions.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>

#ifdef DK_EMULATE
#include "emulator.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace dk {

#ifdef DK_EMULATE
struct DeviceGuard {
  explicit DeviceGuard(int) {}
};
#else
inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// Makes the tensors' device current for the launch.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_));
    if (device != previous_) check(cudaSetDevice(device));
    moved_ = device != previous_;
  }
  ~DeviceGuard() {
    if (moved_) cudaSetDevice(previous_);
  }

 private:
  int previous_ = 0;
  bool moved_ = false;
};

inline int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

inline pybind11::tuple limits(int device) {
  return pybind11::make_tuple(attribute(cudaDevAttrMultiProcessorCount, device),
                              attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                              attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
                              attribute(cudaDevAttrL2CacheSize, device));
}

inline int version(cudaError_t (*ask)(int*)) {
  int value = 0;
  check(ask(&value));
  return value;
}
#endif

}  // namespace dk
