// Fused backward: what its algorithms share. With
//   q[b, r] = (gradient at the soma) * (derivative of the dendrite, from its sign bit),
//   G[r, k] = sum_b q * x,   G0[r] = sum_b q
// the gradients are
//   dw = c G,   dbd = c G0,   dc = <w_r, G_r> + bd G0,   dx = sum w c q.
// A sparse linear layer is the same with q = incoming gradient and c = 1. u and a are not needed.
//
// Threads own dendrites or tiles of the batch, and partial sums are added up in a fixed order,
// without atomics: results are the same in every run with the same number of threads.
#pragma once

#include "tile.h"

namespace {

template <class T>
DK_INLINE T cable_weight(const dk::BackwardCall<T>& call, int64_t r) {
  return call.cable ? call.cable[r] : T(1);
}

DK_INLINE int64_t dendrite_at(const dk::Topology& net, int64_t position) {
  return net.order ? net.order[position] : position;
}

DK_INLINE int64_t soma_of(const dk::Topology& net, int64_t r) {
  int64_t lo = 0, hi = net.somas;  // the last soma that starts at or before r and is not empty
  while (hi - lo > 1) {
    const int64_t mid = (lo + hi) / 2;
    (net.soma_ptr[mid] <= r ? lo : hi) = mid;
  }
  return lo;
}

// Takes vectors one by one and adds the lane sum of each to the next element of `out`; with `first`
// it writes instead of adding.
template <class T>
class SumStream {
 public:
  DK_INLINE SumStream(T* out, bool first) : out_(out), first_(first) {}
  DK_INLINE void push(vec<T> v) {
    buffer_[count_] = v;
    if (++count_ == kLanes<T>) {
      const vec<T> sums = lane_sums<T>(buffer_);
      store(out_, first_ ? sums : sums + load(out_));
      out_ += kLanes<T>;
      count_ = 0;
    }
  }
  DK_INLINE void finish() {
    for (int i = 0; i < count_; ++i) {
      const T sum = lane_sum<T>(buffer_[i]);
      out_[i] = first_ ? sum : out_[i] + sum;
    }
    count_ = 0;
  }

