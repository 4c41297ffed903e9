// Fused forward: synapses -> dendrites -> cable -> somas, one tile of samples at a time. A tile has
// 32 samples (one sign word), 16 for small batches or many inputs, 64 where that is faster.
#pragma once

#include "forward_single.h"

namespace {

// A tile is computed in strips of this many vectors, so that the accumulators of two dendrites fit
// the registers.
template <class T, int Tile>
constexpr int kStrip = Tile / kLanes<T> < kTileVectors ? Tile / kLanes<T> : kTileVectors;

// acc[d] += sum_k w * x for ND dendrites that have `count` synapses each. Weights are loaded in
// 128-bit blocks and copied to all lanes by permutations: broadcasts from memory would compete with
// the gathered rows for load ports. With AVX-512 it is the other way round (broadcasts are 2 to 9 %
// faster): permutations compete with FMAs for a port, and load ports are free, since rows arrive
// from L2 at less than one vector per cycle.
template <class T, int Tile, bool Whole, int ND, class Column, class E>
DK_INLINE void gather_synapses(const T* const* weight, const Column* const* column, int64_t count,
                               const E* x, vec<T>* acc) {
  constexpr int V = kStrip<T, Tile>, BL = kBlockLanes<T>, kRow = Tile / kSamples<E>;
  constexpr bool kBroadcasts = kVectorBytes == 64;
  const auto synapse = [&](auto d, int64_t k, vec<T> w) DK_LAMBDA {
    for_each_vector<V>(x + int64_t(column[d][k]) * kRow, [&](auto t, vec<T> value) DK_LAMBDA {
      acc[d * V + t] = w * value + acc[d * V + t];
    });
  };
  int64_t k = 0;
  for (; k + BL <= count; k += BL) {
    vec<T> block[ND];
    if constexpr (!kBroadcasts)
      unroll<ND>([&](auto d) DK_LAMBDA { block[d] = load_block(weight[d] + k); });
    unroll<BL>([&](auto j) DK_LAMBDA {
      unroll<ND>([&](auto d) DK_LAMBDA {
        if constexpr (kBroadcasts)
          synapse(d, k + j, splat(weight[d][k + j]));
        else
          synapse(d, k + j, splat_lane<T, j>(block[d]));
      });
    });
  }
  if constexpr (!Whole)
    for (; k < count; ++k)
      unroll<ND>([&](auto d) DK_LAMBDA { synapse(d, k, splat(weight[d][k])); });
}

// The same for ND rows of count[d] synapses. Whole: all counts are equal and a multiple of a block.
template <class T, int Tile, bool Whole, int ND, class Column, class E>
DK_INLINE void gather_dendrites(const T* const* weight, const Column* const* column,
                                const int64_t* count, const E* x, vec<T>* acc) {
  constexpr int V = kStrip<T, Tile>;
  if constexpr (Whole) {
    gather_synapses<T, Tile, true, ND>(weight, column, count[0], x, acc);
  } else {
    int64_t common = count[0];
    unroll<ND>([&](auto d) DK_LAMBDA { common = min64(common, count[d]); });
    gather_synapses<T, Tile, false, ND>(weight, column, common, x, acc);
    if constexpr (ND > 1)
      unroll<ND>([&](auto d) DK_LAMBDA {
        const T* w = weight[d] + common;
        const Column* c = column[d] + common;
        gather_synapses<T, Tile, false, 1>(&w, &c, count[d] - common, x, acc + d * V);
      });
  }
}

template <class T, class Column, int ND>
struct LongRows {
  const T* weight[ND];
  const Column* column[ND];
  int64_t count[ND];
};

// The sums of rows with more than kChain synapses, chain by chain. Not inlined: the code for short
// rows needs all registers.
template <class T, int Tile, int ND, class Column, class E>
__attribute__((noinline)) void gather_long(LongRows<T, Column, ND> rows, const E* x, vec<T>* sum) {
  constexpr int V = kStrip<T, Tile>;
  unroll<ND * V>([&](auto i) DK_LAMBDA { sum[i] = vec<T>{}; });
  for (bool more = true; more;) {
    more = false;
    int64_t count[ND];
    vec<T> part[ND * V];
    unroll<ND * V>([&](auto i) DK_LAMBDA { part[i] = vec<T>{}; });
    unroll<ND>([&](auto d) DK_LAMBDA { count[d] = min64(rows.count[d], kChain); });
    gather_dendrites<T, Tile, false, ND>(rows.weight, rows.column, count, x, part);
    unroll<ND * V>([&](auto i) DK_LAMBDA { sum[i] += part[i]; });
    unroll<ND>([&](auto d) DK_LAMBDA {
      rows.weight[d] += count[d];
      rows.column[d] += count[d];
      rows.count[d] -= count[d];
      more |= rows.count[d] > 0;
    });
  }
}

// Pre-activations u of ND dendrites from position r on. With an order, columns are stored in that
// order but weights are not. The addresses of the weights then have no pattern that the hardware
// prefetcher could follow, so they are prefetched here, some dendrites ahead.
template <class T, int Tile, bool Whole, bool Ordered, int ND, class Column, class E>
DK_INLINE void dendrites(const dk::Topology& net, const dk::ForwardCall<T>& call, const E* x,
                         int64_t r, vec<T>* u) {
  constexpr int V = kStrip<T, Tile>;
  const T* weight[ND];
  const Column* column[ND];
  int64_t count[ND];
  unroll<ND>([&](auto d) DK_LAMBDA {
    const int64_t dendrite = Ordered ? net.order[r + d] : r + d;
    const int64_t begin = Whole ? dendrite * net.fan_in : int64_t(net.crow[dendrite]);
    count[d] = Whole ? net.fan_in : net.crow[dendrite + 1] - begin;
    weight[d] = call.weight + begin;
    if constexpr (Ordered) {
      constexpr int kAhead = 16, kLine = 64 / int(sizeof(T));
      column[d] = static_cast<const Column*>(net.ordered_columns) +
                  (Whole ? (r + d) * net.fan_in : int64_t(net.ordered_crow[r + d]));
      const int64_t later = net.order[min64(r + d + kAhead, net.rows - 1)];
      const T* ahead = call.weight + (Whole ? later * net.fan_in : int64_t(net.crow[later]));
      for (int64_t i = 0; i < count[d]; i += kLine) __builtin_prefetch(ahead + i);
    } else {
      column[d] = static_cast<const Column*>(net.columns) + begin;
    }
    const vec<T> bias = splat(call.dendrite_bias ? call.dendrite_bias[dendrite] : T(0));
    unroll<V>([&](auto t) DK_LAMBDA { u[d * V + t] = bias; });
  });
  bool is_long = false;
  unroll<ND>([&](auto d) DK_LAMBDA { is_long |= count[d] > kChain; });
  if (!Whole && __builtin_expect(is_long, false)) {
    LongRows<T, Column, ND> rows;
    unroll<ND>([&](auto d) DK_LAMBDA {
      rows.weight[d] = weight[d];
      rows.column[d] = column[d];
      rows.count[d] = count[d];
    });
    vec<T> sum[ND * V];
    gather_long<T, Tile, ND>(rows, x, sum);
    unroll<ND * V>([&](auto i) DK_LAMBDA { u[i] += sum[i]; });
  } else {
    gather_dendrites<T, Tile, Whole, ND>(weight, column, count, x, u);
  }
}

// Where the sign bits of one strip are stored. The bits of dendrite r go to words[r] for its first
// 32 samples, and to words[r + next] for the next 32. Strips of fewer samples share a word; `byte`
// is the offset of their bits in it.
struct SignWords {
  uint32_t* words;  // null: do not store signs
  int64_t next;     // 0 where the batch ends before a second word
  int64_t byte;
};

template <class T, int V>
DK_INLINE void store_signs(const SignWords& signs, int64_t r, const vec<T>* u) {
  constexpr int kBits = V * kLanes<T>;
  if constexpr (kBits > 32) {  // the second word first: with next == 0 the first overwrites it
    signs.words[r + signs.next] = positive_bits<T, V / 2>(u + V / 2);
    signs.words[r] = positive_bits<T, V / 2>(u);
  } else if constexpr (kBits == 32) {
    signs.words[r] = positive_bits<T, V>(u);
  } else {
    const uint32_t bits = positive_bits<T, V>(u);
    memcpy(reinterpret_cast<char*>(signs.words + r) + signs.byte, &bits, kBits / 8);
  }
}

// visit(dendrite, u) for dendrites r0..r1-1 of one strip. Two dendrites at a time hide the latency
// of the FMAs. One at a time is faster in two cases. With four AVX-512 vectors one dendrite hides
// that latency alone, and fewer rows of x are loaded from L2 at the same time (5 %). And where many
// dendrites vary in length, ends of rows are mispredicted less often.
template <class T, int Tile, bool Whole, bool Ordered, class Column, class E, class Visit>
DK_INLINE void for_each_dendrite(const dk::Topology& net, const dk::ForwardCall<T>& call,
                                 const E* x, int64_t r0, int64_t r1, const Visit& visit) {
  constexpr int V = kStrip<T, Tile>;
  constexpr int64_t kUnpredictable = 16384;
  constexpr bool kAlone = V == 4 && kVectorBytes == 64;
  int64_t r = r0;
  if (!kAlone && (Whole || net.rows < kUnpredictable))
    for (; r + 2 <= r1; r += 2) {
      vec<T> u[2 * V];
      dendrites<T, Tile, Whole, Ordered, 2, Column>(net, call, x, r, u);
      visit(r, u);
      visit(r + 1, u + V);
    }
  for (; r < r1; ++r) {
    vec<T> u[V];
    dendrites<T, Tile, Whole, Ordered, 1, Column>(net, call, x, r, u);
    visit(r, u);
  }
}

// Somas s0..s1-1 of one strip -> y[soma - s0][tile]
template <class T, int Tile, bool Whole, class Column, class E>
__attribute__((noinline)) void forward_somas(const dk::Topology& net,
                                             const dk::ForwardCall<T>& call, const E* x, int strip,
                                             int64_t s0, int64_t s1, const SignWords& signs, T* y) {
  constexpr int V = kStrip<T, Tile>, L = kLanes<T>;
  x += strip * V * L / kSamples<E>;
  y += strip * V * L;
  const vec<T> slope = splat(call.slope), soma_slope = splat(call.soma_slope);
  for (int64_t s = s0; s < s1; ++s) {
    vec<T> v[V];
    const vec<T> bias = splat(call.soma_bias ? call.soma_bias[s] : T(0));
    unroll<V>([&](auto t) DK_LAMBDA { v[t] = bias; });
    for_each_dendrite<T, Tile, Whole, false, Column>(
        net, call, x, net.soma_ptr[s], net.soma_ptr[s + 1],
        [&](int64_t r, const vec<T>* u) DK_LAMBDA {
          if (signs.words) store_signs<T, V>(signs, r, u);
          const vec<T> c = splat(call.cable[r]);
          unroll<V>([&](auto t) DK_LAMBDA { v[t] = c * leaky_relu<T>(u[t], slope) + v[t]; });
        });
    T* out = y + (s - s0) * Tile;
    unroll<V>([&](auto t) DK_LAMBDA { store(out + t * L, leaky_relu<T>(v[t], soma_slope)); });
  }
}

// The same where an order mixes the dendrites of somas s0..s1-1: their sums are accumulated in y.
template <class T, int Tile, bool Whole, class Column, class E>
__attribute__((noinline)) void forward_mixed(const dk::Topology& net,
                                             const dk::ForwardCall<T>& call, const E* x, int strip,
                                             int64_t s0, int64_t s1, const SignWords& signs, T* y) {
  constexpr int V = kStrip<T, Tile>, L = kLanes<T>;
  x += strip * V * L / kSamples<E>;
  y += strip * V * L;
  const vec<T> slope = splat(call.slope), soma_slope = splat(call.soma_slope);
  for (int64_t s = s0; s < s1; ++s) {
    const vec<T> bias = splat(call.soma_bias ? call.soma_bias[s] : T(0));
    unroll<V>([&](auto t) DK_LAMBDA { store(y + (s - s0) * Tile + t * L, bias); });
  }
  for_each_dendrite<T, Tile, Whole, true, Column>(
      net, call, x, net.soma_ptr[s0], net.soma_ptr[s1], [&](int64_t p, const vec<T>* u) DK_LAMBDA {
        if (signs.words) store_signs<T, V>(signs, net.order[p], u);
        const vec<T> c = splat(call.cable[net.order[p]]);
        T* v = y + (net.soma[p] - s0) * Tile;
        unroll<V>([&](auto t) DK_LAMBDA {
          store(v + t * L, c * leaky_relu<T>(u[t], slope) + load(v + t * L));
        });
      });
  for (T* v = y; v < y + (s1 - s0) * Tile; v += Tile)
    unroll<V>([&](auto t)
                  DK_LAMBDA { store(v + t * L, leaky_relu<T>(load(v + t * L), soma_slope)); });
}

// Rows r0..r1-1 of one strip, no soma stage -> u[row - r0][tile]
template <class T, int Tile, bool Whole, bool Ordered, class Column, class E>
__attribute__((noinline)) void forward_rows(const dk::Topology& net, const dk::ForwardCall<T>& call,
                                            const E* x, int strip, int64_t r0, int64_t r1,
                                            const SignWords&, T* y) {
  constexpr int V = kStrip<T, Tile>, L = kLanes<T>;
  x += strip * V * L / kSamples<E>;
  y += strip * V * L;
  for_each_dendrite<T, Tile, Whole, Ordered, Column>(
      net, call, x, r0, r1, [&](int64_t r, const vec<T>* u) DK_LAMBDA {
        T* out = y + ((Ordered ? net.order[r] : r) - r0) * Tile;
        unroll<V>([&](auto t) DK_LAMBDA { store(out + t * L, u[t]); });
      });
}

template <class T, class E>
using ForwardKernel = void (*)(const dk::Topology&, const dk::ForwardCall<T>&, const E*, int,
                               int64_t, int64_t, const SignWords&, T*);

template <class T, int Tile, class E, bool Whole, class Column>
ForwardKernel<T, E> pick_stage(const dk::Topology& net, bool somas) {
  if (!somas)
    return net.order ? forward_rows<T, Tile, Whole, true, Column, E>
                     : forward_rows<T, Tile, Whole, false, Column, E>;
  return net.order ? forward_mixed<T, Tile, Whole, Column, E>
                   : forward_somas<T, Tile, Whole, Column, E>;
}

template <class T, int Tile, class E, class Column>
ForwardKernel<T, E> pick_forward(const dk::Topology& net, bool somas) {
  if constexpr (sizeof(Column) == 2)
    if (net.fan_in > 0 && net.fan_in % kBlockLanes<T> == 0 && net.fan_in <= kChain)
      return pick_stage<T, Tile, E, true, Column>(net, somas);
  return pick_stage<T, Tile, E, false, Column>(net, somas);
}

// The work is the sequence (tile 0, all outputs), (tile 1, all outputs), ... Every thread takes an
// equal part of it and transposes the tiles of its part itself. This needs no barrier, and a small
// batch is still divided over the outputs.
template <class T, int Tile, class E>
void forward_tiled(const dk::Topology& net, const dk::ForwardCall<T>& call,
                   const dk::Runtime& runtime) {
  constexpr int kStripSamples = kStrip<T, Tile> * kLanes<T>, kRow = Tile / kSamples<E>;
  const bool somas = call.cable != nullptr;
  // Groups that an order mixes are not divided. Outputs are transposed in chunks of 16 or more.
  const int64_t whole = net.order ? net.group_size : 1, chunk = ceil_div(16, whole) * whole;
  const int64_t outputs = somas ? net.somas : net.rows, N = net.in_features;
  const int64_t tiles = ceil_div(call.batch, Tile), cost = work_of(net), total = tiles * cost;
  const int64_t threads = useful_threads(runtime, total);
  const auto kernel = net.narrow ? pick_forward<T, Tile, E, uint16_t>(net, somas)
                                 : pick_forward<T, Tile, E, int32_t>(net, somas);
  Carver carver;
  const int64_t x_tile = carver.reserve<E>(threads * N * kRow),
                y_tile = carver.reserve<T>(threads * chunk * Tile);
  carver.allocate(runtime);
  parallel(runtime, threads, [&](int64_t thread) {
    const int64_t begin = total * thread / threads, end = total * (thread + 1) / threads;
    E* xt = carver.at<E>(x_tile) + thread * N * kRow;
    T* yt = carver.at<T>(y_tile) + thread * chunk * Tile;
    for (int64_t tile = begin / cost; tile < tiles && tile * cost < end; ++tile) {
      const int64_t first = find_output(net, somas, outputs, whole, begin - tile * cost);
      const int64_t last = (tile + 1) * cost <= end
                               ? outputs
                               : find_output(net, somas, outputs, whole, end - tile * cost);
      if (first >= last) continue;
      const int64_t sample = tile * Tile, samples = min64(Tile, call.batch - sample);
      tile_in<T, Tile / kLanes<T>>(call.storage, call.x, sample, samples, N, 0, N, xt,
                                   call.round_x);
      for (int64_t o = first; o < last; o += chunk) {
        const int64_t stop = min64(last, o + chunk);
        for (int strip = 0; strip * kStripSamples < samples; ++strip) {
          const int64_t from = sample + strip * kStripSamples;
          SignWords signs{nullptr, from + 32 < call.batch ? net.rows : 0, from % 32 / 8};
          if (call.signs) signs.words = call.signs + from / 32 * net.rows;
          kernel(net, call, xt, strip, o, stop, signs, yt);
        }
        tile_out<T, Tile / kLanes<T>>(call.storage, yt, stop - o, samples, call.y, sample, outputs,
                                      o);
      }
    }
  });
}

// A tile of x should stay in L2 beside weights and columns: it may take three quarters.
template <class T>
bool fits_l2(const dk::Topology& net, const dk::Runtime& runtime, int64_t samples) {
  return net.in_features * samples * int64_t(sizeof(T)) <= runtime.l2_bytes / 4 * 3;
}

template <class T>
void forward(const dk::Topology& net, const dk::ForwardCall<T>& call, const dk::Runtime& runtime) {
  if (call.batch == 1) return forward_single(net, call, runtime);
  if constexpr (kLanes<T> == 16) {
    const bool local = net.order, rounded = call.round_x || call.storage == dk::Storage::bf16;
    // Samples of padding in tiles of this size beyond those in tiles of half the size.
    const auto more_pads_in = [&](int64_t tile) {
      return (call.batch - 1) % tile < tile / 2 ? tile / 2 : 0;
    };
    // Tiles of bfloat16 halve the bytes that are gathered, but must be widened. Where a tile of x
    // fills much of L2 this is 1.0 to 1.4 times as fast, else up to 20 % slower. It gains nothing
    // where neighbours share inputs, which then come from L1, and needs the registers of AVX-512.
    const bool large = !fits_l2<T>(net, runtime, 12 * 32);
    if (rounded && large && !local && 8 * more_pads_in(32) <= call.batch)
      return forward_tiled<T, 32, Pair>(net, call, runtime);
    // Tiles of 64 samples read weights half as often, if they fit half of L2 (5 % faster). They
    // gain more where an order keeps inputs in L1, so that the weights count more (12 %), and where
    // rows vary in length, since their ends are mispredicted half as often. They are not used
    // where they need much more padding.
    const bool roomy = local || fits_l2<T>(net, runtime, net.fan_in ? 96 : 64);
    if (roomy && (local ? 8 : 20) * more_pads_in(64) <= call.batch) {
      const int64_t outputs = call.cable ? net.somas : net.rows;
      const int64_t parts =
          ceil_div(call.batch, 64) * ceil_div(outputs, local ? net.group_size : 1);
      if (parts >= runtime.threads) return forward_tiled<T, 64, T>(net, call, runtime);
    }
  }
  if (call.batch <= 16 || !fits_l2<T>(net, runtime, 32))
    return forward_tiled<T, 16, T>(net, call, runtime);
  forward_tiled<T, 32, T>(net, call, runtime);
}

}  // namespace
