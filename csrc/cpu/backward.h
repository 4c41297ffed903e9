// Fused backward. With q[b, r] = (gradient at the soma) * (derivative of the dendrite, from its
// sign bit) and G[r, k] = sum_b q * x, G0[r] = sum_b q:   dw = c G,   dbd = c G0,   dc = <w_r, G_r>
// + bd G0,   dx = sum w c q. A sparse linear layer is the same with q = incoming gradient and c
// = 1. u and a are never needed.
#pragma once

#include "tile.h"

namespace {

template <class T>
DK_INLINE T cable_weight(const dk::BackwardCall<T>& call, int64_t r) {
  return call.cable ? call.cable[r] : T(1);
}

DK_INLINE int64_t soma_of(const dk::Topology& net, int64_t r) {
  int64_t lo = 0, hi = net.somas;  // the last soma that starts at or before r and is not empty
  while (hi - lo > 1) {
    const int64_t mid = (lo + hi) / 2;
    (net.soma_ptr[mid] <= r ? lo : hi) = mid;
  }
  return lo;
}

// Adds (or, the first time, writes) the lane sums of a stream of vectors to consecutive numbers.
template <class T>
class SumStream {
 public:
  DK_INLINE SumStream(T* out, bool first) : out_(out), first_(first) {}
  DK_INLINE void push(vec<T> v) {
    buffer_[count_] = v;
    if (++count_ == kLanes<T>) {
      const vec<T> sums = lane_sums<T>(buffer_);
      store(out_, first_ ? sums : sums + load(out_));
      out_ += kLanes<T>;
      count_ = 0;
    }
  }
  DK_INLINE void finish() {
    for (int i = 0; i < count_; ++i) {
      const T sum = lane_sum<T>(buffer_[i]);
      out_[i] = first_ ? sum : out_[i] + sum;
    }
    count_ = 0;
  }

