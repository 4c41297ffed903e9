// Fused forward pass: synapses, dendrites, cable, soma, sign bits.
#pragma once

#include "tile.h"

namespace dk {

// Sign bits of one dendrite: a word for each 32 samples of the tile, or the tile's part of one.
template <class K>
struct SignWords {
  static constexpr int kWords = K::kSamples < 32 ? 1 : K::kSamples / 32;
  uint32_t word[kWords];

  // Every lane calls it with its samples' u. The bits of lanes 0 .. kLanes - 1 count; other groups
  // repeat them.
  DK_DEVICE void take(const typename K::A (&u)[K::kVec], bool keep) {
    constexpr uint32_t kMine = K::kLanes == 32 ? kAllLanes : (1u << K::kLanes % 32) - 1;
    uint32_t taken[kWords] = {};
#pragma unroll
    for (int v = 0; v < K::kVec; ++v)
      taken[v * K::kLanes / 32] |= (__ballot_sync(kAllLanes, u[v] > 0) & kMine)
                                   << (v * K::kLanes % 32);
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      if (keep) word[i] = taken[i];
  }

  DK_DEVICE void store(uint32_t* signs, int64_t rows, int64_t r, int64_t b0, int64_t batch) const {
    if constexpr (K::kSamples < 32) {
      // Tiles share a word: each writes its own bytes (little-endian, as GPUs are).
      using Piece = Vector<uint8_t, K::kSamples / 8>;
      Piece piece;
#pragma unroll
      for (int i = 0; i < K::kSamples / 8; ++i) piece.value[i] = uint8_t(word[0] >> (8 * i));
      reinterpret_cast<Piece*>(signs + b0 / 32 * rows + r)[b0 % 32 / K::kSamples] = piece;
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i)
        if (b0 + 32 * i < batch) signs[(b0 / 32 + i) * rows + r] = word[i];
    }
  }
};

// One warp computes one soma for one batch tile; blocks of `parts` share the tile's somas.
template <class K>
__global__ void __launch_bounds__(K::kMaxThreads, 1)
    forward_tile(const ForwardArgs<typename K::T> args) {
  using A = typename K::A;
  DK_SHARED_MEMORY(typename K::V, shared);
  const Thread me;
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
  const int p = me.lane % K::kLanes;
  const uint32_t offset = p * uint32_t(sizeof(typename K::V));
  for (uint32_t s = part * me.warps + me.warp; s < uint32_t(args.outputs);
       s += args.parts * me.warps) {
    const int32_t first = begin(args.dendrites, s), last = begin(args.dendrites, s + 1);
    A v[K::kVec];
#pragma unroll
    for (int i = 0; i < K::kVec; ++i) v[i] = args.soma_bias ? args.soma_bias[s] : A(0);
    SignWords<K> signs{};
    // The slots of a soma are one stretch: the next chunk is loaded while this one is used.
    int32_t step = begin(args.steps, first);
    const int32_t end = begin(args.steps, last);
    Indices<K> next_index{};
    Vector<A, K::kChunk> next_weight{};
    const auto prefetch = [&](int32_t at) {
      if (at >= end) return;
      const int64_t slot = slot_of<K>(at, me.lane);
      next_index.load(args.index, slot);
      next_weight = load_readonly<Vector<A, K::kChunk>>(args.weight + slot);
    };
    prefetch(step);
    for (int32_t r = first; r < last; ++r) {
      const int32_t stop = begin(args.steps, r + 1);
      const A cable = args.cable ? args.cable[r] : A(1);
      const A bias = args.dendrite_bias ? args.dendrite_bias[r] : A(0);
      A u[K::kVec] = {};
      while (step < stop) {
        const Indices<K> index = next_index;
        const Vector<A, K::kChunk> weight = next_weight;
        prefetch(++step);
        typename K::V x[K::kChunk];
        gather_all<K>(samples, index, offset, x);
        add_products<K>(x, [&](int j, int) { return weight.value[j]; }, u);
      }
#pragma unroll
      for (int i = 0; i < K::kVec; ++i) {
        u[i] = sum_groups<K>(u[i]) + bias;
        v[i] += cable * (args.cable ? leaky(u[i], args.slope) : u[i]);
      }
      if (args.signs) {
        // Lane d % 32 keeps dendrite d; 32 of them leave in one coalesced store.
        const int d = (r - first) % 32;
        signs.take(u, me.lane == d);
        if ((d == 31 || r == last - 1) && me.lane <= d)
          signs.store(args.signs, args.rows, r - d + me.lane, b0, args.batch);
      }
    }
#pragma unroll
    for (int i = 0; i < K::kVec; ++i) {
      const int64_t b = b0 + i * K::kLanes + p;
      if (me.lane < K::kLanes && b < args.batch)
        narrow(args.cable ? leaky(v[i], args.soma_slope) : v[i], args.y[b * args.outputs + s]);
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
  const Thread me;
  const bool somas = args.cable != nullptr;
  const int32_t items = somas ? args.outputs : (args.rows + 31) / 32;
  for (uint32_t s = blockIdx.x * me.warps + me.warp; s < uint32_t(items);
       s += gridDim.x * me.warps) {
    const int32_t first = somas ? begin(args.dendrites, s) : s * 32;
    const int32_t last = somas ? begin(args.dendrites, s + 1) : first + 32;
    A v[SAMPLES] = {};
    for (int32_t r = first + me.lane; r < last && r < args.rows; r += 32) {
      A u[SAMPLES];
#pragma unroll
      for (int b = 0; b < SAMPLES; ++b) u[b] = args.dendrite_bias ? args.dendrite_bias[r] : A(0);
      const int32_t stop = begin(args.steps, r + 1);
      for (int32_t step = begin(args.steps, r); step < stop; ++step) {
        Indices<K> index;
        index.load(args.index, int64_t(step) * K::kStep);
        const auto weight =
            load_readonly<Vector<A, K::kChunk>>(args.weight + int64_t(step) * K::kStep);
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
      if (me.lane == 0 && b < args.batch)
        narrow(leaky(v[b], args.soma_slope), args.y[int64_t(b) * args.outputs + s]);
    }
  }
}

}  // namespace dk
