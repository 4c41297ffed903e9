// How the backward kernels meet: who owns blocks of dendrites and tiles of the batch, what is
// private to a thread, and when partial sums are added up. No atomics: results are the same in
// every run with the same number of threads.
#pragma once

#include "backward_single.h"
#include "gradients.h"

namespace {

constexpr int64_t kRowBlock = 128;  // dendrites whose q and G stay in L1

// Whole vectors of [0, n) for part `i` of `parts`.
template <class T>
DK_INLINE int64_t split(int64_t n, int64_t i, int64_t parts) {
  const int64_t L = kLanes<T>;
  return min64(n, ceil_div(n, L) * i / parts * L);
}

// While all of x is smaller than this, blocks go outside and tiles inside: measured.
constexpr int64_t kHotBytes = 3 << 19;

// Inputs [n0, n1) of every tile -> x[tile][N][samples].
template <class T, int V>
void transpose_inputs(const dk::Topology& net, const dk::BackwardCall<T>& call, int64_t n0,
                      int64_t n1, T* x) {
  constexpr int kTile = V * kLanes<T>;
  for (int64_t tile = 0; tile * kTile < call.batch; ++tile) {
    const int64_t samples = min64(kTile, call.batch - tile * kTile);
    tile_in<T, V>(call.storage, call.x, tile * kTile, samples, net.in_features, n0, n1,
                  x + (tile * net.in_features + n0) * kTile);
  }
}

// sum += part, both of n numbers: whole vectors.
template <class T>
DK_INLINE void add_to(int64_t n, const T* part, T* sum) {
  for (int64_t e = 0; e < n; e += kLanes<T>) store(sum + e, load(sum + e) + load(part + e));
}

// The sum of the threads' dx [threads][tiles][N][tile], in the first of them, then to its rows.
template <class T, int V>
void finish_dx(const dk::Topology& net, const dk::BackwardCall<T>& call, const dk::Runtime& runtime,
               int64_t threads, T* dx) {
  constexpr int kTile = V * kLanes<T>;
  const int64_t N = net.in_features, tiles = ceil_div(call.batch, kTile);
  parallel(runtime, runtime.threads, [&](int64_t i) {
    const int64_t n0 = split<T>(N, i, runtime.threads), n1 = split<T>(N, i + 1, runtime.threads);
    if (n0 >= n1) return;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      T* sum = dx + (tile * N + n0) * kTile;
      for (int64_t other = 1; other < threads; ++other)
        add_to((n1 - n0) * kTile, sum + other * tiles * N * kTile, sum);
      const int64_t samples = min64(kTile, call.batch - tile * kTile);
      tile_out<T, V>(call.storage, sum, n1 - n0, samples, call.dx, tile * kTile, N, n0);
    }
  });
}

// The blocks of the transposed plan: w c and G of each are kept in the order of its slots.
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
  // For one thread: room for the q of a block, or for what `weigh` needs, before there is any q.
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

