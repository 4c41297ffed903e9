// Vectors of one ISA. GCC/Clang vector types let one source serve x86 and ARM. Intrinsics are used
// where compilers generate poor code from them: bits of comparisons, broadcasts and sums of lanes.
// Everything is in an unnamed namespace, so that each ISA unit has its own copy: a function shared
// between units could be linked with instructions that this CPU does not have.
//
// The compiler flags of a unit select its ISA. NEON is selected by DK_NEON, because every aarch64
// CPU has it and no flag distinguishes it from the portable code.
#pragma once

#include <stdint.h>
#include <string.h>

#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define DK_INLINE inline __attribute__((always_inline))
// Neither inlined nor cloned: GCC would compile copies for constant arguments.
#if defined(__clang__)
#define DK_COMPILED_ONCE __attribute__((noinline))
#else
#define DK_COMPILED_ONCE __attribute__((noinline, noclone))
#endif
// For lambdas of a kernel: in a call the vectors that they capture would be spilled to memory.
#define DK_LAMBDA __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
// Vectors of samples that a kernel holds in registers: forward this many for each of two dendrites,
// backward for x, dx and q. NEON has 32 registers and short vectors, so it uses twice as many.
#if defined(DK_NEON)
constexpr int kTileVectors = 8;
#else
constexpr int kTileVectors = 4;
#endif

// Vectors alias only numbers of their own type. A store that may alias anything could change a
// pointer or a size, so the compiler would reload them all after each store (5 % of forward).
template <class T>
struct Simd;
template <>
struct Simd<float> {
  typedef float vec __attribute__((vector_size(kVectorBytes)));
  typedef float unaligned __attribute__((vector_size(kVectorBytes), aligned(4)));
  typedef int32_t mask __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Simd<double> {
  typedef double vec __attribute__((vector_size(kVectorBytes)));
  typedef double unaligned __attribute__((vector_size(kVectorBytes), aligned(8)));
  typedef int64_t mask __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using vec = typename Simd<T>::vec;
template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));
// Lanes of a 128-bit block: shuffles inside blocks are cheap.
template <class T>
constexpr int kBlockLanes = 16 / int(sizeof(T));

// unroll<N>(f) calls f(constant 0) ... f(constant N-1). With an unroll pragma GCC 12 keeps arrays
// of vectors in memory instead of registers.
template <class F, int... I>
DK_INLINE void unroll_impl(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
DK_INLINE void unroll(F&& f) {
  unroll_impl(f, std::make_integer_sequence<int, N>{});
}

template <class T>
DK_INLINE vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::unaligned*>(p);
}
// Keeps v in a register: where two instructions use it, GCC would load it from memory twice.
template <class V>
DK_INLINE V in_register(V v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}
// Makes the compiler compute v here. For NEON, GCC moves such work past a branch, and its operands
// are spilled until then. On x86 this was not seen.
template <class V>
DK_INLINE V in_order(V v) {
#if defined(DK_NEON)
  asm volatile("" : "+w"(v));
#endif
  return v;
}
template <class T>
DK_INLINE void store(T* p, vec<T> v) {
  *reinterpret_cast<typename Simd<T>::unaligned*>(p) = v;
}
template <class T, int... I>
DK_INLINE vec<T> splat_impl(T x, std::integer_sequence<int, I...>) {
  return vec<T>{((void)I, x)...};
}
template <class T>
DK_INLINE vec<T> splat(T x) {
  return splat_impl<T>(x, std::make_integer_sequence<int, kLanes<T>>{});
}

// Loads or stores the first `count` lanes. Memory of the others is not touched; loaded ones are
// zero. Here and below, masked intrinsics are used even for whole vectors: the plain ones start
// from an undefined vector, which GCC 12 warns about and which depends on the old value of the
// register.
template <class T>
DK_INLINE vec<T> load_part(const T* p, int count) {
#if defined(__AVX512F__)
  const __mmask16 on = __mmask16((1u << count) - 1);
  if constexpr (sizeof(T) == 4)
    return (vec<T>)_mm512_maskz_loadu_ps(on, p);
  else
    return (vec<T>)_mm512_maskz_loadu_pd(__mmask8(on), p);
#else
  if (count == kLanes<T>) return load(p);
  vec<T> v{};
  for (int i = 0; i < count; ++i) v[i] = p[i];
  return v;
#endif
}
template <class T>
DK_INLINE void store_part(T* p, vec<T> v, int count) {
#if defined(__AVX512F__)
  const __mmask16 on = __mmask16((1u << count) - 1);
  if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_ps(p, on, (__m512)v);
  else
    _mm512_mask_storeu_pd(p, __mmask8(on), (__m512d)v);
#else
  if (count == kLanes<T>) return store(p, v);
  for (int i = 0; i < count; ++i) p[i] = v[i];
#endif
}

// base[index[i]] in lane i < count, zero in the others. Index is int32 or uint16.
template <class T, class Index>
DK_INLINE vec<T> gather_part(const T* base, const Index* index, int count) {
#if defined(__AVX512F__)
  const __mmask16 on = __mmask16((1u << count) - 1);
  if constexpr (sizeof(T) == 4) {
    __m512i at;
    if constexpr (sizeof(Index) == 2)
      at = _mm512_maskz_cvtepu16_epi32(on, _mm256_maskz_loadu_epi16(on, index));
    else
      at = _mm512_maskz_loadu_epi32(on, index);
    return (vec<T>)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), on, at, base, 4);
  } else {
    __m256i at;
    if constexpr (sizeof(Index) == 2)
      at = _mm256_maskz_cvtepu16_epi32(__mmask8(on), _mm_maskz_loadu_epi16(__mmask8(on), index));
    else
      at = _mm256_maskz_loadu_epi32(__mmask8(on), index);
    return (vec<T>)_mm512_mask_i32gather_pd(_mm512_setzero_pd(), __mmask8(on), at, base, 8);
  }
