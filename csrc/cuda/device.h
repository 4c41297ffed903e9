// The device vocabulary: everything that the kernels use beyond C++. nvcc compiles it for the GPU;
// with DK_EMULATE the host emulator of the tests stands in for it, and the kernels run as they are.
#pragma once

#include <stddef.h>

#include <type_traits>

#include "types.h"

#ifdef DK_EMULATE
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
// One block of dynamic shared memory for each kernel, 16-byte aligned for vector access.
#define DK_SHARED_MEMORY(T, name)                                    \
  extern __shared__ __align__(128) unsigned char dk_shared_memory[]; \
  T* const name = reinterpret_cast<T*>(dk_shared_memory)
#endif

#define DK_DEVICE __device__ __forceinline__

namespace dk {

constexpr unsigned kAllLanes = 0xffffffffu;

#ifndef DK_EMULATE
DK_DEVICE float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
DK_DEVICE float widen_f16(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
DK_DEVICE uint16_t narrow_f16(float f) { return __half_as_ushort(__float2half_rn(f)); }
DK_DEVICE uint16_t narrow_bf16(float f) { return __bfloat16_as_ushort(__float2bfloat16_rn(f)); }
#endif

DK_DEVICE float widen(float v) { return v; }
DK_DEVICE double widen(double v) { return v; }
DK_DEVICE float widen(bf16 v) { return float_of_bits(uint32_t(v.bits) << 16); }
DK_DEVICE float widen(f16 v) { return widen_f16(v.bits); }

DK_DEVICE void narrow(float f, float& to) { to = f; }
DK_DEVICE void narrow(double f, double& to) { to = f; }
DK_DEVICE void narrow(float f, bf16& to) { to.bits = narrow_bf16(f); }
DK_DEVICE void narrow(float f, f16& to) { to.bits = narrow_f16(f); }

// COUNT values side by side, moved by loads and stores of up to 16 bytes.
template <class T, int COUNT>
struct alignas(sizeof(T) * COUNT < 16 ? sizeof(T) * COUNT : 16) Vector {
  T value[COUNT];
};

// Read-only load through the texture path. nvcc needs builtin types to emit one wide load.
template <int BYTES>
struct Raw;
template <>
struct Raw<4> {
  using type = unsigned;
};
template <>
struct Raw<8> {
  using type = uint2;
};
template <>
struct Raw<16> {
  using type = uint4;
};

template <class V>
DK_DEVICE V load_readonly(const void* from) {
  constexpr int kPiece = sizeof(V) < 16 ? int(sizeof(V)) : 16, kPieces = int(sizeof(V)) / kPiece;
  using Piece = typename Raw<kPiece>::type;
  union {
    Piece piece[kPieces];
    V value;
  } u;
#pragma unroll
  for (int i = 0; i < kPieces; ++i) u.piece[i] = __ldg(static_cast<const Piece*>(from) + i);
  return u.value;
}

template <class A>
DK_DEVICE A leaky(A v, A slope) {
  return v > A(0) ? v : slope * v;  // a NaN stays one
}

}  // namespace dk
