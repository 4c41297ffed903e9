// Entry points of one dtype: each enqueues its kernels on a stream and returns nullptr, or says
// what went wrong. No synchronisation, no allocation.
#pragma once

#include "arguments.h"

namespace dk {

// Which kernel and how many blocks: decided by the planner (backends/cuda/plan.py).
struct TilePlan {
  int vec, groups;  // see Kind in tile.h
  bool shared, narrow, staged;
  int64_t blocks;
  int threads;
};

using Stream = void*;  // cudaStream_t; hidden from the binding

template <class T>
struct Launcher {
  using A = Accumulator<T>;
  static const char* forward(const TilePlan&, const ForwardArgs<T>&, Stream);
  static const char* forward_few(bool narrow, int64_t blocks, const ForwardArgs<T>&, Stream);
  static const char* weight(const TilePlan&, const WeightArgs<T>&, Stream);
  static const char* finish(const FinishArgs<A>&, Stream);
  static const char* input(const TilePlan&, const InputArgs<T>&, Stream);
  static const char* x_tiles(const TileArgs<T, T>&, int64_t tile_count, Stream);
  static const char* grad_tiles(const TileArgs<T, A>&, int64_t tile_count, Stream);
  static const char* pack(const PackArgs<A>&, Stream);
};

extern template struct Launcher<float>;
extern template struct Launcher<double>;
extern template struct Launcher<bf16>;
extern template struct Launcher<f16>;

}  // namespace dk
