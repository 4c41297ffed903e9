// Operations across the lanes of vectors: broadcasts, sums, transposes.
#pragma once

#include "simd.h"

namespace {

template <class V, class F, int... I>
DK_INLINE V shuffle_impl(V a, V b, F, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, F::source(I)...);
}
// Low/high halves of each 128-bit block of a and b, interleaved in units of W lanes.
template <class T, int W, bool High>
struct Unpack {
  static constexpr int L = kBlockLanes<T>, V = kLanes<T>;
  static constexpr int source(int i) {
    const int block = i / L, unit = (i % L) / W, lane = i % W;
    return (unit % 2 ? V : 0) + block * L + (High ? L / 2 : 0) + (unit / 2) * W + lane;
  }
};
// Lane J of a 128-bit block, in every lane of that block.
template <class T, int J>
struct Lane {
  static constexpr int source(int i) { return i / kBlockLanes<T> * kBlockLanes<T> + J; }
};
// The even/odd 128-bit blocks of a, then those of b.
template <class T, int Odd>
struct Blocks {
  static constexpr int L = kBlockLanes<T>, V = kLanes<T>;
  static constexpr int source(int i) {
    const int block = (i / L) * 2 + Odd;
    return block * L + i % L;  // blocks past a's last one are b's
  }
};
template <class T, class F>
DK_INLINE vec<T> shuffle(vec<T> a, vec<T> b, F f) {
  return shuffle_impl(a, b, f, std::make_integer_sequence<int, kLanes<T>>{});
}

// kBlockLanes numbers, repeated in every 128-bit block: with `splat_lane` one load is enough for
// several broadcasts. Intrinsics, because GCC 12 compiles the generic shuffle to scalar code.
template <class T>
DK_INLINE vec<T> load_block(const T* p) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return (vec<T>)_mm512_maskz_broadcast_f32x4(0xffff, _mm_loadu_ps(p));
  else
    return (vec<T>)_mm512_maskz_broadcast_f64x2(0xff, _mm_loadu_pd(p));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    return (vec<T>)_mm256_broadcast_ps((const __m128*)p);
  else
    return (vec<T>)_mm256_broadcast_pd((const __m128d*)p);
#else
  return load(p);
#endif
}
// Lane J of each 128-bit block, in every lane of that block.
template <class T, int J>
DK_INLINE vec<T> splat_lane(vec<T> block) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return (vec<T>)_mm512_maskz_permute_ps(0xffff, (__m512)block, J * 0x55);
  else
    return (vec<T>)_mm512_maskz_permute_pd(0xff, (__m512d)block, J * 0xff);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    return (vec<T>)_mm256_permute_ps((__m256)block, J * 0x55);
  else
    return (vec<T>)_mm256_permute_pd((__m256d)block, J * 0xf);
#else
  return shuffle<T>(block, block, Lane<T, J>{});
#endif
}

// Halve the number of lanes that a sum is spread over: the building blocks of transposing
// reductions, W = 1 before W = 2. AVX2 has more ports for a blend than for a shuffle, so there one
// of two shuffles is a blend. It pairs other lanes than an unpack does.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr bool kBlends = true;
template <class T, int W>
DK_INLINE vec<T> fold_units(vec<T> a, vec<T> b) {
  const __m256 v = (__m256)a, w = (__m256)b;
  if constexpr (sizeof(T) == 8)
    return shuffle<T>(a, b, Unpack<T, 1, false>{}) + shuffle<T>(a, b, Unpack<T, 1, true>{});
  else if constexpr (W == 1)  // in each block: a0 + a2, a1 + a3, b2 + b0, b3 + b1
    return (vec<T>)_mm256_blend_ps(v, w, 0xcc) + (vec<T>)_mm256_shuffle_ps(v, w, 0x4e);
  else  // in each block: a0 + a1, a2 + a3, b0 + b1, b2 + b3
    return (vec<T>)_mm256_shuffle_ps(v, w, 0x88) + (vec<T>)_mm256_shuffle_ps(v, w, 0xdd);
}
template <class T>
DK_INLINE vec<T> fold_blocks(vec<T> a, vec<T> b) {
  const __m256 v = (__m256)a, w = (__m256)b;
  return (vec<T>)_mm256_blend_ps(v, w, 0xf0) + (vec<T>)_mm256_permute2f128_ps(v, w, 0x21);
}
#else
constexpr bool kBlends = false;
template <class T, int W>
DK_INLINE vec<T> fold_units(vec<T> a, vec<T> b) {
  return shuffle<T>(a, b, Unpack<T, W, false>{}) + shuffle<T>(a, b, Unpack<T, W, true>{});
}
template <class T>
DK_INLINE vec<T> fold_blocks(vec<T> a, vec<T> b) {
  return shuffle<T>(a, b, Blocks<T, 0>{}) + shuffle<T>(a, b, Blocks<T, 1>{});
}
#endif

