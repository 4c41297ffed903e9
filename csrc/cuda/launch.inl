// Chooses the instance of a kernel that a plan asks for. The one dispatch table: a new kind of tile
// is one line in `Kinds`.
#include <atomic>

#include "backward_input.h"
#include "backward_weight.h"
#include "forward.h"
#include "launch.h"
#include "layout.h"

namespace dk {
namespace {

constexpr int kFewSamples = 8;  // that forward_rows takes at most

#ifndef DK_EMULATE
// Lets a kernel have all the shared memory of a block, once on each device.
template <auto KERNEL>
cudaError_t grant_shared_memory() {
  constexpr int kDevices = 64;
  static std::atomic<bool> granted[kDevices];
  int device = 0, bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess || (device < kDevices && granted[device])) return error;
  error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess && device < kDevices) granted[device] = true;
  return error;
}
#endif

template <auto KERNEL, class Args>
const char* start(int64_t blocks, int threads, size_t bytes, Stream stream, const Args& args) {
  if (blocks <= 0) return nullptr;
  if (blocks > INT32_MAX) return "Expected fewer than 2**31 blocks, got more: use smaller batches";
#ifdef DK_EMULATE
  (void)stream;
  emulator::launch(unsigned(blocks), unsigned(threads), bytes, [&] { KERNEL(args); });
  return nullptr;
#else
  cudaError_t error = cudaSuccess;
  if (bytes > 48 << 10)  // more than every device grants unasked
    error = grant_shared_memory<KERNEL>();
  void* arguments[] = {const_cast<Args*>(&args)};
  if (error == cudaSuccess)
    error = cudaLaunchKernel(reinterpret_cast<const void*>(KERNEL), dim3(unsigned(blocks)),
                             dim3(unsigned(threads)), arguments, bytes,
                             static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#endif
}

template <auto N>
struct Constant {
  static constexpr auto value = N;
};

template <class... K>
struct List {};

// Tiles in shared memory, the widest first, then one for gathers from L2. Shared memory never holds
// more rows than 16 bits count.
template <int BYTES>
struct Kinds;
template <>
struct Kinds<4> {
  template <class T>
  using of = List<Kind<T, 2, 1, true, uint16_t>, Kind<T, 2, 2, true, uint16_t>,
                  Kind<T, 2, 4, true, uint16_t>, Kind<T, 2, 8, true, uint16_t>,
                  Kind<T, 2, 1, false, uint16_t>, Kind<T, 2, 1, false, int32_t>>;
};
template <>
struct Kinds<2> {
  template <class T>
  using of = List<Kind<T, 4, 1, true, uint16_t>, Kind<T, 4, 2, true, uint16_t>,
                  Kind<T, 4, 4, true, uint16_t>, Kind<T, 4, 8, true, uint16_t>,
                  Kind<T, 4, 1, false, uint16_t>, Kind<T, 4, 1, false, int32_t>>;
};
template <>
struct Kinds<8> {
  template <class T>
  using of = List<Kind<T, 1, 1, true, uint16_t>, Kind<T, 1, 4, true, uint16_t>,
                  Kind<T, 1, 1, false, uint16_t>, Kind<T, 1, 1, false, int32_t>>;
};

// Calls run(K()) for the kind that the plan names.
template <class F>
const char* choose(const TilePlan&, const F&, List<>) {
  return "Expected a kind of tile that was compiled, got another";
}
template <class F, class K, class... Rest>
const char* choose(const TilePlan& plan, const F& run, List<K, Rest...>) {
  if (plan.vec == K::kVec && plan.groups == K::kGroups && plan.shared == K::kShared &&
      plan.narrow == K::kNarrow)
    return run(K());
  return choose(plan, run, List<Rest...>());
}

template <class K>
size_t tile_bytes(int32_t tile_rows) {
  return K::kShared ? size_t(tile_rows) * K::kRowBytes : 0;
}

template <class T>
using KindsOf = typename Kinds<sizeof(T)>::template of<T>;

}  // namespace

