// Gradient of the input: dx[b, n] = sum over the synapses (r, k) of column n of w c q[b, r].
// Gathers gv and sign bits along the transposed synapses: no atomics, and q [B, R] is never stored.
#pragma once

#include "backward_weight.h"

namespace dk {

// Tiles arrive from `make_tiles` in the layout of shared memory: a plain copy.
template <class K>
DK_DEVICE void copy_tile(typename K::V* tile, const typename K::T* from, int32_t tile_rows) {
  const int count = int(tile_rows) * K::kLanes;
  for (int i = threadIdx.x; i < count; i += int(blockDim.x))
    tile[i] = load_readonly<typename K::V>(from + int64_t(i) * K::kVec);
}

// One warp computes one input for one batch tile. K stores the accumulator's type; O is dx's.
template <class K, class O>
__global__ void __launch_bounds__(K::kMaxThreads, 1) backward_input(const InputArgs<O> args) {
  using A = typename K::A;
  DK_SHARED_MEMORY(typename K::V, shared);
  const Thread me;
  const int32_t tile = blockIdx.x / args.parts, part = blockIdx.x % args.parts;
  const int64_t b0 = int64_t(tile) * K::kSamples;
  const A* const from = args.grad_v + b0 * args.tile_rows;
  const unsigned char* samples = reinterpret_cast<const unsigned char*>(from);
  if constexpr (K::kShared) {
    copy_tile<K>(shared, from, args.tile_rows);
    __syncthreads();
    samples = reinterpret_cast<const unsigned char*>(shared);
  }
  const int p = me.lane % K::kLanes;
  const uint32_t offset = p * uint32_t(sizeof(typename K::V));
  const SignBits<K> bits(args.signs, args.rows, b0, args.batch, me.lane);
  for (uint32_t n = part * me.warps + me.warp; n < uint32_t(args.inputs);
       n += args.parts * me.warps) {
    A sum[K::kVec] = {};
    const int32_t stop = begin(args.steps, n + 1);
    for (int32_t step = begin(args.steps, n); step < stop; ++step) {
      const int64_t slot = slot_of<K>(step, me.lane);
      Indices<K> index;
      index.load(args.index, slot);
      const auto weight = load_readonly<Vector<A, K::kChunk>>(args.weight + slot);
      typename K::V grad[K::kChunk];
      gather_all<K>(samples, index, offset, grad);
      if (args.signs) {
        const auto row = load_readonly<Vector<int32_t, K::kChunk>>(args.row + slot);
        add_products<K>(
            grad,
            [&](int j, int i) {
              const A w = weight.value[j];
              return bits.positive(i, row.value[j]) ? w : args.slope * w;
            },
            sum);
      } else {
        add_products<K>(grad, [&](int j, int) { return weight.value[j]; }, sum);
      }
    }
#pragma unroll
    for (int i = 0; i < K::kVec; ++i) {
      const A total = sum_groups<K>(sum[i]);
      const int64_t b = b0 + i * K::kLanes + p;
      if (me.lane < K::kLanes && b < args.batch) narrow(total, args.dx[b * args.inputs + n]);
    }
  }
}

}  // namespace dk
