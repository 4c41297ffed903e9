// A batch tile holds V vectors of samples for each feature: tile[feature][V * kLanes]. The batch
// runs innermost, so one synapse is one broadcast weight times V contiguous vectors. Samples past
// the end of the batch are zero.
#pragma once

#include "kernels.h"
#include "shuffle.h"
#include "storage.h"

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

// Products that are added up in one accumulator. Rounding errors grow with the length of such a
// chain, so longer sums are sums of chains.
constexpr int64_t kChain = 128;
// Synapses of an input after which dx of a small batch, which has no plan, starts another sum.
constexpr int64_t kStretch = 2 * kChain;

// Such a sum over the synapses of a row, a vector of them at a time: from the first on, `k` says
// how many came before.
template <class T>
class Chains {
 public:
  DK_INLINE void add(int64_t k, vec<T> products) {
    chain_ += products;
    if (k % kChain == kChain - kLanes<T>) {
      done_ += chain_;
      chain_ = vec<T>{};
    }
  }
  DK_INLINE vec<T> sum() const { return done_ + chain_; }

 private:
  vec<T> done_{}, chain_{};
};

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

// Row-major source [rows][stride] of samples stored as S.
template <class T, class S>
struct Rows {
  const S* data;
  int64_t stride;
  DK_INLINE vec<T> vector(int64_t row, int64_t column) const {
    return load_samples(data + row * stride + column);
  }
  DK_INLINE T scalar(int64_t row, int64_t column) const {
    return load_sample(data + row * stride + column);
  }
};

// A source whose numbers are rounded to bfloat16.
template <class Source>
struct Rounded {
  Source source;
  DK_INLINE vec<float> vector(int64_t row, int64_t column) const {
    return (vec<float>)(round_to_bf16(source.vector(row, column)) & 0xffff0000);
  }
  DK_INLINE float scalar(int64_t row, int64_t column) const {
    return widen(narrow(source.scalar(row, column), bf16{}));
  }
};

// grad * phi'(v), where the sign of y tells the sign of v (slope >= 0).
template <class T, class S>
struct SomaGradient {
  const S *grad, *y;
  int64_t stride;
  T slope;
  DK_INLINE vec<T> vector(int64_t row, int64_t column) const {
    const vec<T> g = load_samples(grad + row * stride + column);
    return load_samples(y + row * stride + column) > vec<T>{} ? g : g * splat(slope);
  }
  DK_INLINE T scalar(int64_t row, int64_t column) const {
    const T g = load_sample(grad + row * stride + column);
    return load_sample(y + row * stride + column) > 0 ? g : g * slope;
  }
};

// Two samples of a tile as bfloat16, kLanes apart, so that one load gives two vectors of float32:
// the first in the low half of each word, the second in the high half.
struct Pair {
  uint32_t bits;
};
// Samples in one element of a tile.
template <class E>
constexpr int kSamples = 1;
template <>
constexpr int kSamples<Pair> = 2;

// f(t, vector t) for the V vectors of samples at `row` of a tile.
template <int V, class T, class F>
DK_INLINE void for_each_vector(const T* row, const F& f) {
  unroll<V>([&](auto t) DK_LAMBDA { f(t, load(row + t * kLanes<T>)); });
}
template <int V, class F>
DK_INLINE void for_each_vector(const Pair* row, const F& f) {
  static_assert(V % 2 == 0);
  unroll<V / 2>([&](auto i) DK_LAMBDA {
    const Unsigned words = (Unsigned)load(reinterpret_cast<const float*>(row) + i * kLanes<float>);
    f(std::integral_constant<int, 2 * i>{}, (vec<float>)(words << 16));
    f(std::integral_constant<int, 2 * i + 1>{}, (vec<float>)(words & 0xffff0000));
  });
}

// The transpose of kLanes columns from c of rows t * kLanes..., of which `samples` exist.
template <class T, class Source>
DK_INLINE void transposed_block(const Source& source, int64_t samples, int64_t c, int t,
                                vec<T>* r) {
  constexpr int L = kLanes<T>;
  const int64_t present = samples - t * L;
  if (present >= L)
    unroll<L>([&](auto i) DK_LAMBDA { r[i] = source.vector(t * L + i, c); });
  else
    unroll<L>([&](auto i)
                  DK_LAMBDA { r[i] = i < present ? source.vector(t * L + i, c) : vec<T>{}; });
  transpose<T>(r);
}

// source rows 0..samples-1, columns c0..c1-1 -> tile[c - c0][V * kLanes]
template <class T, int V, class Source>
__attribute__((noinline)) void transpose_in(const Source& source, int64_t samples, int64_t c0,
                                            int64_t c1, T* tile) {
  constexpr int L = kLanes<T>, kTile = V * L;
  int64_t c = c0;
  const auto block = [&](int t) DK_LAMBDA {
    vec<T> r[L];
    transposed_block<T>(source, samples, c, t, r);
    T* out = tile + (c - c0) * kTile + t * L;
    unroll<L>([&](auto i) DK_LAMBDA { store(out + i * kTile, r[i]); });
  };
  // Of a wide tile's rows kLanes at a time: all of them at once are spread over so many pages that
  // it takes longer where x comes from memory (backward of F without dx 1 to 4 %).
  if constexpr (V > kTileVectors)
    for (int t = 0; t < V; ++t)
      for (c = c0; c + L <= c1; c += L) block(t);
  else
    for (; c + L <= c1; c += L)
      for (int t = 0; t < V; ++t) block(t);
  for (; c < c1; ++c)
    for (int b = 0; b < kTile; ++b)
      tile[(c - c0) * kTile + b] = b < samples ? source.scalar(b, c) : T(0);
}