template <class T>
const char* Launcher<T>::forward(const TilePlan& plan, const ForwardArgs<T>& args, Stream stream) {
  return choose(
      plan,
      [&](auto kind) {
        using K = decltype(kind);
        return start<forward_tile<K>>(plan.blocks, plan.threads, tile_bytes<K>(args.tile_rows),
                                      stream, args);
      },
      KindsOf<T>());
}

template <class T>
const char* Launcher<T>::forward_few(bool narrow, int64_t blocks, const ForwardArgs<T>& args,
                                     Stream stream) {
  if (args.batch > kFewSamples) return "Expected at most 8 samples, got more";
  const auto run = [&](auto index, auto samples) {
    return start<forward_rows<T, decltype(index), decltype(samples)::value>>(blocks, kFewThreads, 0,
                                                                             stream, args);
  };
  using One = Constant<1>;
  using Few = Constant<kFewSamples>;
  if (args.batch == 1) return narrow ? run(uint16_t(), One()) : run(int32_t(), One());
  return narrow ? run(uint16_t(), Few()) : run(int32_t(), Few());
}

template <class T>
const char* Launcher<T>::weight(const TilePlan& plan, const WeightArgs<T>& args, Stream stream) {
  if (args.groups > args.tile_count) return "Expected no more groups than tiles, got more";
  return choose(
      plan,
      [&](auto kind) {
        using K = decltype(kind);
        return start<backward_weight<K>>(plan.blocks, plan.threads, tile_bytes<K>(args.tile_rows),
                                         stream, args);
      },
      KindsOf<T>());
}

template <class T>
const char* Launcher<T>::finish(const FinishArgs<A>& args, Stream stream) {
  const int64_t threads = int64_t(args.synapses.bundle_count) * 32;
  const int64_t needed = threads > args.somas ? threads : args.somas;
  const int64_t blocks = (needed + 255) / 256;
  if (args.adam.weight) return start<finish_weight<A, true>>(blocks, 256, 0, stream, args);
  return start<finish_weight<A, false>>(blocks, 256, 0, stream, args);
}

template <class T>
const char* Launcher<T>::input(const TilePlan& plan, const InputArgs<T>& args, Stream stream) {
  return choose(
      plan,
      [&](auto kind) {
        using K = decltype(kind);
        const auto run = [&](auto signs, size_t sign_bytes) {
          return start<backward_input<K, T, decltype(signs)::value>>(
              plan.blocks, plan.threads, tile_bytes<K>(args.tile_rows) + sign_bytes, stream, args);
        };
        if (!args.signs) return run(Constant<Signs::none>(), 0);
        if constexpr (K::kShared)
          if (plan.staged)
            return run(Constant<Signs::staged>(), size_t(args.rows) * SignBits<K>::kBytes);
        return run(Constant<Signs::distant>(), 0);
      },
      KindsOf<A>());
}

template <class T, class O>
static const char* start_tiles(const TileArgs<T, O>& args, int64_t tile_count, Stream stream) {
  const int64_t chunks = (int64_t(args.tile_rows) + kTileColumns - 1) / kTileColumns;
  const size_t bytes = (size_t(kTileColumns + 1) << args.sample_bits) * sizeof(O);
  return start<make_tiles<T, O>>(chunks * tile_count, 256, bytes, stream, args);
}

template <class T>
const char* Launcher<T>::x_tiles(const TileArgs<T, T>& args, int64_t tile_count, Stream stream) {
  return start_tiles(args, tile_count, stream);
}

template <class T>
const char* Launcher<T>::grad_tiles(const TileArgs<T, A>& args, int64_t tile_count, Stream stream) {
  return start_tiles(args, tile_count, stream);
}

template <class T>
const char* Launcher<T>::pack(const PackArgs<A>& args, Stream stream) {
  return start<pack_weight<A>>((args.slots + 255) / 256, 256, 0, stream, args);
}

}  // namespace dk