 private:
  vec<T> buffer_[kLanes<T>];
  T* out_;
  bool first_;
  int count_ = 0;
};

// q of rows r0..r1-1 on tile `tile` -> q[row - r0][tile]; G0 += sum_b q.
// soma_grad[soma - first_soma][tile] is the gradient at the soma, or null: q is the incoming
// gradient itself.
template <class T, int V>
__attribute__((noinline)) void make_q(const dk::Topology& net, const dk::BackwardCall<T>& call,
                                      int64_t r0, int64_t r1, int64_t tile, const T* soma_grad,
                                      int64_t first_soma, bool first, T* q, T* G0) {
  constexpr int L = kLanes<T>, kTile = V * L;
  SumStream<T> sums(G0 + r0, first);
  const int64_t sample = tile * kTile;
  if (!soma_grad) {
    const Rows<T> grad{call.grad + sample * net.rows, net.rows};
    transpose_in<T, V>(grad, min64(kTile, call.batch - sample), r0, r1, q);
    for (int64_t r = r0; r < r1; ++r) {
      vec<T> sum{};
      unroll<V>([&](auto t) { sum += load(q + (r - r0) * kTile + t * L); });
      sums.push(sum);
    }
    sums.finish();
    return;
  }
  const vec<T> slope = splat(call.slope);
  for (int64_t r = r0, s = soma_of(net, r0); r < r1; ++s) {
    vec<T> active[V], inactive[V];
    unroll<V>([&](auto t) {
      active[t] = load(soma_grad + (s - first_soma) * kTile + t * L);
      inactive[t] = slope * active[t];
    });
    for (const int64_t end = min64(r1, net.soma_ptr[s + 1]); r < end; ++r) {
      T* out = q + (r - r0) * kTile;
      vec<T> sum{};
      unroll<V>([&](auto t) {
        const int64_t b = sample + t * L;
        const uint32_t bits = call.signs[b / 32 * net.rows + r] >> (b % 32);
        const vec<T> value = select_bits<T>(bits, active[t], inactive[t]);
        store(out + t * L, value);
        sum += value;
      });
      sums.push(sum);
    }
  }
  sums.finish();
}

// ---- with dx: one gather of q over a block of the transposed plan feeds both dx and G ----

// One block of dendrites on one tile. G in slot order. clear_dx: dx holds nothing yet, so rows
// without synapses are zeroed.
template <class T, int V, int Group, class Column>
__attribute__((noinline)) void gather_block(const dk::Topology& net, int64_t block, const T* weight,
                                            const T* q, const T* x, bool clear_dx, bool first,
                                            T* dx, T* G) {
  constexpr int L = kLanes<T>, kTile = V * L, BL = kBlockLanes<T>, kGroups = L / BL, kAhead = 3;
  const int64_t begin = net.plan_column_ptr[block], end = net.plan_column_ptr[block + 1];
  const Column* column = static_cast<const Column*>(net.plan_column);
  const uint16_t* row = net.plan_row + net.plan_slot_ptr[block];
  vec<T> folded[kGroups], single[L];
  int count = 0;
  const auto flush = [&](vec<T> sums) {
    store(G, first ? sums : sums + load(G));
    G += L;
    count = 0;
  };
  int64_t next = 0;  // dx rows before this one are written
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = column[i];
    const int64_t ahead = int64_t(column[min64(i + kAhead, end - 1)]) * kTile;
    unroll<V>([&](auto t) {
      __builtin_prefetch(x + ahead + t * L);
      __builtin_prefetch(dx + ahead + t * L, 1);
    });
    if (clear_dx) {
      memset(dx + next * kTile, 0, size_t(n + 1 - next) * kTile * sizeof(T));
      next = n + 1;
    }
    vec<T> xv[V], acc[V];
    unroll<V>([&](auto t) {
      xv[t] = load(x + n * kTile + t * L);
      acc[t] = load(dx + n * kTile + t * L);
    });
    const auto synapse = [&](int slot) {
      const vec<T> w = splat(weight[slot]);
      const T* p = q + int64_t(row[slot]) * kTile;
      vec<T> product{};
      unroll<V>([&](auto t) {
        const vec<T> value = load(p + t * L);
        acc[t] = w * value + acc[t];
        product = value * xv[t] + product;
      });
      return product;
    };
    for (int group = net.plan_groups[i]; group > 0; --group) {
      if constexpr (Group == 4) {
        vec<T> products[4];
        unroll<4>([&](auto s) { products[s] = synapse(s); });
        unroll<4 / BL>([&](auto g) {
          folded[count] = fold_group<T>(products + g * BL);
          if (++count == kGroups) flush(fold_groups<T>(folded));
        });
      } else {
        single[count] = synapse(0);
        if (++count == L) flush(lane_sums<T>(single));
      }
      weight += Group;
      row += Group;
    }
    unroll<V>([&](auto t) { store(dx + n * kTile + t * L, acc[t]); });
  }
  if (clear_dx) memset(dx + next * kTile, 0, size_t(net.in_features - next) * kTile * sizeof(T));
  if (count > 0) {  // a block's slots are padded to whole vectors, so the last store stays inside
    if constexpr (Group == 4) {
      for (int i = count; i < kGroups; ++i) folded[i] = vec<T>{};
      flush(fold_groups<T>(folded));
    } else {
      for (int i = count; i < L; ++i) single[i] = vec<T>{};
      flush(lane_sums<T>(single));
    }
  }
}

// w c of one block in slot order; pads stay zero.
template <class T>
__attribute__((noinline)) void fill_weights(const dk::Topology& net,
                                            const dk::BackwardCall<T>& call, int64_t block,
                                            T* out) {
  memset(out, 0, size_t(net.plan_slot_ptr[block + 1] - net.plan_slot_ptr[block]) * sizeof(T));
  const int64_t r1 = min64(net.rows, (block + 1) * net.block_rows);
  for (int64_t r = block * net.block_rows; r < r1; ++r) {
    const T c = cable_weight(call, r);
    for (int64_t j = net.crow[r]; j < net.crow[r + 1]; ++j)
      out[net.plan_slot[j]] = call.weight[j] * c;
  }
}

// Parameter gradients of one dendrite from its G (given by position in the row) and G0.
template <class T, class Position>
DK_INLINE void finish_row(const dk::Topology& net, const dk::BackwardCall<T>& call, int64_t r, T G0,
                          const Position& G) {
  const T c = cable_weight(call, r);
  T dot = call.dendrite_bias ? call.dendrite_bias[r] * G0 : T(0);
  for (int64_t j = net.crow[r]; j < net.crow[r + 1]; ++j) {
    const T g = G(j);
    dot += call.weight[j] * g;
    call.dweight[j] = c * g;
  }
  call.ddendrite_bias[r] = c * G0;
  if (call.dcable) call.dcable[r] = dot;
}

