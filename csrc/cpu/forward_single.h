// Forward of one sample: the lanes of a vector are synapses, whose inputs are gathered. A tile of
// samples would be nearly all padding. Visiting dendrites in another order gains nothing.
#pragma once

#include "outputs.h"

namespace {

// For fewer synapses than a vector has lanes: the lanes of the result add up to <w, x>.
template <class T, class Column>
DK_INLINE vec<T> products_part(const T* weight, const T* x, const Column* column, int count) {
#if defined(__AVX512F__)
  return load_part(weight, count) * gather_part(x, column, count);
#else  // without masked loads it is faster to add scalars than to insert them into lanes
  vec<T> sum{};
  for (int i = 0; i < count; ++i) sum[0] += weight[i] * x[column[i]];
  return sum;
#endif
}

// The lanes of the result add up to <w, x> of dendrite r. FanIn: 0, or the synapses of every
// dendrite, a multiple of the lanes.
template <class T, int FanIn, class Column>
DK_INLINE vec<T> gathered_products(const dk::Topology& net, const T* weight, const T* x,
                                   int64_t r) {
  constexpr int L = kLanes<T>;
  const int64_t begin = FanIn ? r * FanIn : int64_t(net.crow[r]);
  const Column* column = static_cast<const Column*>(net.columns) + begin;
  weight += begin;
  if constexpr (FanIn > 0) {
    vec<T> sum{};
    unroll<FanIn / L>([&](auto i)
                          DK_LAMBDA { sum += load(weight + i * L) * gather(x, column + i * L); });
    return sum;
  } else {
    Chains<T> sum;
    const int64_t synapses = net.crow[r + 1] - begin;
    int64_t k = 0;
    for (; k + L <= synapses; k += L) sum.add(k, load(weight + k) * gather(x, column + k));
    if (k < synapses) sum.add(k, products_part(weight + k, x, column + k, int(synapses - k)));
    return sum.sum();
  }
}

// u of dendrites r..r+count-1 in the first lanes.
template <class T, int FanIn, class Column>
DK_INLINE vec<T> gathered_dendrites(const dk::Topology& net, const dk::ForwardCall<T>& call,
                                    const T* x, int64_t r, int count) {
  constexpr int L = kLanes<T>;
  const auto row = [&](int d) DK_LAMBDA {
    return gathered_products<T, FanIn, Column>(net, call.weight, x, r + d);
  };
  vec<T> products[L];
  if (FanIn && count == L) {
    unroll<L>([&](auto d) DK_LAMBDA { products[d] = row(d); });
  } else {
    for (int d = 0; d < L; ++d) products[d] = d < count ? row(d) : vec<T>{};
  }
  const vec<T> u = lane_sums<T>(products);
  return call.dendrite_bias ? u + load_part(call.dendrite_bias + r, count) : u;
}

// The sign bits of the only sample, one word per dendrite.
template <class T>
DK_INLINE void store_sign_words(uint32_t* words, vec<T> u, int count) {
  if (sizeof(T) == sizeof(*words) && count == kLanes<T>) {
    const typename Simd<T>::mask bits = (u > vec<T>{}) & 1;
    memcpy(words, &bits, sizeof bits);
  } else {
    const uint32_t bits = positive_bits<T>(u);
    for (int d = 0; d < count; ++d) words[d] = bits >> d & 1;
  }
}

// Somas s0..s1-1. A vector of dendrites may span several somas: their lanes are added one by one.
template <class T, int FanIn, class Column>
__attribute__((noinline)) void single_somas(const dk::Topology& net, const dk::ForwardCall<T>& call,
                                            const T* x, int64_t s0, int64_t s1, T* y) {
  constexpr int L = kLanes<T>;
  const vec<T> slope = splat(call.slope);
  const int64_t end = net.soma_ptr[s1];
  int64_t s = s0;
  T v = 0;
  const auto leave_soma = [&] {
    v += call.soma_bias ? call.soma_bias[s] : T(0);
    y[s++] = v > 0 ? v : v * call.soma_slope;
    v = 0;
  };
  for (int64_t r = net.soma_ptr[s0]; r < end; r += L) {
    const int count = int(min64(L, end - r));
    const vec<T> u = gathered_dendrites<T, FanIn, Column>(net, call, x, r, count);
    if (call.signs) store_sign_words<T>(call.signs + r, u, count);
    const vec<T> a = load_part(call.cable + r, count) * leaky_relu<T>(u, slope);
    for (int64_t d = 0; d < count;) {
      const int64_t last = min64(count, net.soma_ptr[s + 1] - r);  // of this soma
      if (last - d == L)
        v += lane_sum<T>(a), d = L;
      else
        for (; d < last; ++d) v += a[d];
      if (r + d == net.soma_ptr[s + 1]) leave_soma();
    }
  }
  while (s < s1) leave_soma();  // somas without dendrites
}

// Rows r0..r1-1, no soma stage.
template <class T, int FanIn, class Column>
__attribute__((noinline)) void single_rows(const dk::Topology& net, const dk::ForwardCall<T>& call,
                                           const T* x, int64_t r0, int64_t r1, T* y) {
  for (int64_t r = r0; r < r1; r += kLanes<T>) {
    const int count = int(min64(kLanes<T>, r1 - r));
    store_part(y + r, gathered_dendrites<T, FanIn, Column>(net, call, x, r, count), count);
  }
}

template <class T, int FanIn, class Column>
auto pick_single_stage(bool somas) {
  return somas ? single_somas<T, FanIn, Column> : single_rows<T, FanIn, Column>;
}

template <class T, class Column>
auto pick_single(const dk::Topology& net, bool somas) {
  if constexpr (sizeof(Column) == 2) {
    if (net.fan_in == 16) return pick_single_stage<T, 16, Column>(somas);
    if (net.fan_in == 32) return pick_single_stage<T, 32, Column>(somas);
    if (net.fan_in == 48) return pick_single_stage<T, 48, Column>(somas);
  }
  return pick_single_stage<T, 0, Column>(somas);
}

template <class T>
void forward_single(const dk::Topology& net, const dk::ForwardCall<T>& call,
                    const dk::Runtime& runtime) {
  const bool somas = call.cable != nullptr;
  const auto kernel =
      net.narrow ? pick_single<T, uint16_t>(net, somas) : pick_single<T, int32_t>(net, somas);
  const int64_t outputs = somas ? net.somas : net.rows, N = net.in_features;
  Carver carver;
  const int64_t x_at = carver.reserve<T>(N), y_at = carver.reserve<T>(outputs);
  carver.allocate(runtime);
  const T* x = row_in(call.storage, call.x, N, carver.at<T>(x_at), call.round_x);
  T* y = row_out_at(call.storage, call.y, carver.at<T>(y_at));
  constexpr int64_t kPerNanosecond = 4;  // gathered inputs
  const int64_t threads = useful_threads(runtime, work_of(net) / kPerNanosecond);
  parallel(runtime, threads, [&](int64_t i) {
    const Share share = share_of(net, somas, i, threads);
    if (share.first < share.last) kernel(net, call, x, share.first, share.last, y);
  });
  row_out(call.storage, y, outputs, call.y);
}

}  // namespace
