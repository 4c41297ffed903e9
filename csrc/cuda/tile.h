// A tile of samples that warps gather from, and how lanes share the work of a row.
#pragma once

#include "arguments.h"
#include "device.h"

namespace dk {

// GROUPS = 1: the 32 lanes of a warp hold different samples, VEC each, and a synapse is one gather
// of 32 * VEC samples. GROUPS = 2, 4, 8: where so many samples do not fit shared memory, or are not
// there, groups of 32 / GROUPS lanes take different rows, so that what a row costs beside its
// synapses is shared. A lane always gathers 8 bytes: half a warp empties the 32 banks in one go.
template <class T_, int VEC_, int GROUPS_, bool SHARED_, class Index_>
struct Kind {
  using T = T_;
  using A = Accumulator<T>;
  using Index = Index_;
  using V = Vector<T, VEC_>;
  static constexpr int kVec = VEC_, kGroups = GROUPS_;
  static constexpr bool kShared = SHARED_;  // the tile is in shared memory, else behind L2
  static constexpr int kLanes = 32 / GROUPS_, kSamples = kLanes * VEC_;
  static constexpr int kChunk = GROUPS_ == 1 ? 8 : 4;  // synapses that a lane loads at once
  static constexpr int kStep = kChunk * GROUPS_;       // synapses that a warp loads at once
  static constexpr uint32_t kRowBytes = kLanes * sizeof(V);
  static constexpr bool kNarrow = sizeof(Index) == 2;
  static constexpr int kUnroll = (VEC_ == 4 ? 8 : 16) / kChunk;  // steps in a row
  // Threads of a block at most: leaves a thread 64 registers (128), so that no kernel spills.
  static constexpr int kMaxThreads = kShared && sizeof(A) == 4 ? 1024 : 512;
};

// Where a thread stands: its lane of a group of the warp, and the warp in the block.
template <class K>
struct Thread {
  int place, group, warp, warps;
  uint32_t offset;  // of this lane's samples in a row of the tile, in bytes
  DK_DEVICE Thread()
      : place(int(threadIdx.x % K::kLanes)),
        group(int(threadIdx.x % 32 / K::kLanes)),
        // The compiler must see that it is the same in all lanes.
        warp(__shfl_sync(kAllLanes, int(threadIdx.x / 32), 0)),
        warps(int(blockDim.x / 32)),
        offset(uint32_t(place * sizeof(typename K::V))) {}
};

// Indices of kChunk synapses as loaded: two of 16 bits in a word, or one of 32.
template <class K, bool NARROW = K::kNarrow>
struct Indices {
  static constexpr int kWords = NARROW ? K::kChunk / 2 : K::kChunk;
  Vector<uint32_t, kWords> words;
  DK_DEVICE void load(const void* from) { words = load_readonly<Vector<uint32_t, kWords>>(from); }
  // Index J, as bytes in an array of STRIDE-byte rows, plus an offset below STRIDE.
  template <int J, uint32_t STRIDE>
  DK_DEVICE uint32_t at(uint32_t offset) const {
    const uint32_t word = words.value[NARROW ? J / 2 : J];
    if constexpr (!NARROW)
      return word * STRIDE + offset;
    else if constexpr (STRIDE == 256)  // one byte permutation builds the address
      return __byte_perm(word, offset, J % 2 ? 0x7324 : 0x7104);
    else
      return (J % 2 ? word >> 16 : word & 0xffffu) * STRIDE + offset;
  }
};

// The samples of this lane in the tile row that synapse J of the chunk names.
template <class K, int J>
DK_DEVICE typename K::V gather(const unsigned char* tile, const Indices<K>& q, uint32_t offset) {
  using V = typename K::V;
  if constexpr (K::kShared)
    return *reinterpret_cast<const V*>(tile + q.template at<J, K::kRowBytes>(offset));
  else  // it may have more than 2**32 bytes
    return load_readonly<V>(tile + size_t(q.template at<J, 1>(0)) * K::kRowBytes + offset);
}

// The same for all synapses of the chunk, so that their loads are in flight together.
template <class K, int J = 0>
DK_DEVICE void gather_all(const unsigned char* tile, const Indices<K>& q, uint32_t offset,
                          typename K::V (&out)[K::kChunk]) {
  if constexpr (J < K::kChunk) {
    out[J] = gather<K, J>(tile, q, offset);
    gather_all<K, J + 1>(tile, q, offset, out);
  }
}

// sum[i] += weight(j, i) * x[j].value[i] over the chunk. A sum of the chunks' sums rounds off less
// than one long chain.
template <class K, class Weight>
DK_DEVICE void add_products(const typename K::V (&x)[K::kChunk], const Weight& weight,
                            typename K::A (&sum)[K::kVec]) {
#pragma unroll
  for (int i = 0; i < K::kVec; ++i) {
    typename K::A chunk = weight(0, i) * widen(x[0].value[i]);
#pragma unroll
    for (int j = 1; j < K::kChunk; ++j) chunk += weight(j, i) * widen(x[j].value[i]);
    sum[i] += chunk;
  }
}

// First slot of this lane's group in a step.
template <class K>
DK_DEVICE int64_t first_slot(int32_t step, const Thread<K>& me) {
  return int64_t(step) * K::kStep + me.group * K::kChunk;
}

// Calls body(ahead) for `count` steps, some of them in a row, and then advance(slots): pointers
// that move on by a constant cost one addition for several steps.
template <class K, int UNROLL = K::kUnroll, class Body, class Advance>
DK_DEVICE void for_steps(int32_t count, const Body& body, const Advance& advance) {
#pragma unroll 1
  for (; count >= UNROLL; count -= UNROLL) {
#pragma unroll
    for (int j = 0; j < UNROLL; ++j) body(j * K::kStep);
    advance(UNROLL * K::kStep);
  }
#pragma unroll 1
  for (; count > 0; --count) {
    body(0);
    advance(K::kStep);
  }
}

// Four values of a row of x from column n on; zeros past its end.
template <class T>
DK_DEVICE void load_four(const T* row, int32_t n, int32_t inputs, bool whole, T (&out)[4]) {
  if (whole) {
    const Vector<T, 4> v = load_readonly<Vector<T, 4>>(row + n);
#pragma unroll
    for (int j = 0; j < 4; ++j) out[j] = v.value[j];
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) out[j] = n + j < inputs ? row[n + j] : T{};
  }
}

