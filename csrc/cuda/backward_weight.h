// Gradients of the parameters. With q[b, r] = gv[b, s] * (bit ? 1 : slope), G[r, k] = sum_b q x and
// G0[r] = sum_b q:  dw = c G,  dbd = c G0,  dc = <w_r, G_r> + bd G0,  dbs = sum_b gv.
#pragma once

#include "tile.h"

namespace dk {

// COUNT values in each of LANES lanes -> in value[0] of lane p the sum over the lanes of value
// p / (LANES / COUNT). Lanes swap halves of what they hold, so that 8 sums over 32 lanes take 9
// shuffles instead of 40.
template <int COUNT, int LANES, class A>
DK_DEVICE void transpose_sum(A (&value)[COUNT], int lane) {
  int held = COUNT;
#pragma unroll
  for (int bit = LANES / 2; bit >= 1; bit >>= 1) {
    if (held > 1) {
      held /= 2;
      const bool upper = lane & bit;
#pragma unroll
      for (int j = 0; j < COUNT / 2; ++j) {
        if (j < held) {
          const A send = upper ? value[j] : value[j + held];
          const A keep = upper ? value[j + held] : value[j];
          value[j] = keep + __shfl_xor_sync(kAllLanes, send, bit);
        }
      }
    } else {
      value[0] += __shfl_xor_sync(kAllLanes, value[0], bit);
    }
  }
}

template <int LANES, class A>
DK_DEVICE A sum_lanes(A value) {
#pragma unroll
  for (int bit = LANES / 2; bit; bit >>= 1) value += __shfl_xor_sync(kAllLanes, value, bit);
  return value;
}

// The first tile of a group writes a partial sum, later ones add: always the same thread, in the
// order of the tiles.
template <class A>
DK_DEVICE void accumulate(A* at, A value, bool is_first) {
  *at = is_first ? value : *at + value;
}

// Where the samples of this lane find their sign bits: words of the tile's first row, and a shift.
template <class K>
struct SignBits {
  const uint32_t* word[K::kVec];
  int shift[K::kVec];
  DK_DEVICE SignBits(const uint32_t* signs, int64_t rows, int64_t b0, int64_t batch, int lane) {
#pragma unroll
    for (int v = 0; v < K::kVec; ++v) {
      const int64_t b = b0 + v * K::kLanes;  // the lanes' samples are neighbours in one word
      word[v] = signs && b < batch ? signs + b / 32 * rows : signs;
      shift[v] = int(b % 32) + lane % K::kLanes;
    }
  }
  DK_DEVICE bool positive(int v, int64_t r) const { return __ldg(word[v] + r) >> shift[v] & 1u; }
};

// One warp sums over the samples of a tile for one soma.
template <class K>
__global__ void __launch_bounds__(K::kMaxThreads, 1)
    backward_weight(const WeightArgs<typename K::T> args) {
  using A = typename K::A;
  DK_SHARED_MEMORY(typename K::V, shared);
  const Thread me;
  const int32_t group = blockIdx.x / args.parts, part = blockIdx.x % args.parts;
  const int p = me.lane % K::kLanes;
  const uint32_t offset = p * uint32_t(sizeof(typename K::V));
  constexpr int kHolders = K::kLanes / K::kChunk;  // lanes that end up with the same sum
  const bool holds = p % kHolders == 0;
  A* const partial = args.partial + group * args.slots;
  A* const partial_row = args.partial_row + int64_t(group) * args.rows;
  A* const partial_soma =
      args.partial_soma ? args.partial_soma + int64_t(group) * args.outputs : nullptr;
  for (int32_t tile = group; tile < args.tile_count; tile += args.groups) {
    const bool is_first = tile == group;
    const int64_t b0 = int64_t(tile) * K::kSamples;
    const unsigned char* samples;
    if constexpr (K::kShared) {
      if (!is_first) __syncthreads();  // all have read the tile before
      stage<K>(shared, args.x, b0, args.batch, args.inputs, args.tile_rows, me);
      __syncthreads();
      samples = reinterpret_cast<const unsigned char*>(shared);
    } else {
      samples = reinterpret_cast<const unsigned char*>(args.tiles + b0 * args.tile_rows);
    }
    const SignBits<K> bits(args.signs, args.rows, b0, args.batch, me.lane);
    for (uint32_t s = part * me.warps + me.warp; s < uint32_t(args.outputs);
         s += args.parts * me.warps) {
      const auto grad = load_readonly<Vector<A, K::kVec>>(
          args.grad_v + (int64_t(tile) * args.outputs + s) * K::kSamples + p * K::kVec);
      if (partial_soma) {
        A sum = 0;
#pragma unroll
        for (int i = 0; i < K::kVec; ++i) sum += grad.value[i];
        sum = sum_lanes<K::kLanes>(sum);
        if (me.lane == 0) accumulate(partial_soma + s, sum, is_first);
      }
      const int32_t last = begin(args.dendrites, s + 1);
      for (int32_t r = begin(args.dendrites, s); r < last; ++r) {
        A q[K::kVec], sum = 0;
#pragma unroll
        for (int i = 0; i < K::kVec; ++i) {
          const bool active = !args.signs || bits.positive(i, r);
          q[i] = active ? grad.value[i] : args.slope * grad.value[i];
          sum += q[i];
        }
        sum = sum_lanes<K::kLanes>(sum);
        if (me.lane == 0) accumulate(partial_row + r, sum, is_first);
        const int32_t stop = begin(args.steps, r + 1);
        for (int32_t step = begin(args.steps, r); step < stop; ++step) {
          const int64_t slot = slot_of<K>(step, me.lane);
          Indices<K> index;
          index.load(args.index, slot);
          A* const to = partial + slot + p / kHolders;
          const A before = holds && !is_first ? *to : A(0);  // early: it is far away
          typename K::V x[K::kChunk];
          gather_all<K>(samples, index, offset, x);
          A value[K::kChunk];
#pragma unroll
          for (int j = 0; j < K::kChunk; ++j) {
            value[j] = q[0] * widen(x[j].value[0]);
#pragma unroll
            for (int i = 1; i < K::kVec; ++i) value[j] += q[i] * widen(x[j].value[i]);
          }
          transpose_sum<K::kChunk, K::kLanes>(value, me.lane);
          if (holds) *to = before + value[0];
        }
      }
    }
  }
}

// Sums the groups in their order and scales. Half a warp takes one dendrite. `dweight` may be
// `partial` itself: every element is read and then written by one thread.
template <class A>
__global__ void __launch_bounds__(256) finish_weight(const FinishArgs<A> args) {
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t row = thread / 16;
  const int lane = int(thread % 16);
  const bool is_row = row < args.rows;  // the others only take part in the shuffles
  const int32_t r = is_row ? int32_t(row) : 0;
  const A cable = args.cable ? args.cable[r] : A(1);
  const int64_t end = is_row ? int64_t(begin(args.steps, r + 1)) * args.step : 0;
  A dot = 0;
  for (int64_t slot = int64_t(begin(args.steps, r)) * args.step + lane; slot < end; slot += 16) {
    const int64_t to = args.source ? args.source[slot] : slot;
    if (to < 0) continue;
    A sum = args.partial[slot];
    for (int g = 1; g < args.groups; ++g) sum += args.partial[g * args.slots + slot];
    dot += args.weight[slot] * sum;
    args.dweight[to] = cable * sum;
  }
  dot = sum_lanes<16>(dot);
  if (is_row && lane == 0) {
    A sum = args.partial_row[r];
    for (int g = 1; g < args.groups; ++g) sum += args.partial_row[int64_t(g) * args.rows + r];
    args.ddendrite_bias[r] = cable * sum;
    if (args.dcable)
      args.dcable[r] = dot + (args.dendrite_bias ? args.dendrite_bias[r] * sum : A(0));
  }
  if (args.dsoma_bias && thread < args.somas) {
    A sum = args.partial_soma[thread];
    for (int g = 1; g < args.groups; ++g)
      sum += args.partial_soma[int64_t(g) * args.somas + thread];
    args.dsoma_bias[thread] = sum;
  }
}

}  // namespace dk
