// Fused forward: synapses -> dendrites -> cable -> somas, one batch tile of 32 samples (one sign
// word) at a time, or of 16 for the smallest batches.
#pragma once

#include "tile.h"

namespace {

// A tile is computed in strips of this many vectors: as many accumulators as the registers hold for
// two dendrites at once.
template <class T, int Tile>
constexpr int kStrip = Tile / kLanes<T> < kTileVectors ? Tile / kLanes<T> : kTileVectors;

// acc[d] += sum_k w * x for ND dendrites that have `count` synapses each. Weights are loaded a
// 128-bit block at a time and spread by a permutation: broadcasts from memory would take the load
// ports from the gathered rows.
template <class T, int Tile, int FanIn, int ND, class Column>
DK_INLINE void gather_synapses(const T* const* weight, const Column* const* column, int64_t count,
                               const T* x, vec<T>* acc) {
  constexpr int V = kStrip<T, Tile>, L = kLanes<T>, BL = kBlockLanes<T>;
  const auto synapse = [&](auto d, int64_t k, vec<T> w) DK_LAMBDA {
    const T* row = x + int64_t(column[d][k]) * Tile;
    unroll<V>([&](auto t) DK_LAMBDA { acc[d * V + t] = w * load(row + t * L) + acc[d * V + t]; });
  };
  int64_t k = 0;
  for (; k + BL <= count; k += BL) {
    vec<T> block[ND];
    unroll<ND>([&](auto d) DK_LAMBDA { block[d] = load_block(weight[d] + k); });
    unroll<BL>([&](auto j) DK_LAMBDA {
      unroll<ND>([&](auto d) DK_LAMBDA { synapse(d, k + j, splat_lane<T, j>(block[d])); });
    });
  }
  if constexpr (FanIn == 0 || FanIn % BL != 0)
    for (; k < count; ++k)
      unroll<ND>([&](auto d) DK_LAMBDA { synapse(d, k, splat(weight[d][k])); });
}

// Pre-activations u of ND neighbouring dendrites. FanIn > 0 fixes the trip count at compile time.
template <class T, int Tile, int FanIn, int ND, class Column>
DK_INLINE void dendrites(const dk::Topology& net, const dk::ForwardCall<T>& call, const T* x,
                         int64_t r, vec<T>* u) {
  constexpr int V = kStrip<T, Tile>;
  const T* weight[ND];
  const Column* column[ND];
  int64_t count[ND];
  unroll<ND>([&](auto d) DK_LAMBDA {
    const int64_t begin = FanIn ? (r + d) * FanIn : int64_t(net.crow[r + d]);
    count[d] = FanIn ? FanIn : net.crow[r + d + 1] - begin;
    weight[d] = call.weight + begin;
    column[d] = static_cast<const Column*>(net.columns) + begin;
    const vec<T> bias = splat(call.dendrite_bias ? call.dendrite_bias[r + d] : T(0));
    unroll<V>([&](auto t) DK_LAMBDA { u[d * V + t] = bias; });
  });
  int64_t common = count[0];
  unroll<ND>([&](auto d) DK_LAMBDA { common = min64(common, count[d]); });
  gather_synapses<T, Tile, FanIn, ND, Column>(weight, column, FanIn ? FanIn : common, x, u);
  if constexpr (FanIn == 0 && ND > 1) {
    unroll<ND>([&](auto d) DK_LAMBDA {
      const T* w = weight[d] + common;
      const Column* c = column[d] + common;
      gather_synapses<T, Tile, 0, 1, Column>(&w, &c, count[d] - common, x, u + d * V);
    });
  }
}

// Sign bits of one strip: its own bytes of the dendrite's 32-bit word.
template <class T, int V>
DK_INLINE void store_signs(uint32_t* word, int strip, const vec<T>* u) {
  constexpr int kBits = V * kLanes<T>;
  const uint32_t bits = positive_bits<T, V>(u);
  memcpy(reinterpret_cast<char*>(word) + strip * kBits / 8, &bits, kBits / 8);
}

template <class T>
DK_INLINE vec<T> leaky_relu(vec<T> u, vec<T> slope) {
  return u > vec<T>{} ? u : u * slope;
}

// Somas s0..s1-1 of one strip -> y[soma - s0][tile]
template <class T, int Tile, int FanIn, class Column>
__attribute__((noinline)) void forward_somas(const dk::Topology& net,
                                             const dk::ForwardCall<T>& call, const T* x, int strip,
                                             int64_t s0, int64_t s1, uint32_t* signs, T* y) {
  constexpr int V = kStrip<T, Tile>, L = kLanes<T>;
  x += strip * V * L;
  y += strip * V * L;
  const vec<T> slope = splat(call.slope);
  for (int64_t s = s0; s < s1; ++s) {
    vec<T> v[V];
    const vec<T> bias = splat(call.soma_bias ? call.soma_bias[s] : T(0));
    unroll<V>([&](auto t) DK_LAMBDA { v[t] = bias; });
    const auto cable = [&](int64_t r, const vec<T>* u) DK_LAMBDA {
      if (signs) store_signs<T, V>(signs + r, strip, u);
      const vec<T> c = splat(call.cable[r]);
      unroll<V>([&](auto t) DK_LAMBDA { v[t] = c * leaky_relu<T>(u[t], slope) + v[t]; });
    };
    int64_t r = net.soma_ptr[s];
    const int64_t end = net.soma_ptr[s + 1];
    for (; r + 2 <= end; r += 2) {
      vec<T> u[2 * V];
      dendrites<T, Tile, FanIn, 2, Column>(net, call, x, r, u);
      cable(r, u);
      cable(r + 1, u + V);
    }
    if (r < end) {
      vec<T> u[V];
      dendrites<T, Tile, FanIn, 1, Column>(net, call, x, r, u);
      cable(r, u);
    }
    T* out = y + (s - s0) * Tile;
    unroll<V>([&](auto t) DK_LAMBDA { store(out + t * L, leaky_relu<T>(v[t], slope)); });
  }
}

// Rows r0..r1-1 of one strip, no soma stage -> u[row - r0][tile]
template <class T, int Tile, int FanIn, class Column>
__attribute__((noinline)) void forward_rows(const dk::Topology& net, const dk::ForwardCall<T>& call,
                                            const T* x, int strip, int64_t r0, int64_t r1,
                                            uint32_t*, T* y) {
  constexpr int V = kStrip<T, Tile>, L = kLanes<T>;
  x += strip * V * L;
  y += strip * V * L;
  int64_t r = r0;
  for (; r + 2 <= r1; r += 2) {
    vec<T> u[2 * V];
    dendrites<T, Tile, FanIn, 2, Column>(net, call, x, r, u);
    unroll<2>([&](auto d) DK_LAMBDA {
      unroll<V>([&](auto t) DK_LAMBDA { store(y + (r + d - r0) * Tile + t * L, u[d * V + t]); });
    });
  }
  if (r < r1) {
    vec<T> u[V];
    dendrites<T, Tile, FanIn, 1, Column>(net, call, x, r, u);
    unroll<V>([&](auto t) DK_LAMBDA { store(y + (r - r0) * Tile + t * L, u[t]); });
  }
}

template <class T>
using ForwardKernel = void (*)(const dk::Topology&, const dk::ForwardCall<T>&, const T*, int,
                               int64_t, int64_t, uint32_t*, T*);

template <class T, int Tile, class Column>
ForwardKernel<T> pick_forward(int64_t fan_in, bool somas) {
#define DK_FAN_IN(K) \
  case K:            \
    return somas ? forward_somas<T, Tile, K, Column> : forward_rows<T, Tile, K, Column>;
  switch (fan_in) {
    DK_FAN_IN(8)
    DK_FAN_IN(16)
    DK_FAN_IN(32)
    DK_FAN_IN(48)
    default:
      return somas ? forward_somas<T, Tile, 0, Column> : forward_rows<T, Tile, 0, Column>;
  }
#undef DK_FAN_IN
}

// First soma (or row) whose share of the work starts at or after `target`; a dendrite costs its
// synapses and 4 more.
DK_INLINE int64_t find_output(const dk::Topology& net, bool somas, int64_t outputs,
                              int64_t target) {
  int64_t lo = 0, hi = outputs;
  while (lo < hi) {
    const int64_t mid = (lo + hi) / 2, r = somas ? net.soma_ptr[mid] : mid;
    if (net.crow[r] + 4 * r < target)
      lo = mid + 1;
    else
      hi = mid;
  }
  return lo;
}

// Work is the line (tile 0, all outputs), (tile 1, all outputs), ...; every thread takes an equal
// stretch of it and transposes the tiles that it meets for itself: no barrier, and a small batch
// still splits over the outputs.
template <class T, int Tile>
void forward_tiled(const dk::Topology& net, const dk::ForwardCall<T>& call,
                   const dk::Runtime& runtime) {
  constexpr int kChunk = 16;  // outputs per transpose back
  constexpr int kStrips = Tile / (kStrip<T, Tile> * kLanes<T>);
  const bool somas = call.cable != nullptr;
  const int64_t outputs = somas ? net.somas : net.rows, N = net.in_features;
  const int64_t tiles = ceil_div(call.batch, Tile), cost = net.nnz + 4 * net.rows,
                total = tiles * cost;
  const int64_t threads = useful_threads(runtime, total);
  const auto kernel = net.narrow ? pick_forward<T, Tile, uint16_t>(net.fan_in, somas)
                                 : pick_forward<T, Tile, int32_t>(net.fan_in, somas);
  Carver carver;
  const int64_t x_tile = carver.reserve<T>(threads * N * Tile),
                y_tile = carver.reserve<T>(threads * kChunk * Tile);
  carver.allocate(runtime);
  parallel(runtime, threads, [&](int64_t thread) {
    const int64_t begin = total * thread / threads, end = total * (thread + 1) / threads;
    T* xt = carver.at<T>(x_tile) + thread * N * Tile;
    T* yt = carver.at<T>(y_tile) + thread * kChunk * Tile;
    for (int64_t tile = begin / cost; tile < tiles && tile * cost < end; ++tile) {
      const int64_t first = find_output(net, somas, outputs, begin - tile * cost);
      const int64_t last =
          (tile + 1) * cost <= end ? outputs : find_output(net, somas, outputs, end - tile * cost);
      if (first >= last) continue;
      const int64_t sample = tile * Tile, samples = min64(Tile, call.batch - sample);
      transpose_in<T, Tile / kLanes<T>>(Rows<T>{call.x + sample * N, N}, samples, 0, N, xt);
      uint32_t* signs = call.signs ? call.signs + tile * net.rows : nullptr;
      for (int64_t o = first; o < last; o += kChunk) {
        const int64_t stop = min64(last, o + kChunk);
        for (int strip = 0; strip < kStrips; ++strip)
          kernel(net, call, xt, strip, o, stop, signs, yt);
        transpose_out<T, Tile / kLanes<T>>(yt, stop - o, samples, call.y + sample * outputs + o,
                                           outputs);
      }
    }
  });
}

template <class T>
void forward(const dk::Topology& net, const dk::ForwardCall<T>& call, const dk::Runtime& runtime) {
  if (call.batch <= 16) return forward_tiled<T, 16>(net, call, runtime);
  forward_tiled<T, 32>(net, call, runtime);
}

}  // namespace
