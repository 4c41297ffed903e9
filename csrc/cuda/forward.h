// Fused forward pass: synapses, dendrites, cable, soma, sign bits.
#pragma once

#include "tile.h"

namespace dk {

// Stores which u are positive: one lane of each group writes for its row.
template <class K>
DK_DEVICE void store_signs(uint32_t* signs, int64_t rows, int32_t row, int64_t b0, int64_t batch,
                           const typename K::A (&u)[K::kVec], const Thread<K>& me) {
  using Bits = SignBits<K>;
  constexpr uint32_t kMine = K::kLanes == 32 ? kAllLanes : (1u << K::kLanes % 32) - 1;
  uint32_t word[Bits::kWords] = {};
#pragma unroll
  for (int i = 0; i < K::kVec; ++i)
    word[i * K::kLanes / 32] |=
        (__ballot_sync(kAllLanes, u[i] > 0) >> me.group * K::kLanes % 32 & kMine)
        << i * K::kLanes % 32;
  if (me.place != 0 || row < 0) return;
#pragma unroll
  for (int w = 0; w < Bits::kWords; ++w)
    if (w == 0 || b0 + 32 * w < batch)
      Bits::first(signs, rows, b0, w)[row * int64_t(4 / sizeof(typename Bits::Piece))] =
          typename Bits::Piece(word[w]);
}

// A warp computes the somas of one item for one batch tile; `parts` blocks are dealt out the tile's
// items. Without somas (cable null) its outputs are the rows.
template <class K>
__global__ void __launch_bounds__(K::kMaxThreads, 1)
    forward_tile(const ForwardArgs<typename K::T> args) {
  using A = typename K::A;
  DK_SHARED_MEMORY(typename K::V, shared);
  const Thread<K> me;
  const int32_t tile = blockIdx.x / args.parts, part = blockIdx.x % args.parts;
  const int64_t b0 = int64_t(tile) * K::kSamples;
  const unsigned char* samples;
  if constexpr (K::kShared) {
    stage<K>(shared, args.x, b0, args.batch, args.inputs, args.tile_rows, me);
    __syncthreads();
    samples = reinterpret_cast<const unsigned char*>(shared);
  } else {
    samples = reinterpret_cast<const unsigned char*>(args.tiles + b0 * args.tile_rows);
  }
  const Synapses& synapses = args.synapses;
  const int32_t* const rows = synapses.rows + me.group;
  for (uint32_t item = me.warp * args.parts + part; item < uint32_t(synapses.items);
       item += args.parts * me.warps) {
    A v[K::kVec] = {};
    int32_t bundle = __ldg(synapses.bundles + item);
    const int32_t last = __ldg(synapses.bundles + item + 1);
    int32_t step = __ldg(synapses.steps + bundle);
    const auto* index =
        static_cast<const typename K::Index*>(synapses.index) + first_slot<K>(step, me);
    const A* weight = args.weight + first_slot<K>(step, me);
    for (; bundle < last; ++bundle) {
      const int32_t r = __ldg(rows + int64_t(bundle) * K::kGroups);
      const int32_t next = __ldg(synapses.steps + bundle + 1);
      const A bias = args.dendrite_bias && r >= 0 ? __ldg(args.dendrite_bias + r) : A(0);
      const A cable = !args.cable ? A(1) : r >= 0 ? __ldg(args.cable + r) : A(0);
      A u[K::kVec] = {};
      for_steps<K>(
          next - step,
          [&](int ahead) {
            Indices<K> columns;
            columns.load(index + ahead);
            const auto w = load_readonly<Vector<A, K::kChunk>>(weight + ahead);
            typename K::V x[K::kChunk];
            gather_all<K>(samples, columns, me.offset, x);
            add_products<K>(x, [&](int j, int) { return w.value[j]; }, u);
          },
          [&](int slots) {
            index += slots;
            weight += slots;
          });
      step = next;
#pragma unroll
      for (int i = 0; i < K::kVec; ++i) {
        u[i] += bias;
        v[i] += cable * leaky(u[i], args.slope);
      }
      if (args.signs) store_signs<K>(args.signs, args.rows, r, b0, args.batch, u, me);
    }
    const int32_t s = output_of<K>(synapses, item, me);
    const A bias = args.soma_bias && s >= 0 ? args.soma_bias[s] : A(0);
    const bool writes = s >= 0 && leads_team<K>(synapses, me);
#pragma unroll
    for (int i = 0; i < K::kVec; ++i) {
      const A sum = sum_team<K>(v[i], synapses.team_bits) + bias;
      const int64_t b = b0 + i * K::kLanes + me.place;
      if (writes && b < args.batch)
        narrow(leaky(sum, args.soma_slope), args.y[b * args.outputs + s]);
    }
  }
}

constexpr int kFewThreads = 128;

// Few samples, any N: a lane computes one dendrite for all of them, straight from x. No tile, one
// pass over the weights. A warp is one soma (32 rows without somas).
template <class T, class Index, int SAMPLES>
__global__ void __launch_bounds__(kFewThreads, 1) forward_rows(const ForwardArgs<T> args) {
  using A = Accumulator<T>;
  using K = Kind<T, 1, 1, false, Index>;
  const Thread<K> me;
  const Synapses& synapses = args.synapses;  // one row in a bundle, one output in an item
  const bool somas = args.cable != nullptr;
  const int32_t items = somas ? args.outputs : (args.rows + 31) / 32;
  for (uint32_t s = blockIdx.x * me.warps + me.warp; s < uint32_t(items);
       s += gridDim.x * me.warps) {
    const int32_t first = somas ? __ldg(synapses.bundles + s) : s * 32;
    const int32_t last = somas ? __ldg(synapses.bundles + s + 1) : first + 32;
    A v[SAMPLES] = {};
    for (int32_t r = first + me.place; r < last && r < args.rows; r += 32) {
      A u[SAMPLES];
#pragma unroll
      for (int b = 0; b < SAMPLES; ++b) u[b] = args.dendrite_bias ? args.dendrite_bias[r] : A(0);
      const int32_t stop = __ldg(synapses.steps + r + 1);
      for (int32_t step = __ldg(synapses.steps + r); step < stop; ++step) {
        const int64_t slot = int64_t(step) * K::kStep;
        Indices<K> index;
        index.load(static_cast<const Index*>(synapses.index) + slot);
        const auto weight = load_readonly<Vector<A, K::kChunk>>(args.weight + slot);
        A sum[SAMPLES] = {};  // of the chunk, as in add_products
#pragma unroll
        for (int j = 0; j < K::kChunk; ++j) {
          const uint32_t word = index.words.value[K::kNarrow ? j / 2 : j];
          const uint32_t n = !K::kNarrow ? word : j % 2 ? word >> 16 : word & 0xffffu;
          if (n < uint32_t(args.inputs)) {  // not a pad
#pragma unroll
            for (int b = 0; b < SAMPLES; ++b)
              if (b < args.batch)
                sum[b] += weight.value[j] * widen(args.x[int64_t(b) * args.inputs + n]);
          }
        }
#pragma unroll
        for (int b = 0; b < SAMPLES; ++b) u[b] += sum[b];
      }
      uint32_t signs = 0;
#pragma unroll
      for (int b = 0; b < SAMPLES; ++b) {
        signs |= uint32_t(u[b] > 0) << b;
        if (somas)
          v[b] += args.cable[r] * leaky(u[b], args.slope);
        else if (b < args.batch)
          narrow(u[b], args.y[int64_t(b) * args.rows + r]);
      }
      if (args.signs) args.signs[r] = signs;
    }
    if (!somas) continue;
#pragma unroll
    for (int b = 0; b < SAMPLES; ++b) {
#pragma unroll
      for (int bit = 16; bit; bit >>= 1) v[b] += __shfl_xor_sync(kAllLanes, v[b], bit);
      v[b] += args.soma_bias ? args.soma_bias[s] : A(0);
      if (me.place == 0 && b < args.batch)
        narrow(leaky(v[b], args.soma_slope), args.y[int64_t(b) * args.outputs + s]);
    }
  }
}

}  // namespace dk