// copies > 1: G and G0 are the sums of that many partial arrays, `stride` and `rows` apart.
template <class T>
__attribute__((noinline)) void finish_block(const dk::Topology& net,
                                            const dk::BackwardCall<T>& call, int64_t block,
                                            int64_t copies, const T* G, int64_t stride,
                                            const T* G0) {
  G += net.plan_slot_ptr[block];
  const int64_t r1 = min64(net.rows, (block + 1) * net.block_rows);
  for (int64_t r = block * net.block_rows; r < r1; ++r) {
    T sum = 0;
    for (int64_t i = 0; i < copies; ++i) sum += G0[i * net.rows + r];
    finish_row(net, call, r, sum, [&](int64_t j) {
      T g = 0;
      for (int64_t i = 0; i < copies; ++i) g += G[i * stride + net.plan_slot[j]];
      return g;
    });
  }
}

template <class T, int V, class Column>
void gather(const dk::Topology& net, int64_t block, const T* weight, const T* q, const T* x,
            bool clear_dx, bool first, T* dx, T* G) {
  weight += net.plan_slot_ptr[block];
  G += net.plan_slot_ptr[block];
  if (net.group == 4)
    gather_block<T, V, 4, Column>(net, block, weight, q, x, clear_dx, first, dx, G);
  else
    gather_block<T, V, 1, Column>(net, block, weight, q, x, clear_dx, first, dx, G);
}

// Gradient at the somas [s0, s1) of one tile -> out[soma - s0][tile]; dsoma_bias += its sums.
template <class T, int V>
void soma_gradient(const dk::Topology& net, const dk::BackwardCall<T>& call, int64_t tile,
                   int64_t s0, int64_t s1, bool first, T* out, T* dsoma_bias) {
  constexpr int L = kLanes<T>, kTile = V * L;
  const int64_t sample = tile * kTile, S = net.somas;
  const SomaGradient<T> source{call.grad + sample * S, call.y + sample * S, S, call.slope};
  transpose_in<T, V>(source, min64(kTile, call.batch - sample), s0, s1, out);
  SumStream<T> sums(dsoma_bias + s0, first);
  for (int64_t s = s0; s < s1; ++s) {
    vec<T> sum{};
    unroll<V>([&](auto t) { sum += load(out + (s - s0) * kTile + t * L); });
    sums.push(sum);
  }
  sums.finish();
}

// Whole vectors of [0, n) for part `i` of `parts`.
template <class T>
DK_INLINE int64_t split(int64_t n, int64_t i, int64_t parts) {
  const int64_t L = kLanes<T>;
  return min64(n, ceil_div(n, L) * i / parts * L);
}