// The same, rounded to bfloat16.
template <class T, int V, class Source>
__attribute__((noinline)) void transpose_in(const Source& source, int64_t samples, int64_t c0,
                                            int64_t c1, Pair* tile) {
  constexpr int L = kLanes<float>, kWords = V / 2 * L;
  int64_t c = c0;
  for (; c + L <= c1; c += L) {
    for (int t = 0; t < V; t += 2) {
      vec<float> low[L], high[L];
      transposed_block<float>(source, samples, c, t, low);
      transposed_block<float>(source, samples, c, t + 1, high);
      float* out = reinterpret_cast<float*>(tile + (c - c0) * kWords + t / 2 * L);
      unroll<L>([&](auto i) DK_LAMBDA {
        const Unsigned first = round_to_bf16(low[i]) >> 16,
                       second = round_to_bf16(high[i]) & 0xffff0000;
        store(out + i * kWords, (vec<float>)(first | second));
      });
    }
  }
  const auto bits = [&](int64_t b) -> uint32_t {
    return b < samples ? narrow(source.scalar(b, c), bf16{}).bits : 0;
  };
  for (; c < c1; ++c)
    for (int word = 0; word < kWords; ++word) {
      const int64_t b = word / L * 2 * L + word % L;
      tile[(c - c0) * kWords + word] = {bits(b) | bits(b + L) << 16};
    }
}

// tile[c][V * kLanes], c < columns -> out rows 0..samples-1 of row length `stride`
template <class T, int V, class S>
__attribute__((noinline)) void transpose_out(const T* tile, int64_t columns, int64_t samples,
                                             S* out, int64_t stride) {
  constexpr int L = kLanes<T>, kTile = V * L;
  int64_t c = 0;
  for (; c + L <= columns; c += L) {
    for (int t = 0; t < V && t * L < samples; ++t) {
      vec<T> r[L];
      unroll<L>([&](auto i) DK_LAMBDA { r[i] = load(tile + (c + i) * kTile + t * L); });
      transpose<T>(r);
      const int64_t present = samples - t * L;
      S* rows = out + int64_t(t) * L * stride + c;
      if (present >= L)
        unroll<L>([&](auto i) DK_LAMBDA { store_samples(rows + i * stride, r[i]); });
      else
        unroll<L>([&](auto i) DK_LAMBDA {
          if (i < present) store_samples(rows + i * stride, r[i]);
        });
    }
  }
  for (; c < columns; ++c)
    for (int64_t b = 0; b < min64(samples, kTile); ++b)
      store_sample(out + b * stride + c, tile[c * kTile + b]);
}

// Rows of x or of a gradient [B, columns] from `first` on, in whatever they are stored as.
template <class T, int V, class E>
void tile_in(dk::Storage storage, const void* data, int64_t first, int64_t samples, int64_t stride,
             int64_t c0, int64_t c1, E* tile, bool round = false) {
  with_storage<T>(storage, [&](auto* type) DK_LAMBDA {
    using S = std::remove_pointer_t<decltype(type)>;
    const Rows<T, S> rows{static_cast<const S*>(data) + first * stride, stride};
    if constexpr (sizeof(T) == 4 && !std::is_same_v<E, Pair>)  // pairs are rounded anyway
      if (round) return transpose_in<T, V>(Rounded<Rows<T, S>>{rows}, samples, c0, c1, tile);
    transpose_in<T, V>(rows, samples, c0, c1, tile);
  });
}

// Back again: columns c0, c0 + 1, ... of rows from `first` on.
template <class T, int V>
void tile_out(dk::Storage storage, const T* tile, int64_t columns, int64_t samples, void* data,
              int64_t first, int64_t stride, int64_t c0) {
  with_storage<T>(storage, [&](auto* type) DK_LAMBDA {
    using S = std::remove_pointer_t<decltype(type)>;
    S* out = static_cast<S*>(data) + first * stride + c0;
    transpose_out<T, V>(tile, columns, samples, out, stride);
  });
}

// ---- one row by itself ----

// n samples as numbers to compute with: where they lie, or widened or rounded in `room`.
template <class T>
const T* row_in(dk::Storage storage, const void* data, int64_t n, T* room, bool round = false) {
  if (storage == dk::Storage::full && !round) return static_cast<const T*>(data);
  const auto copy = [&](const auto& source) {
    int64_t c = 0;
    for (; c + kLanes<T> <= n; c += kLanes<T>) store(room + c, source.vector(0, c));
    for (; c < n; ++c) room[c] = source.scalar(0, c);
  };
  with_storage<T>(storage, [&](auto* type) DK_LAMBDA {
    using S = std::remove_pointer_t<decltype(type)>;
    const Rows<T, S> rows{static_cast<const S*>(data), n};
    if constexpr (sizeof(T) == 4)
      if (round) return copy(Rounded<Rows<T, S>>{rows});
    copy(rows);
  });
  return room;
}

// Where to compute a row of results: where it goes, or in `room`, from which row_out stores it.
template <class T>
T* row_out_at(dk::Storage storage, void* data, T* room) {
  return storage == dk::Storage::full ? static_cast<T*>(data) : room;
}
template <class T>
void row_out(dk::Storage storage, const T* row, int64_t n, void* data) {
  if (storage == dk::Storage::full) return;
  with_storage<T>(storage, [&](auto* type) DK_LAMBDA {
    using S = std::remove_pointer_t<decltype(type)>;
    S* out = static_cast<S*>(data);
    int64_t c = 0;
    for (; c + kLanes<T> <= n; c += kLanes<T>) store_samples(out + c, load(row + c));
    for (; c < n; ++c) store_sample(out + c, row[c]);
  });
}

}  // namespace
