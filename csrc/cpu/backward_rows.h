// Backward without the transposed plan: rows of x are gathered in CSR order. For calls without dx
// and for small batches.
#pragma once

#include "samples.h"

namespace {

constexpr int64_t kRowBlock = 128;  // dendrites whose q and G stay in L1

// Whether the synapses of every row are a whole number of vectors.
template <class T>
DK_INLINE bool whole_rows(const dk::Topology& net) {
  return net.fan_in > 0 && net.fan_in % kLanes<T> == 0;
}

// Size of G of the dendrite at position p, padded to whole vectors.
template <class T>
DK_INLINE int64_t padded_row(const dk::Topology& net, int64_t p) {
  const int64_t r = dendrite_at(net, p);
  return ceil_div(net.crow[r + 1] - net.crow[r], kLanes<T>) * kLanes<T>;
}

// An upper bound of that size for positions p0..p1-1 together.
template <class T>
DK_INLINE int64_t padded_rows(const dk::Topology& net, int64_t p0, int64_t p1) {
  const int32_t* crow = net.order ? net.ordered_crow : net.crow;
  const int64_t pads = whole_rows<T>(net) ? 0 : (kLanes<T> - 1) * (p1 - p0);
  return crow[p1] - crow[p0] + pads;
}

// G of positions p0..p1-1 on one tile, one padded row after the other; returns their end.
// WithInput: also dx += w c q. Whole: every row has net.fan_in synapses, a whole number of vectors,
// so that the loop reads no row lengths and has no remainder (5 % faster).
template <class T, int V, class Column, bool WithInput, bool Whole>
__attribute__((noinline)) T* gather_rows(const dk::Topology& net, const dk::BackwardCall<T>& call,
                                         int64_t p0, int64_t p1, int64_t tile, const T* soma_grad,
                                         const T* x, bool first, T* buffer, T* G0, T* G, T* dx) {
  constexpr int L = kLanes<T>, kTile = V * L, BL = kBlockLanes<T>, kGroups = L / BL;
  const int32_t* crow = net.order ? net.ordered_crow : net.crow;
  const auto* columns = static_cast<const Column*>(net.order ? net.ordered_columns : net.columns);
  T* out = G;
  for_each_q<T, V>(
      net, call, p0, p1, tile, soma_grad, first, buffer, G0,
      [&](int64_t p, const vec<T>* q) DK_LAMBDA {
        const int64_t begin = Whole ? p * net.fan_in : int64_t(crow[p]);
        const int64_t count = Whole ? net.fan_in : crow[p + 1] - begin;
        const Column* column = columns + begin;
        const T* weight = call.weight + begin;
        const T cable = WithInput ? cable_weight(call, p) : T(0);
        const auto product = [&](int64_t k) DK_LAMBDA {
          const int64_t at = int64_t(column[k]) * kTile;
          const vec<T> w = WithInput ? splat(weight[k] * cable) : vec<T>{};
          vec<T> sum;
          unroll<V>([&](auto t) DK_LAMBDA {
            sum = t == 0 ? q[t] * load(x + at + t * L) : q[t] * load(x + at + t * L) + sum;
            if constexpr (WithInput) store(dx + at + t * L, w * q[t] + load(dx + at + t * L));
          });
          return sum;
        };
        for (int64_t k = 0; k < count; k += L, out += L) {
          vec<T> folded[kGroups];
          if (Whole || k + L <= count)
            unroll<kGroups>([&](auto g) DK_LAMBDA {
              vec<T> products[BL];
              unroll<BL>([&](auto s) DK_LAMBDA { products[s] = product(k + g * BL + s); });
              folded[g] = fold_group<T>(products);
            });
          else
            unroll<kGroups>([&](auto g) DK_LAMBDA {
              vec<T> products[BL];
              unroll<BL>([&](auto s) DK_LAMBDA {
                products[s] = k + g * BL + s < count ? product(k + g * BL + s) : vec<T>{};
              });
              folded[g] = fold_group<T>(products);
            });
          const vec<T> sums = fold_groups<T>(folded);
          store(out, first ? sums : sums + load(out));
        }
      });
  return out;
}

template <class T, int V, bool WithInput>
auto pick_gather_rows(const dk::Topology& net) {
  if constexpr (!WithInput)
    if (whole_rows<T>(net) && net.narrow) return gather_rows<T, V, uint16_t, false, true>;
  return net.narrow ? gather_rows<T, V, uint16_t, WithInput, false>
                    : gather_rows<T, V, int32_t, WithInput, false>;
}

// The gradients of the parameters of positions p0..p1-1, from G (padded rows) and G0. One vector of
// dendrites at a time.
template <class T>
__attribute__((noinline)) void finish_rows(const dk::Topology& net, const dk::BackwardCall<T>& call,
                                           int64_t p0, int64_t p1, const T* G, const T* G0) {
  constexpr int L = kLanes<T>;
  for (int64_t p = p0; p < p1; p += L) {
    const int count = int(min64(L, p1 - p));
    vec<T> dots[L] = {};
    for (int i = 0; i < count; ++i) {
      dots[i] = weight_gradient<T>(net, call, dendrite_at(net, p + i),
                                   [&](int64_t k, int) DK_LAMBDA { return load(G + k); });
      G += padded_row<T>(net, p + i);
    }
    finish_dendrites(net, call, p, count, dots, load_part(G0 + p, count));
  }
}

// Threads own blocks of dendrites, so G needs no copies. WithInput is for batches of one tile: for
// so few samples, bringing weights and gradients into the order of the plan and back costs more
// than the plan saves.
template <class T, int V, bool WithInput>
void backward_by_rows(const dk::Topology& net, const dk::BackwardCall<T>& call,
                      const dk::Runtime& runtime) {
  constexpr int kTile = V * kLanes<T>;
  const int64_t N = net.in_features, R = net.rows, threads = runtime.threads;
  Carver carver;
  const Samples<T, V> samples(net, call, threads, carver);
  const int64_t tiles = samples.tiles(), blocks = ceil_div(R, kRowBlock),
                share = ceil_div(blocks, threads) * kRowBlock;
  // Where x takes at most half of L2, the outer loop is over blocks: q and G of a block stay in L1
  // for all tiles. Else it is over tiles: a tile of x stays in L2 for all blocks of the thread.
  const bool block_outer =
      tiles == 1 || call.batch * N * int64_t(sizeof(T)) <= runtime.l2_bytes / 2;
  const int64_t at_once = block_outer ? kRowBlock : share;
  // G of all blocks has the size of dw and can be accumulated there.
  const bool in_place = !block_outer && !net.order && whole_rows<T>(net);
  int64_t widest = 0;  // size of the largest G of `at_once` dendrites
  for (int64_t first = 0; first < R && !in_place; first += at_once)
    widest = max64(widest, padded_rows<T>(net, first, min64(R, first + at_once)));
  // After this many dendrites dx starts another sum, so that chains stay short (kStretch).
  const int64_t stretch = max64(1, blocks * kStretch * N / max64(1, net.nnz)) * kRowBlock;
  const int64_t G0_at = carver.reserve<T>(R), G_at = carver.reserve<T>(threads * widest);
  const int64_t q_at = carver.reserve<T>(threads * kRowBlock * kTile),
                dx_at = carver.reserve<T>(WithInput ? threads * N * kTile : 0),
                stretch_at =
                    carver.reserve<T>(WithInput && stretch < share ? threads * N * kTile : 0);
  carver.allocate(runtime);
  T* G0 = carver.at<T>(G0_at);

  samples.share(runtime);
  const auto gather = pick_gather_rows<T, V, WithInput>(net);
  parallel(runtime, threads, [&](int64_t i) {
    const int64_t begin = min64(R, i * share), end = min64(R, begin + share);
    T *G = in_place ? call.dweight + begin * net.fan_in : carver.at<T>(G_at) + i * widest,
      *q = carver.at<T>(q_at) + i * kRowBlock * kTile;
    T *sum = carver.at<T>(dx_at) + (WithInput ? i * N * kTile : 0), *dx = sum;
    samples.take(i, begin, end);
    if (WithInput) memset(dx, 0, size_t(N) * kTile * sizeof(T));
    for (int64_t first = begin; first < end; first += at_once) {
      const int64_t last = min64(end, first + at_once);
      if (WithInput && first > begin && (first - begin) % stretch == 0) {
        if (dx != sum) add_to(N * kTile, dx, sum);
        dx = carver.at<T>(stretch_at) + i * N * kTile;
        memset(dx, 0, size_t(N) * kTile * sizeof(T));
      }
      for (int64_t tile = 0; tile < tiles; ++tile) {
        T* out = G;
        for (int64_t p = first; p < last; p += kRowBlock)
          out = gather(net, call, p, min64(last, p + kRowBlock), tile, samples.soma(i, tile),
                       samples.x(i, tile), tile == 0, q, G0, out, dx);
      }
      finish_rows(net, call, first, last, G, G0);
    }
    if (dx != sum) add_to(N * kTile, dx, sum);
  });
  if constexpr (WithInput) finish_dx<T, V>(net, call, runtime, threads, carver.at<T>(dx_at));
}

// For batches much larger than the network. Threads own tiles and have their own copies of
// everything; the copies of G are added up at the end.
template <class T, int V>
void backward_rows_by_tiles(const dk::Topology& net, const dk::BackwardCall<T>& call,
                            const dk::Runtime& runtime) {
  constexpr int kTile = V * kLanes<T>;
  const int64_t N = net.in_features, S = call.cable ? net.somas : 0, R = net.rows;
  const int64_t tiles = ceil_div(call.batch, kTile), threads = min64(runtime.threads, tiles);
  const auto gather = pick_gather_rows<T, V, false>(net);
  const auto room = [&](int64_t p0, int64_t p1) {  // size of G of these positions
    int64_t size = 0;
    for (int64_t p = p0; p < p1; ++p) size += padded_row<T>(net, p);
    return size;
  };
  const int64_t slots = room(0, R);
  Carver carver;
  const int64_t x_at = carver.reserve<T>(threads * N * kTile),
                soma_at = carver.reserve<T>(threads * S * kTile),
                q_at = carver.reserve<T>(threads * kRowBlock * kTile);
  const int64_t G_at = carver.reserve<T>(threads * slots), G0_at = carver.reserve<T>(threads * R),
                bias_at = carver.reserve<T>(threads * S);
  carver.allocate(runtime);
  T *G = carver.at<T>(G_at), *G0 = carver.at<T>(G0_at), *bias = carver.at<T>(bias_at);

  parallel(runtime, threads, [&](int64_t i) {
    T *x = carver.at<T>(x_at) + i * N * kTile, *soma = carver.at<T>(soma_at) + i * S * kTile,
      *q = carver.at<T>(q_at) + i * kRowBlock * kTile;
    const int64_t begin = tiles * i / threads, end = tiles * (i + 1) / threads;
    for (int64_t tile = begin; tile < end; ++tile) {
      const bool first = tile == begin;
      tile_in<T, V>(call.storage, call.x, tile * kTile, min64(kTile, call.batch - tile * kTile), N,
                    0, N, x);
      if (S) soma_gradient<T, V>(net, call, tile, 0, S, first, soma, bias + i * S);
      T* out = G + i * slots;
      for (int64_t p = 0; p < R; p += kRowBlock)
        out = gather(net, call, p, min64(R, p + kRowBlock), tile, S ? soma : nullptr, x, first, q,
                     G0 + i * R, out, nullptr);
    }
  });
  parallel(runtime, threads, [&](int64_t i) {
    const int64_t begin = R * i / threads, end = R * (i + 1) / threads;
    T* sum = G + room(0, begin);
    for (int64_t p0 = begin; p0 < end; p0 += kRowBlock) {
      const int64_t p1 = min64(end, p0 + kRowBlock), size = room(p0, p1);
      for (int64_t copy = 1; copy < threads; ++copy) {
        add_to(size, sum + copy * slots, sum);
        for (int64_t p = p0; p < p1; ++p) G0[p] += G0[copy * R + p];
      }
      finish_rows(net, call, p0, p1, sum, G0);
      sum += size;
    }
    for (int64_t s = S * i / threads; s < S * (i + 1) / threads; ++s) {
      T sum = 0;
      for (int64_t copy = 0; copy < threads; ++copy) sum += bias[copy * S + s];
      call.dsoma_bias[s] = sum;
    }
  });
}

}  // namespace
