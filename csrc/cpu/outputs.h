// What every way of computing forward does to its outputs, and how threads divide them.
#pragma once

#include "tile.h"

namespace {

template <class T>
DK_INLINE vec<T> leaky_relu(vec<T> u, vec<T> slope) {
  return u > vec<T>{} ? u : u * slope;
}

// First soma (or row), of those that are multiples of `whole`, whose share of the work starts at or
// after `target`; a dendrite costs its synapses and 4 more.
DK_INLINE int64_t find_output(const dk::Topology& net, bool somas, int64_t outputs, int64_t whole,
                              int64_t target) {
  int64_t lo = 0, hi = ceil_div(outputs, whole);
  while (lo < hi) {
    const int64_t mid = (lo + hi) / 2, r = somas ? net.soma_ptr[mid * whole] : mid * whole;
    if (net.crow[r] + 4 * r < target)
      lo = mid + 1;
    else
      hi = mid;
  }
  return min64(lo * whole, outputs);
}

}  // namespace