// Threads own blocks of dendrites: G is shared, dx is private and added up while it is transposed
// back. block_outer keeps a block's weights, plan and G hot over all tiles while x fits the cache;
// else tiles go outside.
template <class T, int V, class Column>
void backward_by_blocks(const dk::Topology& net, const dk::BackwardCall<T>& call,
                        const dk::Runtime& runtime) {
  constexpr int kTile = V * kLanes<T>;
  constexpr int64_t kHotBytes = 3 << 19;  // 1.5 MB
  const int64_t N = net.in_features, S = call.cable ? net.somas : 0,
                slots = net.plan_slot_ptr[net.blocks];
  const int64_t tiles = ceil_div(call.batch, kTile), threads = min64(runtime.threads, net.blocks);
  const bool block_outer = call.batch * N * int64_t(sizeof(T)) <= kHotBytes;
  Carver carver;
  const int64_t x_at = carver.reserve<T>(tiles * N * kTile),
                soma_at = carver.reserve<T>(tiles * S * kTile);
  const int64_t weight_at = carver.reserve<T>(slots), G_at = carver.reserve<T>(slots),
                G0_at = carver.reserve<T>(net.rows);
  const int64_t q_at = carver.reserve<T>(threads * net.block_rows * kTile),
                dx_at = carver.reserve<T>(threads * tiles * N * kTile);
  carver.allocate(runtime);
  T *x = carver.at<T>(x_at), *soma = carver.at<T>(soma_at), *weight = carver.at<T>(weight_at),
    *G = carver.at<T>(G_at);
  T *G0 = carver.at<T>(G0_at), *dx = carver.at<T>(dx_at);
  const auto samples = [&](int64_t tile) { return min64(kTile, call.batch - tile * kTile); };

  parallel(runtime, runtime.threads, [&](int64_t i) {
    const int64_t n0 = split<T>(N, i, runtime.threads), n1 = split<T>(N, i + 1, runtime.threads);
    const int64_t s0 = split<T>(S, i, runtime.threads), s1 = split<T>(S, i + 1, runtime.threads);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      transpose_in<T, V>(Rows<T>{call.x + tile * kTile * N, N}, samples(tile), n0, n1,
                         x + (tile * N + n0) * kTile);
      if (s0 < s1)
        soma_gradient<T, V>(net, call, tile, s0, s1, tile == 0, soma + (tile * S + s0) * kTile,
                            call.dsoma_bias);
    }
  });
  parallel(runtime, threads, [&](int64_t i) {
    const int64_t b0 = net.blocks * i / threads, b1 = net.blocks * (i + 1) / threads;
    T* q = carver.at<T>(q_at) + i * net.block_rows * kTile;
    T* own = dx + i * tiles * N * kTile;
    const auto work = [&](int64_t block, int64_t tile) {
      const int64_t r0 = block * net.block_rows, r1 = min64(net.rows, r0 + net.block_rows);
      make_q<T, V>(net, call, r0, r1, tile, S ? soma + tile * S * kTile : nullptr, 0, tile == 0, q,
                   G0);
      gather<T, V, Column>(net, block, weight, q, x + tile * N * kTile, block == b0, tile == 0,
                           own + tile * N * kTile, G);
    };
    if (block_outer) {
      for (int64_t block = b0; block < b1; ++block) {
        fill_weights(net, call, block, weight + net.plan_slot_ptr[block]);
        for (int64_t tile = 0; tile < tiles; ++tile) work(block, tile);
        finish_block(net, call, block, 1, G, 0, G0);
      }
    } else {
      for (int64_t block = b0; block < b1; ++block)
        fill_weights(net, call, block, weight + net.plan_slot_ptr[block]);
      for (int64_t tile = 0; tile < tiles; ++tile)
        for (int64_t block = b0; block < b1; ++block) work(block, tile);
      for (int64_t block = b0; block < b1; ++block) finish_block(net, call, block, 1, G, 0, G0);
    }
  });
  parallel(runtime, runtime.threads, [&](int64_t i) {
    const int64_t n0 = split<T>(N, i, runtime.threads), n1 = split<T>(N, i + 1, runtime.threads);
    if (n0 >= n1) return;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      T* sum = dx + (tile * N + n0) * kTile;
      for (int64_t other = 1; other < threads; ++other) {
        const T* partial = sum + other * tiles * N * kTile;
        for (int64_t e = 0; e < (n1 - n0) * kTile; e += kLanes<T>)
          store(sum + e, load(sum + e) + load(partial + e));
      }
      transpose_out<T, V>(sum, n1 - n0, samples(tile), call.dx + tile * kTile * N + n0, N);
    }
  });
}