// Threads own blocks of dendrites; dx is private and added up while it is transposed back.
// block_outer keeps a block's weights, plan and G hot over all tiles while x fits the cache; else
// tiles go outside.
template <class T, int V, class Column>
void backward_by_blocks(const dk::Topology& net, const dk::BackwardCall<T>& call,
                        const dk::Runtime& runtime) {
  constexpr int kTile = V * kLanes<T>;
  const int64_t N = net.in_features, S = call.cable ? net.somas : 0;
  const int64_t tiles = ceil_div(call.batch, kTile), threads = min64(runtime.threads, net.blocks);
  const bool block_outer = call.batch * N * int64_t(sizeof(T)) <= kHotBytes;
  const PlanBlocks<T> blocks(net, call);
  const int64_t slots = block_outer ? threads * blocks.most_slots() : blocks.slots();
  Carver carver;
  const int64_t x_at = carver.reserve<T>(tiles * N * kTile),
                soma_at = carver.reserve<T>(tiles * S * kTile);
  const int64_t weight_at = carver.reserve<T>(slots), G_at = carver.reserve<T>(slots),
                G0_at = carver.reserve<T>(net.rows);
  const int64_t q_at = carver.reserve<T>(threads * blocks.scratch(kTile)),
                dx_at = carver.reserve<T>(threads * tiles * N * kTile);
  carver.allocate(runtime);
  T *x = carver.at<T>(x_at), *soma = carver.at<T>(soma_at), *G0 = carver.at<T>(G0_at),
    *dx = carver.at<T>(dx_at);

  parallel(runtime, runtime.threads, [&](int64_t i) {
    const int64_t n0 = split<T>(N, i, runtime.threads), n1 = split<T>(N, i + 1, runtime.threads);
    const int64_t s0 = split<T>(S, i, runtime.threads), s1 = split<T>(S, i + 1, runtime.threads);
    transpose_inputs<T, V>(net, call, n0, n1, x);
    for (int64_t tile = 0; tile < tiles && s0 < s1; ++tile)
      soma_gradient<T, V>(net, call, tile, s0, s1, tile == 0, soma + (tile * S + s0) * kTile,
                          call.dsoma_bias);
  });
  parallel(runtime, threads, [&](int64_t i) {
    const int64_t b0 = net.blocks * i / threads, b1 = net.blocks * (i + 1) / threads;
    T *q = carver.at<T>(q_at) + i * blocks.scratch(kTile), *own = dx + i * tiles * N * kTile;
    // Where blocks go outside, those of a thread take turns in one place, which stays in L2.
    const auto at = [&](int64_t array, int64_t block) {
      return carver.at<T>(array) + (block_outer ? i * blocks.most_slots() : blocks.start(block));
    };
    const auto weigh = [&](int64_t block) { blocks.weigh(block, q, at(weight_at, block)); };
    const auto work = [&](int64_t block, int64_t tile) {
      const int64_t r0 = block * net.block_rows, r1 = min64(net.rows, r0 + net.block_rows);
      make_q<T, V>(net, call, r0, r1, tile, S ? soma + tile * S * kTile : nullptr, tile == 0, q,
                   G0);
      gather<T, V, Column>(net, block, at(weight_at, block), q, x + tile * N * kTile, block == b0,
                           tile == 0, own + tile * N * kTile, at(G_at, block));
    };
    const auto finish = [&](int64_t block) { blocks.finish(block, 1, at(G_at, block), 0, G0); };
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

// Threads own batch tiles: x, dx and q are private and small, G is private and added up at the end.
template <class T, int V, class Column>
void backward_by_tiles(const dk::Topology& net, const dk::BackwardCall<T>& call,
                       const dk::Runtime& runtime) {
  constexpr int kTile = V * kLanes<T>;
  const PlanBlocks<T> blocks(net, call);
  const int64_t N = net.in_features, S = call.cable ? net.somas : 0, R = net.rows,
                slots = blocks.slots();
  const int64_t tiles = ceil_div(call.batch, kTile), threads = min64(runtime.threads, tiles),
                parts = min64(runtime.threads, net.blocks);
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
        gather<T, V, Column>(net, block, weight + blocks.start(block), q, x, block == 0, first, dx,
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

// Without the plan: threads own blocks of dendrites, whose G stays small and private. WithInput,
// for a batch of one tile: what the plan saves there is less than its weights and sums cost to
// move.
template <class T, int V, class Column, bool WithInput>
void backward_by_rows(const dk::Topology& net, const dk::BackwardCall<T>& call,
                      const dk::Runtime& runtime) {
  constexpr int kTile = V * kLanes<T>;
  const int64_t N = net.in_features, S = call.cable ? net.somas : 0, R = net.rows,
                threads = runtime.threads;
  const int64_t tiles = ceil_div(call.batch, kTile);
  // A block's q and G stay in L1 over all tiles while x leaves half of L2 free; else each tile of x
  // stays in L2 over all blocks of the thread.
  // Where x is small every thread transposes all of it for itself, which takes less than fetching
  // from other cores' caches what their threads transposed.
  constexpr int64_t kSmallBytes = 1 << 19;
  const int64_t x_bytes = call.batch * N * int64_t(sizeof(T));
  const bool block_outer = tiles == 1 || x_bytes <= runtime.l2_bytes / 2,
             own_x = x_bytes <= kSmallBytes;
  const auto gather = pick_gather_rows<T, V, Column, WithInput>(net);
  const int64_t blocks = ceil_div(R, kRowBlock), share = ceil_div(blocks, threads),
                at_once = block_outer ? 1 : share;
  const int64_t stretch = max64(1, blocks * kStretch * N / max64(1, net.nnz));  // in blocks
  // G of all blocks may grow where dw will be.
  const bool in_place = !block_outer && !net.order && whole_rows<T>(net);
  int64_t widest = 0;  // G of so many blocks
  for (int64_t first = 0; first < blocks && !in_place; first += at_once) {
    int64_t size = 0;
    for (int64_t p = first * kRowBlock; p < min64(R, (first + at_once) * kRowBlock); ++p)
      size += padded_row<T>(net, p);
    widest = max64(widest, size);
  }
  Carver carver;
  const int64_t x_at = carver.reserve<T>((own_x ? threads : 1) * tiles * N * kTile),
                soma_at = carver.reserve<T>(tiles * S * kTile);
  const int64_t G0_at = carver.reserve<T>(R), G_at = carver.reserve<T>(threads * widest);
  const int64_t q_at = carver.reserve<T>(threads * kRowBlock * kTile),
                dx_at = carver.reserve<T>(WithInput ? threads * N * kTile : 0),
                stretch_at =
                    carver.reserve<T>(WithInput && stretch < share ? threads * N * kTile : 0);
  carver.allocate(runtime);
  T *x = carver.at<T>(x_at), *soma = carver.at<T>(soma_at), *G0 = carver.at<T>(G0_at);

  parallel(runtime, threads, [&](int64_t i) {
    const int64_t n0 = split<T>(N, i, threads), n1 = split<T>(N, i + 1, threads);
    const int64_t s0 = split<T>(S, i, threads), s1 = split<T>(S, i + 1, threads);
    if (!own_x) transpose_inputs<T, V>(net, call, n0, n1, x);
    for (int64_t tile = 0; tile < tiles && s0 < s1; ++tile)
      soma_gradient<T, V>(net, call, tile, s0, s1, tile == 0, soma + (tile * S + s0) * kTile,
                          call.dsoma_bias);
  });
  parallel(runtime, threads, [&](int64_t i) {
    const int64_t begin = i * share, end = min64(blocks, begin + share);
    T *G = in_place ? call.dweight + min64(R, begin * kRowBlock) * net.fan_in
                    : carver.at<T>(G_at) + i * widest,
      *q = carver.at<T>(q_at) + i * kRowBlock * kTile;
    T *sum = carver.at<T>(dx_at) + (WithInput ? i * N * kTile : 0), *dx = sum,
      *xt = x + (own_x ? i * tiles * N * kTile : 0);
    if (own_x) transpose_inputs<T, V>(net, call, 0, N, xt);
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
        for (int64_t block = first; block < last; ++block)
          out = gather(net, call, block * kRowBlock, min64(R, (block + 1) * kRowBlock), tile,
                       S ? soma + tile * S * kTile : nullptr, xt + tile * N * kTile, tile == 0, q,
                       G0, out, dx);
      }
      const T* row = G;
      for (int64_t p = first * kRowBlock; p < min64(R, last * kRowBlock); ++p) {
        finish_row(net, call, dendrite_at(net, p), G0[p],
                   [&](int64_t k, int) DK_LAMBDA { return load(row + k); });
        row += padded_row<T>(net, p);
      }
    }
    if (dx != sum) add_to(N * kTile, dx, sum);
  });
  if constexpr (WithInput) finish_dx<T, V>(net, call, runtime, threads, carver.at<T>(dx_at));
}

// Without the plan, on batches much larger than the network: threads own tiles, and everything is
// private to them; G is added up at the end.
template <class T, int V, class Column>
void backward_rows_by_tiles(const dk::Topology& net, const dk::BackwardCall<T>& call,
                            const dk::Runtime& runtime) {
  constexpr int kTile = V * kLanes<T>;
  const int64_t N = net.in_features, S = call.cable ? net.somas : 0, R = net.rows;
  const int64_t tiles = ceil_div(call.batch, kTile), threads = min64(runtime.threads, tiles);
  const auto gather = pick_gather_rows<T, V, Column, false>(net);
  int64_t slots = 0;
  for (int64_t p = 0; p < R; ++p) slots += padded_row<T>(net, p);
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
    const int64_t p0 = R * i / threads, p1 = R * (i + 1) / threads;
    T* row = G;
    for (int64_t p = 0; p < p0; ++p) row += padded_row<T>(net, p);
    for (int64_t p = p0; p < p1; ++p) {
      const int64_t room = padded_row<T>(net, p);
      T sum = G0[p];
      for (int64_t copy = 1; copy < threads; ++copy) {
        sum += G0[copy * R + p];
        add_to(room, row + copy * slots, row);
      }
      finish_row(net, call, dendrite_at(net, p), sum,
                 [&](int64_t k, int) DK_LAMBDA { return load(row + k); });
      row += room;
    }
    for (int64_t s = S * i / threads; s < S * (i + 1) / threads; ++s) {
      T sum = 0;
      for (int64_t copy = 0; copy < threads; ++copy) sum += bias[copy * S + s];
      call.dsoma_bias[s] = sum;
    }
  });
}

template <class T, int V, class Column>
void backward_tiled(const dk::Topology& net, const dk::BackwardCall<T>& call,
                    const dk::Runtime& runtime) {
  if (!call.dx) {
    const int64_t inputs = call.batch * net.in_features;
    const bool own_tiles = inputs * int64_t(sizeof(T)) > kHotBytes && inputs > 4 * net.nnz &&
                           call.batch >= runtime.threads * 4 * V * kLanes<T>;
    return own_tiles ? backward_rows_by_tiles<T, V, Column>(net, call, runtime)
                     : backward_by_rows<T, V, Column, false>(net, call, runtime);
  }
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
  if (call.batch == 1) return backward_single<T, Column>(net, call, runtime);
  constexpr int kFew = 16, kFewVectors = kFew / kLanes<T>;
  if (call.batch <= kFew) {
    if (call.dx) return backward_by_rows<T, kFewVectors, Column, true>(net, call, runtime);
    return backward_by_rows<T, kFewVectors, Column, false>(net, call, runtime);
  }
  // The vectors of samples of one tile hide the latency of the broadcasts. Two keep x in the cache
  // where N is large (AVX-512 only: elsewhere four are few already), and waste less on a small
  // batch. With dx a tile is gone through in the order of its columns and may fill the cache.
  if constexpr (kTileVectors * kLanes<T> > 32) {
    const int64_t wide = kTileVectors * kLanes<T>,
                  tile_bytes = net.in_features * wide * int64_t(sizeof(T));
    const int64_t most_bytes = call.dx ? runtime.l2_bytes : runtime.l2_bytes / 2;
    if (tile_bytes > most_bytes || call.batch <= wide / 2)
      return backward_tiled<T, 2, Column>(net, call, runtime);
  }
  backward_tiled<T, kTileVectors, Column>(net, call, runtime);
}

template <class T>
void backward(const dk::Topology& net, const dk::BackwardCall<T>& call,
              const dk::Runtime& runtime) {
  dk::Runtime useful = runtime;
  useful.threads =
      int(useful_threads(runtime, ceil_div(call.batch, 32) * (net.nnz + 4 * net.rows)));
  if (net.narrow)
    backward_columns<T, uint16_t>(net, call, useful);
  else
    backward_columns<T, int32_t>(net, call, useful);
}

}  // namespace
