// What the other kernels read: tiles of samples, and weights in packed order.
#pragma once

#include "arguments.h"
#include "device.h"

namespace dk {

// A block of 256 threads turns 32 columns of one tile over: reads along columns, writes along
// samples. Shared memory: samples * 33 elements.
constexpr int kTileColumns = 32;

template <class T, class O>
__global__ void __launch_bounds__(256) make_tiles(const TileArgs<T, O> args) {
  using A = Accumulator<T>;
  DK_SHARED_MEMORY(O, buffer);
  const int samples = 1 << args.sample_bits, lanes = 1 << args.lane_bits;
  const int vec = samples >> args.lane_bits, stride = kTileColumns + 1;
  const int32_t chunks = (args.tile_rows + kTileColumns - 1) / kTileColumns;
  const int64_t tile = blockIdx.x / chunks, b0 = tile * samples;
  const int32_t c0 = int32_t(blockIdx.x % chunks) * kTileColumns;
  const int c = threadIdx.x % kTileColumns;
  for (int sample = threadIdx.x / kTileColumns; sample < samples;
       sample += int(blockDim.x) / kTileColumns) {
    const int64_t b = b0 + sample;
    A value = 0;
    if (b < args.batch && c0 + c < args.columns) {
      const int64_t at = b * args.columns + c0 + c;
      value = widen(args.in[at]);
      if (args.y && !(widen(args.y[at]) > A(0))) value *= args.slope;
    }
    // Sample v * lanes + p goes to place p * vec + v.
    const int place = (sample & (lanes - 1)) * vec + (sample >> args.lane_bits);
    narrow(value, buffer[place * stride + c]);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < samples * kTileColumns; i += int(blockDim.x)) {
    const int column = i >> args.sample_bits, place = i & (samples - 1);
    if (c0 + column < args.tile_rows)
      args.out[((tile * args.tile_rows + c0 + column) << args.sample_bits) + place] =
          buffer[place * stride + column];
  }
}

template <class A>
__global__ void __launch_bounds__(256) pack_weight(const PackArgs<A> args) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= args.slots) return;
  const int32_t from = args.source[i];
  A weight = from < 0 ? A(0) : args.weight[from];
  if (args.cable && from >= 0) {
    const int32_t r = args.staged ? static_cast<const uint16_t*>(args.dendrite)[i]
                                  : static_cast<const int32_t*>(args.dendrite)[i];
    weight *= args.cable[r];
  }
  args.packed[i] = weight;
}

}  // namespace dk
