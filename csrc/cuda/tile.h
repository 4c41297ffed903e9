// A tile of samples that warps gather from, and how lanes share the work of a row.
#pragma once

#include "arguments.h"
#include "device.h"

namespace dk {

// GROUPS = 1: the 32 lanes of a warp hold different samples, VEC each, and a synapse is one gather
// of 32 * VEC samples. GROUPS = 2, 4, 8: where so many samples do not fit shared memory, or are not
// there, groups of 32 / GROUPS lanes take different synapses of the row and are summed at its end.
// A lane always gathers 8 bytes: half a warp empties the 32 banks in one go.
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
  // Threads of a block at most: leaves a thread 64 registers (128), so that no kernel spills.
  static constexpr int kMaxThreads = kShared && sizeof(A) == 4 ? 1024 : 512;
};

DK_DEVICE int32_t begin(const Ranges& ranges, int32_t i) {
  return ranges.table ? __ldg(ranges.table + i) : i * ranges.each;
}

struct Thread {
  int lane, warp, warps;
  DK_DEVICE Thread()
      : lane(threadIdx.x & 31), warp(threadIdx.x >> 5), warps(int(blockDim.x >> 5)) {}
};

// Indices of kChunk synapses as loaded: two of 16 bits in a word, or one of 32.
template <class K>
struct Indices {
  static constexpr int kWords = K::kNarrow ? K::kChunk / 2 : K::kChunk;
  Vector<uint32_t, kWords> words;
  DK_DEVICE void load(const void* index, int64_t slot) {
    words = load_readonly<Vector<uint32_t, kWords>>(static_cast<const typename K::Index*>(index) +
                                                    slot);
  }
};

// First slot of this lane's group in a step.
template <class K>
DK_DEVICE int64_t slot_of(int32_t step, int lane) {
  return int64_t(step) * K::kStep + lane / K::kLanes * K::kChunk;
}

// The samples of this lane in the tile row that synapse J of the chunk names.
template <class K, int J>
DK_DEVICE typename K::V gather(const unsigned char* tile, const Indices<K>& q, uint32_t offset) {
  using V = typename K::V;
  if constexpr (!K::kNarrow) {
    return load_readonly<V>(tile + size_t(q.words.value[J]) * K::kRowBytes + offset);
  } else {
    const uint32_t word = q.words.value[J / 2];
    uint32_t at;
    if constexpr (K::kShared && K::kRowBytes == 256)
      // One byte permutation builds the address: offset < 256 is byte 0, the index bytes 1 and 2.
      at = __byte_perm(word, offset, J % 2 ? 0x7324 : 0x7104);
    else
      at = (J % 2 ? word >> 16 : word & 0xffffu) * K::kRowBytes + offset;
    if constexpr (K::kShared)
      return *reinterpret_cast<const V*>(tile + at);
    else
      return load_readonly<V>(tile + at);
  }
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
// than one long chain; two short chains each are as fast.
template <class K, class Weight>
DK_DEVICE void add_products(const typename K::V (&x)[K::kChunk], const Weight& weight,
                            typename K::A (&sum)[K::kVec]) {
  using A = typename K::A;
  A even[K::kVec], odd[K::kVec];
#pragma unroll
  for (int j = 0; j < K::kChunk; ++j) {
#pragma unroll
    for (int i = 0; i < K::kVec; ++i) {
      const A product = weight(j, i) * widen(x[j].value[i]);
      A& chain = j % 2 ? odd[i] : even[i];
      chain = j < 2 ? product : chain + product;
    }
  }
#pragma unroll
  for (int i = 0; i < K::kVec; ++i) sum[i] += even[i] + odd[i];
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
                     int32_t inputs, int32_t tile_rows, const Thread& me) {
  using T = typename K::T;
  const int p = me.lane % K::kLanes, group = me.lane / K::kLanes;
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
    for (int32_t n = me.warp * K::kGroups + group; n < inputs; n += me.warps * K::kGroups) {
      typename K::V out;
#pragma unroll
      for (int v = 0; v < K::kVec; ++v) {
        const int64_t b = b0 + v * K::kLanes + p;
        out.value[v] = b < batch ? x[b * inputs + n] : T{};
      }
      tile[int64_t(n) * K::kLanes + p] = out;
    }
  }
  if (tile_rows > inputs && me.warp == 0 && me.lane < K::kLanes)
    tile[int64_t(inputs) * K::kLanes + p] = typename K::V{};
}

// Sum over the groups of a warp; every lane gets it, bit for bit the same in every group.
template <class K>
DK_DEVICE typename K::A sum_groups(typename K::A value) {
#pragma unroll
  for (int bit = K::kLanes; bit < 32; bit <<= 1) value += __shfl_xor_sync(kAllLanes, value, bit);
  return value;
}

}  // namespace dk
