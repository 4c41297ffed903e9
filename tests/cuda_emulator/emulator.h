// Emulates a GPU on the host: the definitions that csrc/cuda/device.h takes from CUDA otherwise.
// Every CUDA thread is a fiber, so barriers, shuffles and ballots behave as on the device. Shared
// memory is a heap block of exactly the requested size, full of NaN, so that the address sanitizer
// detects overruns and results show reads of uninitialised memory. The order in which threads run
// is a parameter: if a barrier is missing, results depend on it.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace emulator {

struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
};
struct Warp {
  Barrier barrier;
  uint64_t exchange[32];
};
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  dim3 id;
  bool done = false;
};
struct Machine {
  dim3 block, threads, blocks;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  ucontext_t scheduler;
  int current = 0;
  long progress = 0, launches = 0;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  std::function<void()> kernel;
};

inline Machine machine;
inline int order = 0;
inline void (*explain_deadlock)() = [] {};
inline void set_order(int value) { order = value; }

inline Fiber& self() { return machine.fibers[size_t(machine.current)]; }
inline int lane() { return int(self().id.x % 32); }
inline Warp& warp() { return machine.warps[self().id.x / 32]; }

inline void yield() { swapcontext(&self().context, &machine.scheduler); }

inline void wait(Barrier& barrier, int count) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.generation;
    ++machine.progress;
  } else {
    while (barrier.generation == generation) yield();
  }
}

inline void run_thread() {
  machine.kernel();
  self().done = true;
  ++machine.progress;
  yield();
}

inline void start_fiber(Fiber& fiber, unsigned index) {
  constexpr size_t kStack = 1 << 17;
  if (!fiber.stack) fiber.stack.reset(new char[kStack]);
  fiber.id = {index, 0, 0};
  fiber.done = false;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = &machine.scheduler;
  makecontext(&fiber.context, run_thread, 0);
}

inline void run_block(unsigned threads, std::mt19937& random) {
  std::vector<int> turn(threads);
  for (unsigned t = 0; t < threads; ++t) turn[t] = int(order == 1 ? threads - 1 - t : t);
  for (int left = int(threads); left;) {
    if (order > 1) std::shuffle(turn.begin(), turn.end(), random);
    const long before = machine.progress;
    left = 0;
    for (int t : turn) {
      if (machine.fibers[size_t(t)].done) continue;
      machine.current = t;
      swapcontext(&machine.scheduler, &self().context);
      left += !machine.fibers[size_t(t)].done;
    }
    if (left && machine.progress == before) {
      explain_deadlock();
      std::fprintf(stderr, "emulator: threads of block %u wait for ever\n", machine.block.x);
      std::abort();
    }
  }
}

template <class F>
void launch(unsigned blocks, unsigned threads, size_t shared_bytes, F&& kernel) {
  std::mt19937 random{unsigned(order)};
  machine.blocks = {blocks, 1, 1};
  machine.threads = {threads, 1, 1};
  machine.kernel = kernel;
  machine.shared_bytes = shared_bytes;
  ++machine.launches;
  machine.fibers.resize(threads);
  for (unsigned b = 0; b < blocks; ++b) {
    void* shared = nullptr;
    if (posix_memalign(&shared, 128, std::max<size_t>(shared_bytes, 1))) std::abort();
    std::memset(shared, 0xff, shared_bytes);
    machine.shared = static_cast<unsigned char*>(shared);
    machine.block = {b, 0, 0};
    machine.barrier = {};
    machine.warps.assign((threads + 31) / 32, Warp{});
    for (unsigned t = 0; t < threads; ++t) start_fiber(machine.fibers[t], t);
    run_block(threads, random);
    std::free(shared);
  }
}

}  // namespace emulator

#define threadIdx (emulator::self().id)
#define blockIdx (emulator::machine.block)
#define blockDim (emulator::machine.threads)
#define gridDim (emulator::machine.blocks)
#define DK_SHARED_MEMORY(T, name) T* const name = reinterpret_cast<T*>(emulator::machine.shared)

inline void __syncthreads() {
  emulator::wait(emulator::machine.barrier, int(emulator::machine.threads.x));
}

// What the lane `from` of the same warp holds.
template <class T>
T exchange(unsigned lanes, T value, int from) {
  if (lanes != 0xffffffffu) std::abort();
  emulator::Warp& warp = emulator::warp();
  std::memcpy(&warp.exchange[emulator::lane()], &value, sizeof(T));
  emulator::wait(warp.barrier, 32);
  T result;
  std::memcpy(&result, &warp.exchange[from], sizeof(T));
  emulator::wait(warp.barrier, 32);
  return result;
}

template <class T>
T __shfl_sync(unsigned lanes, T value, int from) {
  return exchange(lanes, value, from);
}

template <class T>
T __shfl_xor_sync(unsigned lanes, T value, int mask) {
  return exchange(lanes, value, emulator::lane() ^ mask);
}

inline uint32_t __ballot_sync(unsigned lanes, bool vote) {
  if (lanes != 0xffffffffu) std::abort();
  emulator::Warp& warp = emulator::warp();
  warp.exchange[emulator::lane()] = vote;
  emulator::wait(warp.barrier, 32);
  uint32_t result = 0;
  for (int i = 0; i < 32; ++i) result |= uint32_t(warp.exchange[i] != 0) << i;
  emulator::wait(warp.barrier, 32);
  return result;
}

template <class T>
T __ldg(const T* from) {
  if (reinterpret_cast<uintptr_t>(from) % alignof(T)) std::abort();  // a GPU faults too
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = low | uint64_t(high) << 32;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i)
    result |= uint32_t(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return result;
}

namespace dk {

inline float float_of_bits(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline float widen_f16(uint16_t bits) {
  _Float16 half;
  std::memcpy(&half, &bits, 2);
  return float(half);
}
inline uint16_t narrow_f16(float f) {
  const _Float16 half = _Float16(f);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
inline uint16_t narrow_bf16(float f) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16 | 0x40u);
  return uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

}  // namespace dk
