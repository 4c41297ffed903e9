// The activation, and how threads divide the outputs: shared by the algorithms for one sample and
// for many.
#pragma once

#include "tile.h"

namespace {

template <class T>
DK_INLINE vec<T> leaky_relu(vec<T> u, vec<T> slope) {
  return u > vec<T>{} ? u : u * slope;
}

// The first soma (or row) that is a multiple of `whole` and whose work starts at or after `target`.
// The work of a dendrite is its number of synapses plus 4.
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

// The work of all dendrites.
DK_INLINE int64_t work_of(const dk::Topology& net) { return net.nnz + 4 * net.rows; }

// Somas (or rows) [first, last): part i of the work, divided into `parts` of equal size.
struct Share {
  int64_t first, last;
};
DK_INLINE Share share_of(const dk::Topology& net, bool somas, int64_t i, int64_t parts) {
  const int64_t work = work_of(net), outputs = somas ? net.somas : net.rows;
  const auto start = [&](int64_t part) {  // the last share includes somas without dendrites
    return part == parts ? outputs : find_output(net, somas, outputs, 1, work * part / parts);
  };
  return {start(i), start(i + 1)};
}

}  // namespace