 private:
  vec<T> buffer_[kLanes<T>];
  T* out_;
  bool first_;
  int count_ = 0;
};

// visit(position, q) for positions p0..p1-1 on one tile, where q is V vectors. Also
// G0[position] += sum_b q. soma_grad[soma][tile] is the gradient at the somas. If it is null, q is
// the incoming gradient, which is transposed into `buffer` first.
template <class T, int V, class Visit>
DK_INLINE void for_each_q(const dk::Topology& net, const dk::BackwardCall<T>& call, int64_t p0,
                          int64_t p1, int64_t tile, const T* soma_grad, bool first, T* buffer,
                          T* G0, const Visit& visit) {
  constexpr int L = kLanes<T>, kTile = V * L;
  SumStream<T> sums(G0 + p0, first);
  const int64_t sample = tile * kTile, last_word = (call.batch - 1) / 32;
  if (!soma_grad)
    tile_in<T, V>(call.storage, call.grad, sample, min64(kTile, call.batch - sample), net.rows, p0,
                  p1, buffer);
  const vec<T> slope = splat(call.slope);
  int64_t s = soma_grad && !net.order ? soma_of(net, p0) : 0;
  vec<T> active[V], inactive[V];
  unroll<V>([&](auto t) DK_LAMBDA { active[t] = inactive[t] = vec<T>{}; });
  const T* previous = nullptr;
  for (int64_t p = p0; p < p1; ++p) {
    // Branches here, not one loop per kind of call: each loop would contain a copy of `visit`,
    // which is long.
    const int64_t r = dendrite_at(net, p);
    if (soma_grad) {
      if (net.order)
        s = net.soma[p];
      else
        while (net.soma_ptr[s + 1] <= r) ++s;
    }
    const T* grad = soma_grad ? soma_grad + s * kTile : buffer + (p - p0) * kTile;
    if (grad != previous) {
      unroll<V>([&](auto t) DK_LAMBDA {
        active[t] = load(grad + t * L);
        inactive[t] = slope * active[t];
      });
      previous = grad;
    }
    vec<T> q[V];
    const auto signs =
        [&](int64_t b) DK_LAMBDA {  // of samples b..b+31; all ones without a soma stage
          const int64_t word = min64(b / 32, last_word);  // a tile may end past the last word
          return soma_grad ? call.signs[word * net.rows + r] >> (b % 32) : ~uint32_t(0);
        };
    if constexpr (V >= 4 && kTile <= 32)  // one word holds the bits of the whole tile
      select_bits<T, V>(signs(sample), active, inactive, q);
    else
      unroll<V>([&](auto t) DK_LAMBDA {
        q[t] = select_bits<T>(signs(sample + t * L), active[t], inactive[t]);
      });
    vec<T> sum = q[0];
    unroll<V - 1>([&](auto t) DK_LAMBDA { sum += q[t + 1]; });
    sums.push(sum);
    visit(p, q);
  }
  sums.finish();
}

// Writes the gradients of the weights of dendrite r; the lanes of the result add up to <w_r, G_r>.
// G(k, n) returns n elements of G (at most one vector), from the k-th synapse of the dendrite on.
template <class T, class Source>
DK_INLINE vec<T> weight_gradient(const dk::Topology& net, const dk::BackwardCall<T>& call,
                                 int64_t r, const Source& G) {
  constexpr int L = kLanes<T>;
  const int64_t begin = net.crow[r], synapses = net.crow[r + 1] - begin;
  const T* weight = call.weight + begin;
  T* dweight = call.dweight + begin;
  const vec<T> c = splat(cable_weight(call, r));
  Chains<T> dots;
  int64_t k = 0;
  for (; k + L <= synapses; k += L) {
    const vec<T> g = G(k, L);
    dots.add(k, load(weight + k) * g);
    store(dweight + k, g * c);
  }
  if (const int rest = int(synapses - k)) {
    const vec<T> g = G(k, rest);
    dots.add(k, load_part(weight + k, rest) * g);
    store_part(dweight + k, g * c, rest);
  }
  return dots.sum();
}

// The other gradients of the dendrites at positions p..p+count-1 (at most one vector), from `dots`,
// which weight_gradient returned, and G0.
template <class T>
DK_INLINE void finish_dendrites(const dk::Topology& net, const dk::BackwardCall<T>& call, int64_t p,
                                int count, const vec<T>* dots, vec<T> G0) {
  const vec<T> dot = lane_sums<T>(dots);
  if (net.order) {
    for (int i = 0; i < count; ++i) {
      const int64_t r = net.order[p + i];
      call.ddendrite_bias[r] = cable_weight(call, r) * G0[i];
      if (call.dcable)
        call.dcable[r] = dot[i] + (call.dendrite_bias ? call.dendrite_bias[r] * G0[i] : T(0));
    }
    return;
  }
  const auto own = [&](const T* numbers, T otherwise) DK_LAMBDA {
    return numbers ? load_part(numbers + p, count) : splat(otherwise);
  };
  store_part(call.ddendrite_bias + p, own(call.cable, 1) * G0, count);
  if (call.dcable) store_part(call.dcable + p, dot + own(call.dendrite_bias, 0) * G0, count);
}

// Gradient at the somas [s0, s1) of one tile -> out[soma - s0][tile]. Also adds its sums over the
// samples to dsoma_bias[soma - s0].
template <class T, int V>
void soma_gradient(const dk::Topology& net, const dk::BackwardCall<T>& call, int64_t tile,
                   int64_t s0, int64_t s1, bool first, T* out, T* dsoma_bias) {
  constexpr int L = kLanes<T>, kTile = V * L;
  const int64_t sample = tile * kTile, S = net.somas;
  with_storage<T>(call.storage, [&](auto* type) DK_LAMBDA {
    using Stored = std::remove_pointer_t<decltype(type)>;
    const auto rows = [&](const void* data) DK_LAMBDA {
      return Rows<T, Stored>{static_cast<const Stored*>(data) + sample * S, S};
    };
    const SomaGradient<T, Stored> source{rows(call.grad), rows(call.y), call.soma_slope};
    constexpr bool kPlain = std::is_same_v<Stored, T>;
    transpose_in<T>(source, min64(kTile, call.batch - sample), s0, s1, width<V, kPlain>(), out);
  });
  SumStream<T> sums(dsoma_bias, first);
  for (int64_t s = s0; s < s1; ++s) {
    vec<T> sum{};
    unroll<V>([&](auto t) DK_LAMBDA { sum += load(out + (s - s0) * kTile + t * L); });
    sums.push(sum);
  }
  sums.finish();
}

// If all of x is at most this large, it stays in the cache, and the outer loop is over blocks of
// dendrites. Larger x: the outer loop is over tiles. The limit was found by measuring.
constexpr int64_t kHotBytes = 3 << 19;

// Start of part `i` when [0, n) is divided into `parts` of whole vectors.
template <class T>
DK_INLINE int64_t split(int64_t n, int64_t i, int64_t parts) {
  const int64_t L = kLanes<T>;
  return min64(n, ceil_div(n, L) * i / parts * L);
}

// sum += part; n is a multiple of the lanes.
template <class T>
DK_INLINE void add_to(int64_t n, const T* part, T* sum) {
  for (int64_t e = 0; e < n; e += kLanes<T>) store(sum + e, load(sum + e) + load(part + e));
}

// Adds up the copies of dx, [threads][tiles][N][tile], and transposes the sum into the rows of dx.
// Every thread sums some of the columns into its own copy, which is still in its cache.
template <class T, int V>
void finish_dx(const dk::Topology& net, const dk::BackwardCall<T>& call, const dk::Runtime& runtime,
               int64_t threads, T* dx) {
  constexpr int kTile = V * kLanes<T>;
  const int64_t N = net.in_features, tiles = ceil_div(call.batch, kTile);
  parallel(runtime, runtime.threads, [&](int64_t i) {
    const int64_t n0 = split<T>(N, i, runtime.threads), n1 = split<T>(N, i + 1, runtime.threads);
    if (n0 >= n1) return;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const T* first = dx + (tile * N + n0) * kTile;
      T* sum = dx + (min64(i, threads - 1) * tiles * N + tile * N + n0) * kTile;
      for (int64_t e = 0; threads > 1 && e < (n1 - n0) * kTile; e += kLanes<T>) {
        vec<T> total = load(first + e);
        for (int64_t other = 1; other < threads; ++other)
          total += load(first + other * tiles * N * kTile + e);
        store(sum + e, total);
      }
      const int64_t samples = min64(kTile, call.batch - tile * kTile);
      tile_out<T, V>(call.storage, sum, n1 - n0, samples, call.dx, tile * kTile, N, n0);
    }
  });
}

}  // namespace
