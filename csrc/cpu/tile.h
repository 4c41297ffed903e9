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
  // The source whose first sample is this one's at (row, column). It needs kLanes rows of as many;
  // of them `present` exist, and if those are too few, it is a copy that zeros follow.
  struct Room {
    S rows[kLanes<T> * kLanes<T>];
  };
  DK_INLINE Rows block(int64_t row, int64_t column, int64_t present, Room& room) const {
    constexpr int L = kLanes<T>;
    const S* from = data + row * stride + column;
    if (present >= L) return {from, stride};
    for (int64_t i = 0; i < L; ++i)
      if (i < present)
        memcpy(room.rows + i * L, from + i * stride, L * sizeof(S));
      else
        memset(room.rows + i * L, 0, L * sizeof(S));
    return {room.rows, L};
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
  using Room = typename Source::Room;
  DK_INLINE Rounded block(int64_t row, int64_t column, int64_t present, Room& room) const {
    return {source.block(row, column, present, room)};
  }
};

// grad * phi'(v), where the sign of y tells the sign of v (slope >= 0).
template <class T, class S>
struct SomaGradient {
  Rows<T, S> grad, y;
  T slope;
  DK_INLINE vec<T> vector(int64_t row, int64_t column) const {
    const vec<T> g = grad.vector(row, column);
    return y.vector(row, column) > vec<T>{} ? g : g * splat(slope);
  }
  DK_INLINE T scalar(int64_t row, int64_t column) const {
    const T g = grad.scalar(row, column);
    return y.scalar(row, column) > 0 ? g : g * slope;
  }
  struct Room {
    typename Rows<T, S>::Room grad, y;
  };
  DK_INLINE SomaGradient block(int64_t row, int64_t column, int64_t present, Room& room) const {
    return {grad.block(row, column, present, room.grad), y.block(row, column, present, room.y),
            slope};
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
DK_INLINE void transposed_block(const Source& source, int64_t samples, int64_t c, int64_t t,
                                vec<T>* r) {
  constexpr int L = kLanes<T>;
  typename Source::Room room;
  const Source block = source.block(t * L, c, samples - t * L, room);
  unroll<L>([&](auto i) DK_LAMBDA { r[i] = block.vector(i, 0); });
  transpose<T>(r);
}

// V: a constant where numbers are stored as they are computed with, which makes transposes up to
// 1.8 times as fast. Else a number, lest too many of them be compiled.
template <int V, bool Constant>
DK_INLINE auto width() {
  if constexpr (Constant)
    return std::integral_constant<int, V>{};
  else
    return V;
}

// source rows 0..samples-1, columns c0..c1-1 -> tile[c - c0][V * kLanes]
template <class T, class Source, class Width>
DK_COMPILED_ONCE void transpose_in(const Source& source, int64_t samples, int64_t c0, int64_t c1,
                                   Width V, T* tile) {
  constexpr int L = kLanes<T>;
  const int64_t kTile = V * L, whole = (c1 - c0) / L;
  // Of a wide tile's rows kLanes at a time: all of them at once are spread over so many pages that
  // it takes longer where x comes from memory (backward of F without dx 1 to 4 %).
  const int at_once = V > kTileVectors ? 1 : V;
  for (int first = 0; first < V; first += at_once)
    for (int64_t block = 0; block < whole; ++block)
      for (int t = first; t < first + at_once; ++t) {
        vec<T> r[L];
        transposed_block<T>(source, samples, c0 + block * L, t, r);
        T* out = tile + block * L * kTile + t * L;
        unroll<L>([&](auto i) DK_LAMBDA { store(out + i * kTile, r[i]); });
      }
  for (int64_t c = c0 + whole * L; c < c1; ++c)
    for (int64_t b = 0; b < kTile; ++b)
      tile[(c - c0) * kTile + b] = b < samples ? source.scalar(b, c) : T(0);
}

// The same, rounded to bfloat16.
template <class T, class Source, class Width>
DK_COMPILED_ONCE void transpose_in(const Source& source, int64_t samples, int64_t c0, int64_t c1,
                                   Width V, Pair* tile) {
  constexpr int L = kLanes<float>;
  const int64_t words = V / 2 * L;
  int64_t c = c0;
  for (; c + L <= c1; c += L) {
    for (int t = 0; t < V; t += 2) {
      vec<float> low[L], high[L];
      transposed_block<float>(source, samples, c, t, low);
      transposed_block<float>(source, samples, c, t + 1, high);
      float* out = reinterpret_cast<float*>(tile + (c - c0) * words + t / 2 * L);
      unroll<L>([&](auto i) DK_LAMBDA {
        const Unsigned first = round_to_bf16(low[i]) >> 16,
                       second = round_to_bf16(high[i]) & 0xffff0000;
        store(out + i * words, (vec<float>)(first | second));
      });
    }
  }
  const auto bits = [&](int64_t b) -> uint32_t {
    return b < samples ? narrow(source.scalar(b, c), bf16{}).bits : 0;
  };
  for (; c < c1; ++c)
    for (int64_t word = 0; word < words; ++word) {
      const int64_t b = word / L * 2 * L + word % L;
      tile[(c - c0) * words + word] = {bits(b) | bits(b + L) << 16};
    }
}

// tile[c][V * kLanes], c < columns -> out rows 0..samples-1 of row length `stride`
template <class T, class S, class Width>
DK_COMPILED_ONCE void transpose_out(const T* tile, int64_t columns, int64_t samples, Width V,
                                    S* out, int64_t stride) {
  constexpr int L = kLanes<T>;
  const int64_t kTile = V * L;
  int64_t c = 0;
  for (; c + L <= columns; c += L) {
    for (int64_t t = 0; t < V && t * L < samples; ++t) {
      vec<T> r[L];
      unroll<L>([&](auto i) DK_LAMBDA { r[i] = load(tile + (c + i) * kTile + t * L); });
      transpose<T>(r);
      const int64_t present = samples - t * L;
      S* rows = out + t * L * stride + c;
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

// f(rows of `data` from `first` on, rounded if so, as a source of the type that they have).
template <class T, class F>
DK_INLINE void with_rows(dk::Storage storage, bool round, const void* data, int64_t first,
                         int64_t stride, const F& f) {
  with_storage<T>(storage, [&](auto* type) DK_LAMBDA {
    using S = std::remove_pointer_t<decltype(type)>;
    const Rows<T, S> rows{static_cast<const S*>(data) + first * stride, stride};
    if constexpr (sizeof(T) == 4 && !std::is_same_v<S, bf16>)
      if (round) return f(Rounded<Rows<T, S>>{rows});
    f(rows);
  });
}

// Rows of x or of a gradient [B, columns] from `first` on, in whatever they are stored as.
template <class T, int V, class E>
void tile_in(dk::Storage storage, const void* data, int64_t first, int64_t samples, int64_t stride,
             int64_t c0, int64_t c1, E* tile, bool round = false) {
  const bool pairs = std::is_same_v<E, Pair>;  // they are rounded anyway
  with_rows<T>(storage, round && !pairs, data, first, stride, [&](const auto& rows) DK_LAMBDA {
    constexpr bool kPlain = std::is_same_v<decltype(rows), const Rows<T, T>&>;
    transpose_in<T>(rows, samples, c0, c1, width<V, kPlain>(), tile);
  });
}

// Back again: columns c0, c0 + 1, ... of rows from `first` on.
template <class T, int V>
void tile_out(dk::Storage storage, const T* tile, int64_t columns, int64_t samples, void* data,
              int64_t first, int64_t stride, int64_t c0) {
  with_storage<T>(storage, [&](auto* type) DK_LAMBDA {
    using S = std::remove_pointer_t<decltype(type)>;
    S* out = static_cast<S*>(data) + first * stride + c0;
    transpose_out<T>(tile, columns, samples, width<V, std::is_same_v<S, T>>(), out, stride);
  });
}

// ---- one row by itself ----

// n samples as numbers to compute with: where they lie, or widened or rounded in `room`.
template <class T>
const T* row_in(dk::Storage storage, const void* data, int64_t n, T* room, bool round = false) {
  if (storage == dk::Storage::full && !round) return static_cast<const T*>(data);
  with_rows<T>(storage, round, data, 0, n, [&](const auto& source) {
    int64_t c = 0;
    for (; c + kLanes<T> <= n; c += kLanes<T>) store(room + c, source.vector(0, c));
    for (; c < n; ++c) room[c] = source.scalar(0, c);
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
