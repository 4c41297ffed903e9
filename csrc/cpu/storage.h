// How samples are stored: in the type that kernels compute with, or as bfloat16 or float16. These
// are widened to float32 when a tile is made and rounded (to nearest even) when results are stored.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "simd.h"

namespace {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Integers as wide as floats, one for each lane.
using Words = Simd<float>::mask;
typedef uint32_t Unsigned __attribute__((vector_size(kVectorBytes)));
// Half a vector of 16-bit numbers, at any address.
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t HalvesAt __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));

// The nearest bfloat16 in the high half of each lane; ignore the low half. NaN stays NaN.
DK_INLINE Unsigned round_to_bf16(vec<float> v) {
  const Unsigned bits = (Unsigned)v;
  const Unsigned rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return (v == v) ? rounded : (bits | 0x400000);
}

DK_INLINE float widen(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float v;
  memcpy(&v, &bits, 4);
  return v;
}
DK_INLINE bf16 narrow(float v, bf16) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  bits = v == v ? bits + 0x7fff + ((bits >> 16) & 1) : (bits | 0x400000);
  return {uint16_t(bits >> 16)};
}

// float16 without special instructions. Subnormal numbers are integers times 2^-24. The last bit of
// a float32 between 0.5 and 1 is worth 2^-24 too, so adding 0.5 rounds to such an integer.
DK_INLINE float widen(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  float v;
  if (rest < 0x400) {
    v = float(rest) * 0x1p-24f;
  } else {
    const uint32_t bits = (rest << 13) + (rest < 0x7c00 ? 0x38000000 : 0x70000000);
    memcpy(&v, &bits, 4);
  }
  uint32_t bits;
  memcpy(&bits, &v, 4);
  bits |= sign;
  memcpy(&v, &bits, 4);
  return v;
}
DK_INLINE f16 narrow(float v, f16) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  const uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  uint32_t half;
  if (bits > 0x7f800000) {
    half = 0x7e00;  // NaN
  } else if (bits >= 0x477ff000) {
    half = 0x7c00;  // rounds to infinity
  } else if (bits < 0x38800000) {
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    memcpy(&half, &magnitude, 4);
    half -= 0x3f000000;
  } else {
    half = (bits + 0xfff + ((bits >> 13) & 1) - 0x38000000) >> 13;
  }
  return {uint16_t(sign | half)};
}

template <class T>
DK_INLINE vec<T> load_samples(const T* p) {
  return load(p);
}
DK_INLINE vec<float> load_samples(const bf16* p) {
  const Halves halves = *reinterpret_cast<const HalvesAt*>(p);
  return (vec<float>)(__builtin_convertvector(halves, Unsigned) << 16);
}
DK_INLINE vec<float> load_samples(const f16* p) {
#if defined(__AVX512F__)
  return (vec<float>)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(__aarch64__)
  return (vec<float>)vcvt_f32_f16(vld1_f16((const float16_t*)p));
#else
  vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = widen(p[i]);
  return v;
#endif
}

template <class T>
DK_INLINE void store_samples(T* p, vec<T> v) {
  store(p, v);
}
DK_INLINE void store_samples(bf16* p, vec<float> v) {
  *reinterpret_cast<HalvesAt*>(p) = __builtin_convertvector(round_to_bf16(v) >> 16, Halves);
}
DK_INLINE void store_samples(f16* p, vec<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtps_ph(0xffff, (__m512)v, 0));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, 0));
#elif defined(__aarch64__)
  vst1_f16((float16_t*)p, vcvt_f16_f32((float32x4_t)v));
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i] = narrow(v[i], f16{});
#endif
}

template <class T>
DK_INLINE T load_sample(const T* p) {
  return *p;
}
DK_INLINE float load_sample(const bf16* p) { return widen(*p); }
DK_INLINE float load_sample(const f16* p) { return widen(*p); }

template <class T>
DK_INLINE void store_sample(T* p, T v) {
  *p = v;
}
DK_INLINE void store_sample(bf16* p, float v) { *p = narrow(v, bf16{}); }
DK_INLINE void store_sample(f16* p, float v) { *p = narrow(v, f16{}); }

// Calls f with a null pointer whose type is that of the stored samples.
template <class T, class F>
DK_INLINE void with_storage(dk::Storage storage, const F& f) {
  if constexpr (sizeof(T) == 4) {
    if (storage == dk::Storage::bf16) return f(static_cast<bf16*>(nullptr));
    if (storage == dk::Storage::f16) return f(static_cast<f16*>(nullptr));
  }
  f(static_cast<T*>(nullptr));
}

}  // namespace
