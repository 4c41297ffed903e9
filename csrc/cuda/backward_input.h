// Gradient of the input: dx[b, n] = sum over the synapses (r, k) of column n of w c q[b, r].
// Gathers gv and sign bits along the transposed synapses: no atomics, and q [B, R] is never stored.
#pragma once

#include "tile.h"

namespace dk {

// Tiles arrive from `make_tiles` in the layout of shared memory: a plain copy.
template <class K>
DK_DEVICE void copy_tile(typename K::V* tile, const typename K::T* from, int32_t tile_rows) {
  const int count = int(tile_rows) * K::kLanes;
  for (int i = threadIdx.x; i < count; i += int(blockDim.x))
    tile[i] = load_readonly<typename K::V>(from + int64_t(i) * K::kVec);
}

// The tile's sign bits of all dendrites: [R][kWords] pieces.
template <class K>
DK_DEVICE void stage_signs(typename SignBits<K>::Piece* staged, const uint32_t* signs, int32_t rows,
                           int64_t b0, int64_t batch) {
  using Bits = SignBits<K>;
#pragma unroll
  for (int w = 0; w < Bits::kWords; ++w) {
    const bool exists = b0 + 32 * w < batch;
    const auto* from = Bits::first(signs, rows, b0, w);
    for (int32_t r = threadIdx.x; r < rows; r += int32_t(blockDim.x))
      staged[r * Bits::kWords + w] = exists ? from[int64_t(r) * (4 / sizeof(*from))] : 0;
  }
}

// The sign bits of the dendrites of a chunk, from shared memory: one load for each dendrite.
template <class K, int J = 0>
DK_DEVICE void staged_signs(const unsigned char* staged, const Indices<K, true>& dendrite,
                            SignBits<K> (&bits)[K::kChunk]) {
  if constexpr (J < K::kChunk) {
    bits[J] = *reinterpret_cast<const SignBits<K>*>(
        staged + dendrite.template at<J, SignBits<K>::kBytes>(0));
    staged_signs<K, J + 1>(staged, dendrite, bits);
  }
}

// The same from global memory.
template <class K, int J = 0>
DK_DEVICE void distant_signs(const uint32_t* signs, int64_t rows, int64_t b0, int64_t batch,
                             const Indices<K, false>& dendrite, SignBits<K> (&bits)[K::kChunk]) {
  if constexpr (J < K::kChunk) {
    const int32_t r = int32_t(dendrite.template at<J, 1>(0));
    bits[J] = load_signs<K>(signs, rows, r, b0, batch);
    distant_signs<K, J + 1>(signs, rows, b0, batch, dendrite, bits);
  }
}

// Where sign bits are: not needed, behind the tile in shared memory, or in global memory.
enum class Signs { none, staged, distant };

// A warp computes some inputs for one batch tile. K stores the accumulator's type; O is dx's.
template <class K, class O, Signs SIGNS>
__global__ void __launch_bounds__(K::kMaxThreads, 1) backward_input(const InputArgs<O> args) {
  using A = typename K::A;
  using Bits = SignBits<K>;
  using Index = typename K::Index;
  constexpr bool kStaged = SIGNS == Signs::staged;
  // Sign bits that are far away take more registers.
  constexpr int kUnroll = SIGNS == Signs::distant && K::kGroups > 1 ? 2 : K::kUnroll;
  using Dendrite = std::conditional_t<kStaged, uint16_t, int32_t>;
  DK_SHARED_MEMORY(unsigned char, shared);
  const Thread<K> me;
  const Synapses& synapses = args.synapses;
  const int32_t tile = blockIdx.x / args.parts, part = blockIdx.x % args.parts;
  const int64_t b0 = int64_t(tile) * K::kSamples;
  const A* const from = args.grad_v + b0 * args.tile_rows;
  const unsigned char* samples = reinterpret_cast<const unsigned char*>(from);
  const unsigned char* signs = nullptr;
  if constexpr (K::kShared) {
    samples = shared;
    copy_tile<K>(reinterpret_cast<typename K::V*>(shared), from, args.tile_rows);
    if constexpr (kStaged) {
      unsigned char* const behind = shared + uint32_t(args.tile_rows) * K::kRowBytes;
      stage_signs<K>(reinterpret_cast<typename Bits::Piece*>(behind), args.signs, args.rows, b0,
                     args.batch);
      signs = behind;
    }
    __syncthreads();
  }
  for (uint32_t item = me.warp * args.parts + part; item < uint32_t(synapses.items);
       item += args.parts * me.warps) {  // an item is one bundle
    A sum[K::kVec] = {};
    const int32_t step = __ldg(synapses.steps + item);
    const int64_t slot = first_slot<K>(step, me);
    const auto* index = static_cast<const Index*>(synapses.index) + slot;
    const auto* dendrite = static_cast<const Dendrite*>(synapses.dendrite) + slot;
    const A* weight = args.weight + slot;
    for_steps<K, kUnroll>(
        __ldg(synapses.steps + item + 1) - step,
        [&](int ahead) {
          Indices<K> outputs;
          outputs.load(index + ahead);
          const auto w = load_readonly<Vector<A, K::kChunk>>(weight + ahead);
          Bits bits[K::kChunk];
          if constexpr (SIGNS != Signs::none) {
            Indices<K, kStaged> dendrites;
            dendrites.load(dendrite + ahead);
            if constexpr (kStaged)
              staged_signs<K>(signs, dendrites, bits);
            else
              distant_signs<K>(args.signs, args.rows, b0, args.batch, dendrites, bits);
          }
          typename K::V grad[K::kChunk];
          gather_all<K>(samples, outputs, me.offset, grad);
          add_products<K>(
              grad,
              [&](int j, int i) {
                const bool whole = SIGNS == Signs::none || bits[j].positive(i, me.place);
                return whole ? w.value[j] : args.slope * w.value[j];
              },
              sum);
        },
        [&](int slots) {
          index += slots;
          dendrite += slots;
          weight += slots;
        });
    const int32_t n = __ldg(synapses.rows + int64_t(item) * K::kGroups + me.group);
#pragma unroll
    for (int i = 0; i < K::kVec; ++i) {
      const int64_t b = b0 + i * K::kLanes + me.place;
      if (n >= 0 && b < args.batch) narrow(sum[i], args.dx[b * args.inputs + n]);
    }
  }
}

}  // namespace dk