// Threads own batch tiles: x, dx and q are private and small, G is private and added up at the end.
template <class T, int V, class Column>
void backward_by_tiles(const dk::Topology& net, const dk::BackwardCall<T>& call,
                       const dk::Runtime& runtime) {
  constexpr int kTile = V * kLanes<T>;
  const int64_t N = net.in_features, S = call.cable ? net.somas : 0, R = net.rows,
                slots = net.plan_slot_ptr[net.blocks];
  const int64_t tiles = ceil_div(call.batch, kTile), threads = min64(runtime.threads, tiles);
  Carver carver;
  const int64_t x_at = carver.reserve<T>(threads * N * kTile),
                soma_at = carver.reserve<T>(threads * S * kTile);
  const int64_t q_at = carver.reserve<T>(threads * net.block_rows * kTile),
                dx_at = carver.reserve<T>(threads * N * kTile);
  const int64_t weight_at = carver.reserve<T>(slots), G_at = carver.reserve<T>(threads * slots);
  const int64_t G0_at = carver.reserve<T>(threads * R), bias_at = carver.reserve<T>(threads * S);
  carver.allocate(runtime);
  T *weight = carver.at<T>(weight_at), *G = carver.at<T>(G_at), *G0 = carver.at<T>(G0_at),
    *bias = carver.at<T>(bias_at);

  parallel(runtime, min64(runtime.threads, net.blocks), [&](int64_t i) {
    const int64_t parts = min64(runtime.threads, net.blocks);
    for (int64_t block = net.blocks * i / parts; block < net.blocks * (i + 1) / parts; ++block)
      fill_weights(net, call, block, weight + net.plan_slot_ptr[block]);
  });
  parallel(runtime, threads, [&](int64_t i) {
    T *x = carver.at<T>(x_at) + i * N * kTile, *dx = carver.at<T>(dx_at) + i * N * kTile;
    T *soma = carver.at<T>(soma_at) + i * S * kTile,
      *q = carver.at<T>(q_at) + i * net.block_rows * kTile;
    const int64_t begin = tiles * i / threads, end = tiles * (i + 1) / threads;
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t samples = min64(kTile, call.batch - tile * kTile);
      const bool first = tile == begin;
      transpose_in<T, V>(Rows<T>{call.x + tile * kTile * N, N}, samples, 0, N, x);
      if (S) soma_gradient<T, V>(net, call, tile, 0, S, first, soma, bias + i * S);
      for (int64_t block = 0; block < net.blocks; ++block) {
        const int64_t r0 = block * net.block_rows, r1 = min64(R, r0 + net.block_rows);
        make_q<T, V>(net, call, r0, r1, tile, S ? soma : nullptr, 0, first, q, G0 + i * R);
        gather<T, V, Column>(net, block, weight, q, x, block == 0, first, dx, G + i * slots);
      }
      transpose_out<T, V>(dx, N, samples, call.dx + tile * kTile * N, N);
    }
  });
  parallel(runtime, min64(runtime.threads, net.blocks), [&](int64_t i) {
    const int64_t parts = min64(runtime.threads, net.blocks);
    for (int64_t block = net.blocks * i / parts; block < net.blocks * (i + 1) / parts; ++block)
      finish_block(net, call, block, threads, G, slots, G0);
    for (int64_t s = S * i / parts; s < S * (i + 1) / parts; ++s) {
      T sum = 0;
      for (int64_t copy = 0; copy < threads; ++copy) sum += bias[copy * S + s];
      call.dsoma_bias[s] = sum;
    }
  });
}

// ---- without dx: gather rows of x in CSR order, no plan ----

// G of rows r0..r1-1 on one tile, row r at gap(r) = crow[r] - crow[r0] + (r - r0) * kLanes, so that
// each row may end in a whole vector without touching the next.
template <class T, int V, class Column>
__attribute__((noinline)) void gather_rows(const dk::Topology& net, int64_t r0, int64_t r1,
                                           const T* q, const T* x, bool first, T* G) {
  constexpr int L = kLanes<T>, kTile = V * L, BL = kBlockLanes<T>, kGroups = L / BL;
  for (int64_t r = r0; r < r1; ++r) {
    vec<T> qv[V];
    unroll<V>([&](auto t) { qv[t] = load(q + (r - r0) * kTile + t * L); });
    const int64_t count = net.crow[r + 1] - net.crow[r];
    const Column* column = static_cast<const Column*>(net.columns) + net.crow[r];
    T* out = G + (net.crow[r] - net.crow[r0]) + (r - r0) * L;
    const auto product = [&](int64_t k) {
      const T* p = x + int64_t(column[k]) * kTile;
      vec<T> sum{};
      unroll<V>([&](auto t) { sum = qv[t] * load(p + t * L) + sum; });
      return sum;
    };
    for (int64_t k = 0; k < count; k += L, out += L) {
      vec<T> folded[kGroups];
      if (k + L <= count)
        unroll<kGroups>([&](auto g) {
          vec<T> products[BL];
          unroll<BL>([&](auto s) { products[s] = product(k + g * BL + s); });
          folded[g] = fold_group<T>(products);
        });
      else
        unroll<kGroups>([&](auto g) {
          vec<T> products[BL];
          unroll<BL>([&](auto s) {
            products[s] = k + g * BL + s < count ? product(k + g * BL + s) : vec<T>{};
          });
          folded[g] = fold_group<T>(products);
        });
      const vec<T> sums = fold_groups<T>(folded);
      store(out, first ? sums : sums + load(out));
    }
  }
}

