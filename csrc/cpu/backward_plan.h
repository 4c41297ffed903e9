// Backward with dx: one gather of q over a block of the transposed plan feeds both dx and G.
#pragma once

#include "samples.h"

namespace {

// q[row - r0][tile] of rows r0..r1-1.
template <class T, int V>
__attribute__((noinline)) void make_q(const dk::Topology& net, const dk::BackwardCall<T>& call,
                                      int64_t r0, int64_t r1, int64_t tile, const T* soma_grad,
                                      bool first, T* q, T* G0) {
  for_each_q<T, V>(net, call, r0, r1, tile, soma_grad, first, q, G0,
                   [&](int64_t r, const vec<T>* value) DK_LAMBDA {
                     unroll<V>([&](auto t) DK_LAMBDA {
                       store(q + (r - r0) * V * kLanes<T> + t * kLanes<T>, value[t]);
                     });
                   });
}

// One block of dendrites on one tile. G is in slot order. clear_dx: dx is uninitialised, so rows
// without synapses are set to zero.
template <class T, int V, int Group, class Column>
__attribute__((noinline)) void gather_block(const dk::Topology& net, int64_t block, const T* weight,
                                            const T* q, const T* x, bool clear_dx, bool first,
                                            T* dx, T* G) {
  constexpr int L = kLanes<T>, kTile = V * L, BL = kBlockLanes<T>, kGroups = L / BL, kAhead = 3;
  const int64_t begin = net.plan_column_ptr[block], end = net.plan_column_ptr[block + 1];
  const Column* column = static_cast<const Column*>(net.plan_column);
  const uint16_t* row = net.plan_row + net.plan_slot_ptr[block];
  // AVX2: two synapses take turns, so that no instruction waits for the one before it, and a group
  // is folded between the halves of the next one.
  constexpr bool kPaired = kBlends && Group == 4 && sizeof(T) == 4;
  static_assert(!kPaired || V % 2 == 0);
  vec<T> folded[kGroups], single[L], pairs[2] = {};
  int count = kPaired ? -1 : 0;  // -1: no group yet
  const auto flush = [&](vec<T> sums) DK_LAMBDA {
    store(G, first ? sums : sums + load(G));
    G += L;
    count = 0;
  };
  const auto fold_last = [&]() DK_LAMBDA {  // the group in `pairs`
    if (count > 0) return flush(fold_blocks<T>(folded[0], fold_units<T, 2>(pairs[0], pairs[1])));
    if (count == 0) folded[0] = fold_units<T, 2>(pairs[0], pairs[1]);
    ++count;
  };
  // Where columns have few synapses, blocks are large and their q fill much of L2. Rows of x and dx
  // then miss L2, so they are prefetched. Elsewhere they hit, and a prefetch is only one more
  // instruction (1 to 5 % slower).
  constexpr int64_t kManyBytes = 1 << 19;
  const bool far = net.block_rows * kTile * int64_t(sizeof(T)) > kManyBytes;
  int64_t next = 0;  // dx rows before this one are written
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = column[i];
    if (far) {
      const int64_t ahead = int64_t(column[min64(i + kAhead, end - 1)]) * kTile;
      unroll<V>([&](auto t) DK_LAMBDA {
        if constexpr (t * kVectorBytes % 64 == 0) {  // where a cache line starts
          __builtin_prefetch(x + ahead + t * L);
          __builtin_prefetch(dx + ahead + t * L, 1);
        }
      });
    }
    if (clear_dx) {
      memset(dx + next * kTile, 0, size_t(n - next) * kTile * sizeof(T));
      next = n + 1;
    }
    vec<T> xv[V], acc[V];
    unroll<V>([&](auto t) DK_LAMBDA { xv[t] = load(x + n * kTile + t * L); });
    unroll<V>([&](auto t) DK_LAMBDA { acc[t] = vec<T>{}; });
    const auto synapse = [&](int slot) DK_LAMBDA {
      const vec<T> w = splat(weight[slot]);
      const T* p = q + int64_t(row[slot]) * kTile;
      vec<T> product;
      unroll<V>([&](auto t) DK_LAMBDA {
        const vec<T> value = in_register(load(p + t * L));
        acc[t] = in_order(w * value + acc[t]);
        product = t == 0 ? value * xv[t] : value * xv[t] + product;
      });
      return product;
    };
    const auto two_synapses = [&](int slot) DK_LAMBDA {
      vec<T> w[2], products[2];
      const T* p[2];
      unroll<2>([&](auto s) DK_LAMBDA {
        w[s] = splat(weight[slot + s]);
        p[s] = q + int64_t(row[slot + s]) * kTile;
      });
      unroll<2 * V>([&](auto j) DK_LAMBDA {  // vectors 0 1 1 0 2 3 3 2
        constexpr int s = j % 2, t = j / 4 * 2 + (j + 1) / 2 % 2;
        const vec<T> value = in_register(load(p[s] + t * L));
        acc[t] = in_order(w[s] * value + acc[t]);
        products[s] = j < 2 ? value * xv[t] : value * xv[t] + products[s];
      });
      return fold_units<T, 1>(products[0], products[1]);
    };
    for (int group = net.plan_groups[i]; group > 0; --group) {
      if constexpr (kPaired) {
        const vec<T> first_two = two_synapses(0);
        fold_last();
        pairs[0] = first_two;
        pairs[1] = two_synapses(2);
      } else if constexpr (Group == 4) {
        vec<T> products[4];
        unroll<4>([&](auto s) DK_LAMBDA { products[s] = synapse(s); });
        unroll<4 / BL>([&](auto g) DK_LAMBDA {
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
    // The sums of other blocks are added last: a sum of short sums has smaller rounding errors than
    // one long chain.
    if (!clear_dx) unroll<V>([&](auto t) DK_LAMBDA { acc[t] += load(dx + n * kTile + t * L); });
    unroll<V>([&](auto t) DK_LAMBDA { store(dx + n * kTile + t * L, acc[t]); });
  }
  if (clear_dx) memset(dx + next * kTile, 0, size_t(net.in_features - next) * kTile * sizeof(T));
  if constexpr (kPaired)
    if (count >= 0) fold_last();
  if (count > 0) {  // blocks are padded to whole vectors, so the last store stays inside G
    if constexpr (Group == 4) {
      for (int i = count; i < kGroups; ++i) folded[i] = vec<T>{};
      flush(fold_groups<T>(folded));
    } else {
      for (int i = count; i < L; ++i) single[i] = vec<T>{};
      flush(lane_sums<T>(single));
    }
  }
}

// w c of one block in slot order, zero in padding. Products are computed in CSR order into
// `products` and then gathered: scattered stores would each miss L1.
template <class T, class Index>
__attribute__((noinline)) void fill_weights(const dk::Topology& net,
                                            const dk::BackwardCall<T>& call, int64_t block,
                                            T* products, T* out) {
  constexpr int L = kLanes<T>;
  const int64_t r0 = block * net.block_rows, r1 = min64(net.rows, r0 + net.block_rows),
                begin = net.crow[r0];
  for (int64_t r = r0; r < r1; ++r) {
    const vec<T> c = splat(cable_weight(call, r));
    int64_t j = net.crow[r];
    const int64_t end = net.crow[r + 1];
    for (; j + L <= end; j += L) store(products + (j - begin), load(call.weight + j) * c);
    if (j < end)  // the next row overwrites what this stores past the end
      store(products + (j - begin), load_part(call.weight + j, int(end - j)) * c);
  }
  products[net.crow[r1] - begin] = 0;
  const int64_t slots = net.plan_slot_ptr[block + 1] - net.plan_slot_ptr[block];
  const Index* synapse = static_cast<const Index*>(net.plan_synapse) + net.plan_slot_ptr[block];
  for (int64_t i = 0; i < slots; i += L) store(out + i, gather(products, synapse + i));
}

// The gradients of the parameters of a block, from G (in slot order) and G0. With copies > 1 both
// are sums of that many partial arrays; those of G are `stride` apart. One vector of dendrites at a
// time.
template <class T, class Index>
__attribute__((noinline)) void finish_block(const dk::Topology& net,
                                            const dk::BackwardCall<T>& call, int64_t block,
                                            int64_t copies, const T* G, int64_t stride,
                                            const T* G0) {
  constexpr int L = kLanes<T>;
  const int64_t r1 = min64(net.rows, (block + 1) * net.block_rows);
  for (int64_t r = block * net.block_rows; r < r1; r += L) {
    const int count = int(min64(L, r1 - r));
    vec<T> dots[L] = {};
    for (int i = 0; i < count; ++i) {
      const Index* slot = static_cast<const Index*>(net.plan_slot) + net.crow[r + i];
      dots[i] = weight_gradient<T>(net, call, r + i, [&](int64_t k, int n) DK_LAMBDA {
        vec<T> g = gather_part(G, slot + k, n);
        for (int64_t t = 1; t < copies; ++t) g += gather_part(G + t * stride, slot + k, n);
        return g;
      });
    }
    vec<T> sums = load_part(G0 + r, count);
    for (int64_t t = 1; t < copies; ++t) sums += load_part(G0 + t * net.rows + r, count);
    finish_dendrites(net, call, r, count, dots, sums);
  }
}

template <class T, int V, class Column>
auto pick_gather(const dk::Topology& net) {
  return net.group == 4 ? gather_block<T, V, 4, Column> : gather_block<T, V, 1, Column>;
}
template <class T, int V>
auto pick_gather(const dk::Topology& net) {
  return net.narrow ? pick_gather<T, V, uint16_t>(net) : pick_gather<T, V, int32_t>(net);
}

// The blocks of the transposed plan. w c and G of a block are in slot order.
template <class T>
class PlanBlocks {
 public:
  PlanBlocks(const dk::Topology& net, const dk::BackwardCall<T>& call) : net_(net), call_(call) {
    for (int64_t block = 0; block < net.blocks; ++block)
      most_slots_ = max64(most_slots_, start(block + 1) - start(block));
  }
  int64_t start(int64_t block) const { return net_.plan_slot_ptr[block]; }
  int64_t slots() const { return start(net_.blocks); }
  int64_t most_slots() const { return most_slots_; }
  // Scratch of one thread: first the products of `weigh`, later the q of a block.
  int64_t scratch(int64_t tile) const {
    return max64(net_.block_rows * tile, most_slots_ + kLanes<T>);
  }
  void weigh(int64_t block, T* products, T* out) const {
    if (net_.plan_narrow)
      fill_weights<T, uint16_t>(net_, call_, block, products, out);
    else
      fill_weights<T, int32_t>(net_, call_, block, products, out);
  }
  void finish(int64_t block, int64_t copies, const T* G, int64_t stride, const T* G0) const {
    if (net_.plan_narrow)
      finish_block<T, uint16_t>(net_, call_, block, copies, G, stride, G0);
    else
      finish_block<T, int32_t>(net_, call_, block, copies, G, stride, G0);
  }

 private:
  const dk::Topology& net_;
  const dk::BackwardCall<T>& call_;
  int64_t most_slots_ = 0;
};

// Threads own blocks of dendrites. Each thread has its own dx; the copies are added up when dx is
// transposed back. Where x fits the cache, the outer loop is over blocks, so that the weights, the
// plan and G of a block stay in the cache for all tiles. Else the outer loop is over tiles.
template <class T, int V>
void backward_by_blocks(const dk::Topology& net, const dk::BackwardCall<T>& call,
                        const dk::Runtime& runtime) {
  constexpr int kTile = V * kLanes<T>;
  const int64_t N = net.in_features, threads = min64(runtime.threads, net.blocks);
  const bool block_outer = call.batch * N * int64_t(sizeof(T)) <= kHotBytes;
  const PlanBlocks<T> blocks(net, call);
  const int64_t slots = block_outer ? threads * blocks.most_slots() : blocks.slots();
  const auto gather = pick_gather<T, V>(net);
  Carver carver;
  const Samples<T, V> samples(net, call, threads, carver);
  const int64_t tiles = samples.tiles();
  const int64_t weight_at = carver.reserve<T>(slots), G_at = carver.reserve<T>(slots),
                G0_at = carver.reserve<T>(net.rows);
  const int64_t q_at = carver.reserve<T>(threads * blocks.scratch(kTile)),
                dx_at = carver.reserve<T>(threads * tiles * N * kTile);
  carver.allocate(runtime);
  T *G0 = carver.at<T>(G0_at), *dx = carver.at<T>(dx_at);

  samples.share(runtime);
  parallel(runtime, threads, [&](int64_t i) {
    const int64_t b0 = net.blocks * i / threads, b1 = net.blocks * (i + 1) / threads;
    T *q = carver.at<T>(q_at) + i * blocks.scratch(kTile), *own = dx + i * tiles * N * kTile;
    // With blocks outside, all blocks of a thread use the same memory, which stays in L2.
    const auto at = [&](int64_t array, int64_t block) {
      return carver.at<T>(array) + (block_outer ? i * blocks.most_slots() : blocks.start(block));
    };
    const auto weigh = [&](int64_t block) { blocks.weigh(block, q, at(weight_at, block)); };
    const auto work = [&](int64_t block, int64_t tile) {
      const int64_t r0 = block * net.block_rows, r1 = min64(net.rows, r0 + net.block_rows);
      make_q<T, V>(net, call, r0, r1, tile, samples.soma(i, tile), tile == 0, q, G0);
      gather(net, block, at(weight_at, block), q, samples.x(i, tile), block == b0, tile == 0,
             own + tile * N * kTile, at(G_at, block));
    };
    const auto finish = [&](int64_t block) { blocks.finish(block, 1, at(G_at, block), 0, G0); };
    samples.take(i, b0 * net.block_rows, b1 * net.block_rows);
    if (block_outer) {
      for (int64_t block = b0; block < b1; ++block) {
        weigh(block);
        for (int64_t tile = 0; tile < tiles; ++tile) work(block, tile);
        finish(block);
      }
    } else {
      for (int64_t block = b0; block < b1; ++block) weigh(block);
      for (int64_t tile = 0; tile < tiles; ++tile)
        for (int64_t block = b0; block < b1; ++block) work(block, tile);
      for (int64_t block = b0; block < b1; ++block) finish(block);
    }
  });
  finish_dx<T, V>(net, call, runtime, threads, dx);
}

// Threads own tiles of the batch. Each thread has its own x, dx and q, which are small, and its own
// G. The copies of G are added up at the end.
template <class T, int V>
void backward_by_tiles(const dk::Topology& net, const dk::BackwardCall<T>& call,
                       const dk::Runtime& runtime) {
  constexpr int kTile = V * kLanes<T>;
  const PlanBlocks<T> blocks(net, call);
  const int64_t N = net.in_features, S = call.cable ? net.somas : 0, R = net.rows,
                slots = blocks.slots();
  const int64_t tiles = ceil_div(call.batch, kTile), threads = min64(runtime.threads, tiles),
                parts = min64(runtime.threads, net.blocks);
  const auto gather = pick_gather<T, V>(net);
  Carver carver;
  const int64_t x_at = carver.reserve<T>(threads * N * kTile),
                soma_at = carver.reserve<T>(threads * S * kTile);
  const int64_t q_at = carver.reserve<T>(max64(threads, parts) * blocks.scratch(kTile)),
                dx_at = carver.reserve<T>(threads * N * kTile);
  const int64_t weight_at = carver.reserve<T>(slots), G_at = carver.reserve<T>(threads * slots);
  const int64_t G0_at = carver.reserve<T>(threads * R), bias_at = carver.reserve<T>(threads * S);
  carver.allocate(runtime);
  T *weight = carver.at<T>(weight_at), *G = carver.at<T>(G_at), *G0 = carver.at<T>(G0_at),
    *bias = carver.at<T>(bias_at);

  parallel(runtime, parts, [&](int64_t i) {
    for (int64_t block = net.blocks * i / parts; block < net.blocks * (i + 1) / parts; ++block)
      blocks.weigh(block, carver.at<T>(q_at) + i * blocks.scratch(kTile),
                   weight + blocks.start(block));
  });
  parallel(runtime, threads, [&](int64_t i) {
    T *x = carver.at<T>(x_at) + i * N * kTile, *dx = carver.at<T>(dx_at) + i * N * kTile;
    T *soma = carver.at<T>(soma_at) + i * S * kTile,
      *q = carver.at<T>(q_at) + i * blocks.scratch(kTile);
    const int64_t begin = tiles * i / threads, end = tiles * (i + 1) / threads;
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t samples = min64(kTile, call.batch - tile * kTile);
      const bool first = tile == begin;
      tile_in<T, V>(call.storage, call.x, tile * kTile, samples, N, 0, N, x);
      if (S) soma_gradient<T, V>(net, call, tile, 0, S, first, soma, bias + i * S);
      for (int64_t block = 0; block < net.blocks; ++block) {
        const int64_t r0 = block * net.block_rows, r1 = min64(R, r0 + net.block_rows);
        make_q<T, V>(net, call, r0, r1, tile, S ? soma : nullptr, first, q, G0 + i * R);
        gather(net, block, weight + blocks.start(block), q, x, block == 0, first, dx,
               G + i * slots + blocks.start(block));
      }
      tile_out<T, V>(call.storage, dx, N, samples, call.dx, tile * kTile, N, 0);
    }
  });
  parallel(runtime, parts, [&](int64_t i) {
    for (int64_t block = net.blocks * i / parts; block < net.blocks * (i + 1) / parts; ++block)
      blocks.finish(block, threads, G + blocks.start(block), slots, G0);
    for (int64_t s = S * i / parts; s < S * (i + 1) / parts; ++s) {
      T sum = 0;
      for (int64_t copy = 0; copy < threads; ++copy) sum += bias[copy * S + s];
      call.dsoma_bias[s] = sum;
    }
  });
}

}  // namespace