// x[b0 .. b0 + kSamples) into the shared tile; samples past the batch and the row of pads are zero.
template <class K>
DK_DEVICE void stage(typename K::V* tile, const typename K::T* x, int64_t b0, int64_t batch,
                     int32_t inputs, int32_t tile_rows, const Thread<K>& me) {
  using T = typename K::T;
  const int p = me.place;
  if constexpr (K::kGroups == 1) {
    // A lane reads four neighbours of each of its samples: 16 bytes of float.
    const bool aligned = inputs % 4 == 0 && reinterpret_cast<uintptr_t>(x) % (4 * sizeof(T)) == 0;
    for (int32_t n = me.warp * 4; n < inputs; n += me.warps * 4) {
      T four[K::kVec][4];
#pragma unroll
      for (int v = 0; v < K::kVec; ++v) {
        const int64_t b = b0 + v * K::kLanes + p;
        load_four(x + (b < batch ? b : 0) * inputs, b < batch ? n : inputs, inputs,
                  aligned && b < batch, four[v]);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        typename K::V out;
#pragma unroll
        for (int v = 0; v < K::kVec; ++v) out.value[v] = four[v][j];
        if (n + j < inputs) tile[int64_t(n + j) * K::kLanes + p] = out;
      }
    }
  } else {
    // Neighbouring rows go to neighbouring groups: their stores hit different banks.
    for (int32_t n = me.warp * K::kGroups + me.group; n < inputs; n += me.warps * K::kGroups) {
      typename K::V out;
#pragma unroll
      for (int v = 0; v < K::kVec; ++v) {
        const int64_t b = b0 + v * K::kLanes + p;
        out.value[v] = b < batch ? x[b * inputs + n] : T{};
      }
      tile[int64_t(n) * K::kLanes + p] = out;
    }
  }
  if (tile_rows > inputs && me.warp == 0 && me.group == 0)
    tile[int64_t(inputs) * K::kLanes + p] = typename K::V{};
}

// What the team of this group computes, -1: nothing.
template <class K>
DK_DEVICE int32_t output_of(const Synapses& synapses, uint32_t item, const Thread<K>& me) {
  const int64_t team = (int64_t(item) * K::kGroups + me.group) >> synapses.team_bits;
  return __ldg(synapses.outputs + team);
}

// Whether this group is the first one of its team.
template <class K>
DK_DEVICE bool leads_team(const Synapses& synapses, const Thread<K>& me) {
  return (me.group & ((1 << synapses.team_bits) - 1)) == 0;
}

// Sum over the groups of a team; all its lanes get it.
template <class K>
DK_DEVICE typename K::A sum_team(typename K::A value, int team_bits) {
  for (int bit = K::kLanes; bit < K::kLanes << team_bits; bit *= 2)
    value += __shfl_xor_sync(kAllLanes, value, bit);
  return value;
}

// The sign bits of a dendrite for the samples of a tile.
template <class K>
struct SignBits {
  static constexpr int kWords = K::kSamples < 32 ? 1 : K::kSamples / 32;
  // Tiles of fewer than 32 samples share a word: each has bytes of its own (little-endian).
  using Piece = std::conditional_t<K::kSamples >= 32, uint32_t,
                                   std::conditional_t<K::kSamples == 16, uint16_t, uint8_t>>;
  static constexpr int kBytes = kWords * int(sizeof(Piece));
  alignas(kBytes) Piece piece[kWords];  // one wide load

  DK_DEVICE bool positive(int i, int place) const {
    return piece[i * K::kLanes / 32] >> (i * K::kLanes % 32 + place) & 1u;
  }
  // Where the tile's piece w of dendrite 0 is in signs [ceil(B / 32), R]; dendrites are words
  // apart.
  template <class Signs>
  DK_DEVICE static auto first(Signs* signs, int64_t rows, int64_t b0, int w) {
    using To = std::conditional_t<std::is_const_v<Signs>, const Piece, Piece>;
    return reinterpret_cast<To*>(signs + (b0 / 32 + w) * rows) + b0 % 32 / (8 * sizeof(Piece));
  }
};

// The sign bits of one dendrite, from memory. All are 0 where there is no dendrite.
template <class K>
DK_DEVICE SignBits<K> load_signs(const uint32_t* signs, int64_t rows, int32_t row, int64_t b0,
                                 int64_t batch) {
  using Bits = SignBits<K>;
  Bits bits;
#pragma unroll
  for (int w = 0; w < Bits::kWords; ++w)
    bits.piece[w] = row >= 0 && (w == 0 || b0 + 32 * w < batch)
                        ? __ldg(Bits::first(signs, rows, b0, w) +
                                row * int64_t(4 / sizeof(typename Bits::Piece)))
                        : 0;
  return bits;
}

}  // namespace dk
