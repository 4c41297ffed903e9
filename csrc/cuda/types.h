// Types that are stored on the device, and the types in which their sums run.
#pragma once

#include <stdint.h>

namespace dk {

// Two-byte storage types, kept as bits: arithmetic is always in the accumulator's type.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

}  // namespace dk
