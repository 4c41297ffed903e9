// What translated kernels call: memory and lanes, with checks of each access. See runtime.cpp for
// what is checked and how.
#pragma once

#include <cstddef>
#include <cstdint>

#include "emulator.h"
#include "operations.h"

namespace ptx {

// An entry point; all of them register themselves.
struct Kernel {
  Kernel(const char* name, void (*run)(const void*));
  const char* name;
  void (*run)(const void*);
  long launches = 0;
};

// The one parameter of a kernel, as it is passed on the stack.
template <size_t BYTES>
struct Parameter {
  static_assert(BYTES > 16, "smaller ones are passed in registers that depend on their members");
  alignas(8) unsigned char bytes[BYTES];
};

// One emulated thread of the running block.
struct Thread {
  uint32_t block, index, lane, warp;
  uint32_t clock[32];  // see runtime.cpp
};

enum Space { global, shared, generic };
// Generic addresses from here on are shared memory; tensors lie elsewhere.
constexpr uint64_t kSharedWindow = uint64_t(1) << 32;

// Every thread starts with it.
Thread& enter(Kernel& kernel);

// Where to read or write `bytes` bytes, after all checks. `line` is that of the PTX.
const void* read(Thread& me, int line, Space space, uint64_t address, size_t bytes);
void* write(Thread& me, int line, Space space, uint64_t address, size_t bytes);

// A parameter that is the address of a tensor -> its address in the checked memory.
uint64_t checked_pointer(uint64_t value);

void block_barrier(Thread& me, int line);
void warp_barrier(Thread& me, int line, uint32_t members);

// Another lane's value; mode b, i, u, d: lane ^ at, at, lane - at, lane + at within the segment
// that `limits` describes. `inside` says whether that lane is in the segment: else it is the own.
uint32_t shuffle(Thread& me, int line, char mode, bool& inside, uint32_t value, uint32_t at,
                 uint32_t limits, uint32_t members);

uint32_t vote_ballot(Thread& me, int line, bool vote, uint32_t members);
bool vote_any(Thread& me, int line, bool vote, uint32_t members);
bool vote_all(Thread& me, int line, bool vote, uint32_t members);
bool vote_uni(Thread& me, int line, bool vote, uint32_t members);

// Values of all members, as bits, in the order of lanes; returns how many there are.
int gather(Thread& me, int line, uint32_t value, uint32_t members, uint32_t (&values)[32]);

template <class T, class F>
T reduce(Thread& me, int line, T value, uint32_t members, const F& combine) {
  uint32_t values[32];
  const int count = gather(me, line, uint32_t(value), members, values);
  T result = T(values[0]);
  for (int i = 1; i < count; ++i) result = T(combine(result, T(values[i])));
  return result;
}
#define PTX_REDUCE(NAME, EXPRESSION)                                              \
  template <class T>                                                              \
  T reduce_##NAME(Thread& me, int line, T value, uint32_t members) {              \
    return reduce(me, line, value, members, [](T a, T b) { return EXPRESSION; }); \
  }
PTX_REDUCE(add, a + b)
PTX_REDUCE(min, a < b ? a : b)
PTX_REDUCE(max, a < b ? b : a)
PTX_REDUCE(and, a& b)
PTX_REDUCE(or, a | b)
PTX_REDUCE(xor, a ^ b)
#undef PTX_REDUCE

}  // namespace ptx
