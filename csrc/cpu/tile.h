// A batch tile holds V vectors of samples for each feature: tile[feature][V * kLanes]. The batch
// runs innermost, so one synapse is one broadcast weight times V contiguous vectors. Samples past
// the end of the batch are zero.
#pragma once

#include "kernels.h"
#include "shuffle.h"

namespace {

DK_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
DK_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
DK_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Runs f(i) for i in [0, n) on the caller's pool.
template <class F>
DK_INLINE void parallel(const dk::Runtime& runtime, int64_t n, const F& f) {
  if (runtime.threads == 1 || n == 1) {
    for (int64_t i = 0; i < n; ++i) f(i);
    return;
  }
  runtime.parallel(
      n,
      [](int64_t begin, int64_t end, void* context) {
        for (int64_t i = begin; i < end; ++i) (*static_cast<const F*>(context))(i);
      },
      const_cast<F*>(&f));
}

// Threads worth waking for `work` gathered tile rows, each of which takes about a nanosecond.
DK_INLINE int64_t useful_threads(const dk::Runtime& runtime, int64_t work) {
  constexpr int64_t kWorkPerThread = 8192;
  return max64(1, min64(runtime.threads, work / kWorkPerThread));
}

// Cuts one workspace into 64-byte aligned arrays: first add up the sizes, then take the pieces in
// the same order.
class Carver {
 public:
  template <class T>
  int64_t reserve(int64_t count) {
    const int64_t offset = bytes_;
    // An odd number of cache lines between arrays, lest they all start in the same cache set.
    bytes_ += ceil_div(count * int64_t(sizeof(T)), 64) * 64 + 64;
    return offset;
  }
  void allocate(const dk::Runtime& runtime) {
    base_ = static_cast<char*>(runtime.workspace(runtime.workspace_context, bytes_));
  }
  template <class T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(base_ + offset);
  }

 private:
  char* base_ = nullptr;
  int64_t bytes_ = 0;
};

// Row-major source [rows][stride].
template <class T>
struct Rows {
  const T* data;
  int64_t stride;
  DK_INLINE vec<T> vector(int64_t row, int64_t column) const {
    return load(data + row * stride + column);
  }
  DK_INLINE T scalar(int64_t row, int64_t column) const { return data[row * stride + column]; }
};

// grad * phi'(v), where the sign of y tells the sign of v (slope >= 0).
template <class T>
struct SomaGradient {
  const T *grad, *y;
  int64_t stride;
  T slope;
  DK_INLINE vec<T> vector(int64_t row, int64_t column) const {
    const vec<T> g = load(grad + row * stride + column);
    return load(y + row * stride + column) > vec<T>{} ? g : g * splat(slope);
  }
  DK_INLINE T scalar(int64_t row, int64_t column) const {
    const T g = grad[row * stride + column];
    return y[row * stride + column] > 0 ? g : g * slope;
  }
};

// source rows 0..samples-1, columns c0..c1-1 -> tile[c - c0][V * kLanes]
template <class T, int V, class Source>
__attribute__((noinline)) void transpose_in(const Source& source, int64_t samples, int64_t c0,
                                            int64_t c1, T* tile) {
  constexpr int L = kLanes<T>, kTile = V * L;
  int64_t c = c0;
  for (; c + L <= c1; c += L) {
    for (int t = 0; t < V; ++t) {
      vec<T> r[L];
      const int64_t present = samples - t * L;
      if (present >= L)
        unroll<L>([&](auto i) DK_LAMBDA { r[i] = source.vector(t * L + i, c); });
      else
        unroll<L>([&](auto i)
                      DK_LAMBDA { r[i] = i < present ? source.vector(t * L + i, c) : vec<T>{}; });
      transpose<T>(r);
      T* out = tile + (c - c0) * kTile + t * L;
      unroll<L>([&](auto i) DK_LAMBDA { store(out + i * kTile, r[i]); });
    }
  }
  for (; c < c1; ++c)
    for (int b = 0; b < kTile; ++b)
      tile[(c - c0) * kTile + b] = b < samples ? source.scalar(b, c) : T(0);
}

// tile[c][V * kLanes], c < columns -> out rows 0..samples-1 of row length `stride`
template <class T, int V>
__attribute__((noinline)) void transpose_out(const T* tile, int64_t columns, int64_t samples,
                                             T* out, int64_t stride) {
  constexpr int L = kLanes<T>, kTile = V * L;
  int64_t c = 0;
  for (; c + L <= columns; c += L) {
    for (int t = 0; t < V && t * L < samples; ++t) {
      vec<T> r[L];
      unroll<L>([&](auto i) DK_LAMBDA { r[i] = load(tile + (c + i) * kTile + t * L); });
      transpose<T>(r);
      const int64_t present = samples - t * L;
      T* rows = out + int64_t(t) * L * stride + c;
      if (present >= L)
        unroll<L>([&](auto i) DK_LAMBDA { store(rows + i * stride, r[i]); });
      else
        unroll<L>([&](auto i) DK_LAMBDA {
          if (i < present) store(rows + i * stride, r[i]);
        });
    }
  }
  for (; c < columns; ++c)
    for (int64_t b = 0; b < min64(samples, kTile); ++b) out[b * stride + c] = tile[c * kTile + b];
}

}  // namespace
