// A tile holds V vectors of samples for each feature: tile[feature][V * kLanes]. Samples are the
// inner dimension, so a synapse is one broadcast weight times V contiguous vectors. Samples past
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

// How many threads to use for `work` gathered rows of a tile, about a nanosecond each. Each thread
// should get much more work than it costs to wake it.
DK_INLINE int64_t useful_threads(const dk::Runtime& runtime, int64_t work) {
  constexpr int64_t kWorkPerThread = 8192;
  return max64(1, min64(runtime.threads, work / kWorkPerThread));
}

// The most products that are added up in one accumulator. Rounding errors grow with the length of
// such a chain, so longer sums are sums of chains.
constexpr int64_t kChain = 128;
// Without the plan (small batches), dx starts another sum after about this many synapses per input.
constexpr int64_t kStretch = 2 * kChain;

// A sum of chains over the synapses of a row, one vector at a time; k is the number of synapses
// before this vector.
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

// Divides one workspace into 64-byte aligned arrays: first reserve all of them, then allocate, then
// get pointers with `at`.
class Carver {
 public:
  template <class T>
  int64_t reserve(int64_t count) {
    const int64_t offset = bytes_;
    // One more cache line: arrays whose sizes are powers of two would start in the same cache set.
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

// Rows of samples stored as S, `stride` apart.
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
  // A source that starts at (row, column) and has kLanes rows. Only `present` rows exist; if these
  // are fewer than kLanes, they are copied to `room` and followed by rows of zeros.
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

// The same numbers, rounded to bfloat16.
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

// grad * phi'(v). y has the sign of v, because the slope of somas is >= 0.
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

// Two samples of a tile as bfloat16, in one word: the sample in the high half is kLanes after that
// in the low half. One load then gives two vectors of float32.
struct Pair {
  uint32_t bits;
};
// Number of samples in one element of a tile.
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

// The transpose of rows t * kLanes..., columns c..., kLanes of each. The source has `samples` rows.
template <class T, class Source>
DK_INLINE void transposed_block(const Source& source, int64_t samples, int64_t c, int64_t t,
                                vec<T>* r) {
  constexpr int L = kLanes<T>;
  typename Source::Room room;
  const Source block = source.block(t * L, c, samples - t * L, room);
  unroll<L>([&](auto i) DK_LAMBDA { r[i] = block.vector(i, 0); });
  transpose<T>(r);
}

// V as a compile-time constant or as a number. Constants let the compiler unroll transposes, which
// are then up to 1.8 times as fast. 16-bit storage uses numbers, so that fewer copies are compiled.
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
  // In wide tiles, transpose kLanes rows of x at a time: all rows at once are in so many pages that
  // x from memory is read more slowly (1 to 4 % of backward without dx on case F).
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

// Calls f with the rows of `data` from `first` on, as a source of their stored type; round: rounded
// to bfloat16.
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

// Columns c0..c1-1 of rows first..first+samples-1 of x or a gradient [B, stride] -> a tile.
template <class T, int V, class E>
void tile_in(dk::Storage storage, const void* data, int64_t first, int64_t samples, int64_t stride,
             int64_t c0, int64_t c1, E* tile, bool round = false) {
  const bool pairs = std::is_same_v<E, Pair>;  // transpose_in rounds these
  with_rows<T>(storage, round && !pairs, data, first, stride, [&](const auto& rows) DK_LAMBDA {
    constexpr bool kPlain = std::is_same_v<decltype(rows), const Rows<T, T>&>;
    transpose_in<T>(rows, samples, c0, c1, width<V, kPlain>(), tile);
  });
}

// A tile -> columns c0, c0 + 1, ... of rows from `first` on.
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

// n samples as T: `data` itself, or a widened or rounded copy in `room`.
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

// Where to compute a row of results: in `data` itself, or in `room`, from which row_out converts
// it.
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