// Reduces kBlockLanes vectors: lane i of every 128-bit block of the result holds the partial sum of
// v[i] in that block.
template <class T>
DK_INLINE vec<T> fold_group(const vec<T>* v) {
#if defined(DK_NEON)
  if constexpr (sizeof(T) == 4)
    return (vec<T>)vpaddq_f32(vpaddq_f32((float32x4_t)v[0], (float32x4_t)v[1]),
                              vpaddq_f32((float32x4_t)v[2], (float32x4_t)v[3]));
  else
    return (vec<T>)vpaddq_f64((float64x2_t)v[0], (float64x2_t)v[1]);
#else
  if constexpr (sizeof(T) == 4)
    return fold_units<T, 2>(fold_units<T, 1>(v[0], v[1]), fold_units<T, 1>(v[2], v[3]));
  else
    return fold_units<T, 1>(v[0], v[1]);
#endif
}
// Combines the results of kLanes / kBlockLanes calls of fold_group: lane i of the result is the sum
// of the lanes of the i-th vector.
template <class T>
DK_INLINE vec<T> fold_groups(const vec<T>* g) {
  constexpr int kGroups = kLanes<T> / kBlockLanes<T>;
  if constexpr (kGroups == 1)
    return g[0];
  else if constexpr (kGroups == 2)
    return fold_blocks<T>(g[0], g[1]);
  else
    return fold_blocks<T>(fold_blocks<T>(g[0], g[1]), fold_blocks<T>(g[2], g[3]));
}
// Lane i of the result is the sum of the lanes of v[i].
template <class T>
DK_INLINE vec<T> lane_sums(const vec<T>* v) {
  constexpr int L = kBlockLanes<T>, kGroups = kLanes<T> / L;
  vec<T> g[kGroups];
  unroll<kGroups>([&](auto i) DK_LAMBDA { g[i] = fold_group<T>(v + i * L); });
  return fold_groups<T>(g);
}
template <class T>
DK_INLINE T lane_sum(vec<T> v) {
#if defined(DK_NEON)
  if constexpr (sizeof(T) == 4)
    return vaddvq_f32((float32x4_t)v);
  else
    return vaddvq_f64((float64x2_t)v);
#else
  constexpr int kGroups = kLanes<T> / kBlockLanes<T>;
  if constexpr (kGroups >= 2) v = fold_blocks<T>(v, v);
  if constexpr (kGroups == 4) v = fold_blocks<T>(v, v);
  v = fold_units<T, 1>(v, v);
  if constexpr (sizeof(T) == 4) v = fold_units<T, 2>(v, v);
  return v[0];
#endif
}

// Transposes a kLanes x kLanes matrix in registers: first inside 128-bit blocks, then whole blocks.
template <class T>
DK_INLINE void transpose(vec<T>* r) {
  constexpr int L = kBlockLanes<T>, kGroups = kLanes<T> / L;
  unroll<kGroups>([&](auto g) DK_LAMBDA {
    vec<T>* q = r + g * L;
    vec<T> lo = shuffle<T>(q[0], q[1], Unpack<T, 1, false>{}),
           hi = shuffle<T>(q[0], q[1], Unpack<T, 1, true>{});
    if constexpr (L == 2) {
      q[0] = lo, q[1] = hi;
    } else {
      vec<T> lo2 = shuffle<T>(q[2], q[3], Unpack<T, 1, false>{}),
             hi2 = shuffle<T>(q[2], q[3], Unpack<T, 1, true>{});
      q[0] = shuffle<T>(lo, lo2, Unpack<T, 2, false>{}),
      q[1] = shuffle<T>(lo, lo2, Unpack<T, 2, true>{});
      q[2] = shuffle<T>(hi, hi2, Unpack<T, 2, false>{}),
      q[3] = shuffle<T>(hi, hi2, Unpack<T, 2, true>{});
    }
  });
  const auto even = [](vec<T> a, vec<T> b) { return shuffle<T>(a, b, Blocks<T, 0>{}); };
  const auto odd = [](vec<T> a, vec<T> b) { return shuffle<T>(a, b, Blocks<T, 1>{}); };
  if constexpr (kGroups == 2) {
    unroll<L>([&](auto j) DK_LAMBDA {
      vec<T> a = r[j], b = r[L + j];
      r[j] = even(a, b), r[L + j] = odd(a, b);
    });
  } else if constexpr (kGroups == 4) {
    unroll<L>([&](auto j) DK_LAMBDA {
      vec<T> e0 = even(r[j], r[L + j]), o0 = odd(r[j], r[L + j]);
      vec<T> e1 = even(r[2 * L + j], r[3 * L + j]), o1 = odd(r[2 * L + j], r[3 * L + j]);
      r[j] = even(e0, e1), r[2 * L + j] = odd(e0, e1);
      r[L + j] = even(o0, o1), r[3 * L + j] = odd(o0, o1);
    });
  }
}

}  // namespace