template <class T, int V, class Column>
void backward_weights(const dk::Topology& net, const dk::BackwardCall<T>& call,
                      const dk::Runtime& runtime) {
  constexpr int L = kLanes<T>, kTile = V * L;
  constexpr int64_t kHotBytes = 3 << 19;
  const int64_t N = net.in_features, S = call.cable ? net.somas : 0, R = net.rows,
                threads = runtime.threads;
  const int64_t tiles = ceil_div(call.batch, kTile);
  // Small blocks keep q in L1; where x itself streams from memory, large ones pass over it less
  // often.
  const int64_t block_rows = call.batch * N * int64_t(sizeof(T)) <= kHotBytes ? 128 : 1024;
  const int64_t blocks = ceil_div(R, block_rows);
  int64_t widest = 0;
  for (int64_t r = 0; r < R; r += block_rows)
    widest = max64(widest, net.crow[min64(R, r + block_rows)] - net.crow[r] + block_rows * L);
  Carver carver;
  const int64_t x_at = carver.reserve<T>(tiles * N * kTile),
                soma_at = carver.reserve<T>(tiles * S * kTile);
  const int64_t G0_at = carver.reserve<T>(R), G_at = carver.reserve<T>(threads * widest);
  const int64_t q_at = carver.reserve<T>(threads * block_rows * kTile);
  carver.allocate(runtime);
  T *x = carver.at<T>(x_at), *soma = carver.at<T>(soma_at), *G0 = carver.at<T>(G0_at);

  parallel(runtime, threads, [&](int64_t i) {
    const int64_t n0 = split<T>(N, i, threads), n1 = split<T>(N, i + 1, threads);
    const int64_t s0 = split<T>(S, i, threads), s1 = split<T>(S, i + 1, threads);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t samples = min64(kTile, call.batch - tile * kTile);
      transpose_in<T, V>(Rows<T>{call.x + tile * kTile * N, N}, samples, n0, n1,
                         x + (tile * N + n0) * kTile);
      if (s0 < s1)
        soma_gradient<T, V>(net, call, tile, s0, s1, tile == 0, soma + (tile * S + s0) * kTile,
                            call.dsoma_bias);
    }
  });
  parallel(runtime, threads, [&](int64_t i) {
    T *G = carver.at<T>(G_at) + i * widest, *q = carver.at<T>(q_at) + i * block_rows * kTile;
    for (int64_t block = blocks * i / threads; block < blocks * (i + 1) / threads; ++block) {
      const int64_t r0 = block * block_rows, r1 = min64(R, r0 + block_rows);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        make_q<T, V>(net, call, r0, r1, tile, S ? soma + tile * S * kTile : nullptr, 0, tile == 0,
                     q, G0);
        gather_rows<T, V, Column>(net, r0, r1, q, x + tile * N * kTile, tile == 0, G);
      }
      for (int64_t r = r0; r < r1; ++r) {
        const T* row = G + (net.crow[r] - net.crow[r0]) + (r - r0) * L;
        finish_row(net, call, r, G0[r], [&](int64_t j) { return row[j - net.crow[r]]; });
      }
    }
  });
}

template <class T, int V, class Column>
void backward_tiled(const dk::Topology& net, const dk::BackwardCall<T>& call,
                    const dk::Runtime& runtime) {
  if (!call.dx) return backward_weights<T, V, Column>(net, call, runtime);
  const int64_t tiles = ceil_div(call.batch, V * kLanes<T>);
  const bool few_blocks = net.blocks < runtime.threads && net.blocks < tiles;
  // Each way keeps one thing per thread: all of dx, or all of G. Take the smaller.
  const bool large_batch = call.batch * net.in_features > 4 * net.plan_slot_ptr[net.blocks];
  if (few_blocks || large_batch)
    backward_by_tiles<T, V, Column>(net, call, runtime);
  else
    backward_by_blocks<T, V, Column>(net, call, runtime);
}

template <class T, class Column>
void backward_columns(const dk::Topology& net, const dk::BackwardCall<T>& call,
                      const dk::Runtime& runtime) {
  // Four vectors of samples per tile hide the latency of the broadcasts; two keep x in L2 where N
  // is large (AVX-512), and give small batches a tile for every thread.
  constexpr int64_t kTileBytes = 256 << 10;
  const int64_t wide = 4 * kLanes<T>;
  if (wide > 32 &&
      (net.in_features * wide * int64_t(sizeof(T)) > kTileBytes || call.batch <= wide / 2))
    backward_tiled<T, 2, Column>(net, call, runtime);
  else
    backward_tiled<T, 4, Column>(net, call, runtime);
}

template <class T>
void backward(const dk::Topology& net, const dk::BackwardCall<T>& call,
              const dk::Runtime& runtime) {
  if (net.narrow)
    backward_columns<T, uint16_t>(net, call, runtime);
  else
    backward_columns<T, int32_t>(net, call, runtime);
}

}  // namespace