#else
  vec<T> v{};
  for (int i = 0; i < count; ++i) v[i] = base[index[i]];
  return v;
#endif
}

// base[index[i]] in lane i.
template <class T, class Index>
DK_INLINE vec<T> gather(const T* base, const Index* index) {
#if defined(__AVX512F__)
  return gather_part(base, index, kLanes<T>);
#elif defined(__AVX2__)
  const __m256i all = _mm256_set1_epi32(-1);
  if constexpr (sizeof(T) == 4) {
    __m256i at;
    if constexpr (sizeof(Index) == 2)
      at = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)index));
    else
      at = _mm256_loadu_si256((const __m256i*)index);
    return (vec<T>)_mm256_mask_i32gather_ps(_mm256_setzero_ps(), base, at, (__m256)all, 4);
  } else {
    __m128i at;
    if constexpr (sizeof(Index) == 2)
      at = _mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i*)index));
    else
      at = _mm_loadu_si128((const __m128i*)index);
    return (vec<T>)_mm256_mask_i32gather_pd(_mm256_setzero_pd(), base, at, (__m256d)all, 8);
  }
#else
  return gather_part(base, index, kLanes<T>);
#endif
}

// ---- bits <-> lanes ----

// Bit i of the result is set where lane i of u is positive.
template <class T>
DK_INLINE uint32_t positive_bits(vec<T> u) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return _mm512_cmp_ps_mask((__m512)u, _mm512_setzero_ps(), _CMP_GT_OQ);
  else
    return _mm512_cmp_pd_mask((__m512d)u, _mm512_setzero_pd(), _CMP_GT_OQ);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    return uint32_t(_mm256_movemask_ps((__m256)(u > vec<T>{})));
  else
    return uint32_t(_mm256_movemask_pd((__m256d)(u > vec<T>{})));
#elif defined(__x86_64__)
  if constexpr (sizeof(T) == 4)
    return uint32_t(_mm_movemask_ps((__m128)(u > vec<T>{})));
  else
    return uint32_t(_mm_movemask_pd((__m128d)(u > vec<T>{})));
#else
  uint32_t bits = 0;
  typename Simd<T>::mask m = u > vec<T>{};
  for (int i = 0; i < kLanes<T>; ++i) bits |= uint32_t(m[i] & 1) << i;
  return bits;
#endif
}

template <class T, int... I>
DK_INLINE typename Simd<T>::mask lane_bits_impl(std::integer_sequence<int, I...>) {
  return typename Simd<T>::mask{(1 << I)...};
}
// Bit i in lane i.
template <class T>
DK_INLINE typename Simd<T>::mask lane_bits() {
  return lane_bits_impl<T>(std::make_integer_sequence<int, kLanes<T>>{});
}

// The same for V vectors; the bits of the first are the lowest.
template <class T, int V>
DK_INLINE uint32_t positive_bits(const vec<T>* u) {
#if defined(DK_NEON)
  // Every lane collects one bit of each vector, so that the slow sum over lanes is needed only
  // once.
  const auto bits = [&](int t) DK_LAMBDA { return (u[t] > vec<T>{}) & lane_bits<T>(); };
  auto collected = bits(V - 1);
  unroll<V - 1>([&](auto i) DK_LAMBDA {
    constexpr int kShift = kLanes<T>;
    if constexpr (sizeof(T) == 4)
      collected = (decltype(collected))vsliq_n_s32((int32x4_t)bits(V - 2 - i), (int32x4_t)collected,
                                                   kShift);
    else
      collected = (decltype(collected))vsliq_n_s64((int64x2_t)bits(V - 2 - i), (int64x2_t)collected,
                                                   kShift);
  });
  if constexpr (sizeof(T) == 4)
    return uint32_t(vaddvq_s32((int32x4_t)collected));
  else
    return uint32_t(vaddvq_s64((int64x2_t)collected));
#else
  uint32_t bits = 0;
  unroll<V>([&](auto t) DK_LAMBDA { bits |= positive_bits<T>(u[t]) << (t * kLanes<T>); });
  return bits;
#endif
}

// Lane i is `set` where bit i is 1, `clear` where it is 0. Bits past the lanes are ignored.
template <class T>
DK_INLINE vec<T> select_bits(uint32_t bits, vec<T> set, vec<T> clear) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return (vec<T>)_mm512_mask_blend_ps(__mmask16(bits), (__m512)clear, (__m512)set);
  else
    return (vec<T>)_mm512_mask_blend_pd(__mmask8(bits), (__m512d)clear, (__m512d)set);
#else
  using mask = typename Simd<T>::mask;
  return ((mask{} + int32_t(bits)) & lane_bits<T>()) != 0 ? set : clear;
#endif
}

// The same for V vectors that share one word; the bits of the first are the lowest.
template <class T, int V>
DK_INLINE void select_bits(uint32_t bits, const vec<T>* set, const vec<T>* clear, vec<T>* out) {
  using mask = typename Simd<T>::mask;
  const mask all = mask{} + int32_t(bits);
  unroll<V>([&](auto t) DK_LAMBDA {
    out[t] = (all & lane_bits<T>() << (t * kLanes<T>)) != 0 ? set[t] : clear[t];
  });
}

}  // namespace
