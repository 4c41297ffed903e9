// Chooses the algorithm of backward: one sample, by rows, or over the transposed plan.
#pragma once

#include "backward_plan.h"
#include "backward_rows.h"
#include "backward_single.h"

namespace {

template <class T, int V>
void backward_without_dx(const dk::Topology& net, const dk::BackwardCall<T>& call,
                         const dk::Runtime& runtime) {
  constexpr int64_t kTile = V * kLanes<T>;
  const int64_t inputs = call.batch * net.in_features;
  const bool own_tiles = inputs * int64_t(sizeof(T)) > kHotBytes && inputs > 4 * net.nnz &&
                         call.batch >= runtime.threads * 4 * kTile;
  const auto run = [&](auto vectors) {
    if (own_tiles)
      backward_rows_by_tiles<T, vectors>(net, call, runtime);
    else
      backward_by_rows<T, vectors, false>(net, call, runtime);
  };
  // Without dx there are registers for tiles of twice as many samples. Selecting q and summing its
  // products then costs half as much per sample: 3 to 15 % less time.
  if constexpr (V == kTileVectors && kTileVectors == 4) {
    const int64_t wide_bytes = net.in_features * 2 * kTile * int64_t(sizeof(T));
    const bool no_more_pads = (call.batch - 1) % (2 * kTile) >= kTile;
    if (no_more_pads && wide_bytes <= runtime.l2_bytes / 2)
      return run(std::integral_constant<int, 2 * V>{});
  }
  run(std::integral_constant<int, V>{});
}

template <class T, int V>
void backward_with_dx(const dk::Topology& net, const dk::BackwardCall<T>& call,
                      const dk::Runtime& runtime) {
  const int64_t tiles = ceil_div(call.batch, V * kLanes<T>);
  const bool few_blocks = net.blocks < runtime.threads && net.blocks < tiles;
  // By blocks each thread has its own copy of dx, by tiles its own copy of G. Choose the smaller
  // copy.
  const bool large_batch = call.batch * net.in_features > 4 * net.plan_slot_ptr[net.blocks];
  if (few_blocks || large_batch)
    backward_by_tiles<T, V>(net, call, runtime);
  else
    backward_by_blocks<T, V>(net, call, runtime);
}

template <class T, int V>
void backward_tiled(const dk::Topology& net, const dk::BackwardCall<T>& call,
                    const dk::Runtime& runtime) {
  if (call.dx)
    backward_with_dx<T, V>(net, call, runtime);
  else
    backward_without_dx<T, V>(net, call, runtime);
}

template <class T>
void backward(const dk::Topology& net, const dk::BackwardCall<T>& call, const dk::Runtime& pool) {
  dk::Runtime runtime = pool;
  runtime.threads = int(useful_threads(pool, ceil_div(call.batch, 32) * (net.nnz + 4 * net.rows)));
  if (call.batch == 1) return backward_single<T>(net, call, runtime);
  constexpr int kFew = 16, kFewVectors = kFew / kLanes<T>;
  if (call.batch <= kFew) {
    if (call.dx) return backward_by_rows<T, kFewVectors, true>(net, call, runtime);
    return backward_by_rows<T, kFewVectors, false>(net, call, runtime);
  }
  // More vectors of samples per tile hide more of the latency of broadcasts. With AVX-512 two
  // vectors are enough where N is large, so that a tile of x stays in L2, or where the batch is
  // small, to waste less on padding. With dx a tile is read in the order of its columns, so it may
  // fill L2.
  if constexpr (kTileVectors * kLanes<T> > 32) {
    const int64_t wide = kTileVectors * kLanes<T>,
                  tile_bytes = net.in_features * wide * int64_t(sizeof(T));
    const int64_t most_bytes = call.dx ? runtime.l2_bytes : runtime.l2_bytes / 2;
    if (tile_bytes > most_bytes || call.batch <= wide / 2)
      return backward_tiled<T, 2>(net, call, runtime);
  }
  backward_tiled<T, kTileVectors>(net, call, runtime);
}

}  // namespace
