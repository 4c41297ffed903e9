// Backward of one sample, whose gradients need no sum over samples: dw = c q x, gathered synapse by
// synapse, and dx = sum w c q, scattered. Dendrites are visited by number: another order gains
// nothing for one sample.
#pragma once

#include "outputs.h"

namespace {

// dw of one dendrite; the lanes of the result add up to <w, x>. WithInput: also dx += w c q.
template <class T, class Column, bool WithInput>
DK_INLINE vec<T> single_dendrite(const dk::Topology& net, const dk::BackwardCall<T>& call,
                                 const T* x, int64_t r, T cable_q, T* dx) {
  constexpr int L = kLanes<T>;
  const int64_t begin = net.crow[r], synapses = net.crow[r + 1] - begin;
  const Column* column = static_cast<const Column*>(net.columns) + begin;
  const T* weight = call.weight + begin;
  T* dweight = call.dweight + begin;
  Chains<T> sum;
  for (int64_t k = 0; k < synapses; k += L) {
    const int count = int(min64(L, synapses - k));
    const vec<T> inputs = count == L ? gather(x, column + k) : gather_part(x, column + k, count);
    store_part(dweight + k, inputs * splat(cable_q), count);
    sum.add(k, load_part(weight + k, count) * inputs);
  }
  if constexpr (WithInput)
    for (int64_t k = 0; k < synapses; ++k) dx[column[k]] += weight[k] * cable_q;
  return sum.sum();
}

// Gradients of dendrites r..r+count-1; their q are in the first lanes.
template <class T, class Column, bool WithInput>
DK_INLINE void single_dendrites(const dk::Topology& net, const dk::BackwardCall<T>& call,
                                const T* x, int64_t r, int count, vec<T> q, T* dx) {
  constexpr int L = kLanes<T>;
  const vec<T> cable_q = call.cable ? load_part(call.cable + r, count) * q : q;
  store_part(call.ddendrite_bias + r, cable_q, count);
  vec<T> products[L];
  for (int d = 0; d < L; ++d)
    products[d] = d < count
                      ? single_dendrite<T, Column, WithInput>(net, call, x, r + d, cable_q[d], dx)
                      : vec<T>{};
  if (!call.dcable) return;
  vec<T> u = lane_sums<T>(products);
  if (call.dendrite_bias) u += load_part(call.dendrite_bias + r, count);
  store_part(call.dcable + r, u * q, count);
}

// The sample, its gradient and its output, widened to T. y is null for a sparse linear layer.
template <class T>
struct SingleSample {
  const T *x, *grad, *y;
};

// Gradients of somas (or, without cable, rows) o0..o1-1.
template <class T, class Column, bool WithInput>
__attribute__((noinline)) void single_outputs(const dk::Topology& net,
                                              const dk::BackwardCall<T>& call,
                                              const SingleSample<T>& in, int64_t o0, int64_t o1,
                                              T* dx) {
  constexpr int L = kLanes<T>;
  const auto in_chunks = [&](int64_t r0, int64_t r1, auto q_of) {
    for (int64_t r = r0; r < r1; r += L) {
      const int count = int(min64(L, r1 - r));
      single_dendrites<T, Column, WithInput>(net, call, in.x, r, count, q_of(r, count), dx);
    }
  };
  if (!call.cable)
    return in_chunks(o0, o1, [&](int64_t r, int count) { return load_part(in.grad + r, count); });
  for (int64_t s = o0; s < o1; ++s) {
    const T active = in.y[s] > 0 ? in.grad[s] : call.soma_slope * in.grad[s];
    const T inactive = call.slope * active;
    call.dsoma_bias[s] = active;
    in_chunks(net.soma_ptr[s], net.soma_ptr[s + 1], [&](int64_t r, int count) {
      vec<T> q{};
      for (int d = 0; d < count; ++d) q[d] = call.signs[r + d] & 1 ? active : inactive;
      return q;
    });
  }
}

template <class T>
void backward_single(const dk::Topology& net, const dk::BackwardCall<T>& call,
                     const dk::Runtime& runtime) {
  const bool somas = call.cable != nullptr;
  const int64_t outputs = somas ? net.somas : net.rows, N = net.in_features;
  const int64_t threads = useful_threads(runtime, call.dx ? work_of(net) : work_of(net) / 2);
  const int64_t stretches =
      call.dx ? max64(1, ceil_div(work_of(net), kStretch * threads * max64(1, N))) : 1;
  Carver carver;
  const int64_t x_at = carver.reserve<T>(N), grad_at = carver.reserve<T>(outputs),
                y_at = carver.reserve<T>(outputs),
                dx_at = carver.reserve<T>(call.dx ? threads * N : 0),
                stretch_at = carver.reserve<T>(stretches > 1 ? threads * N : 0);
  carver.allocate(runtime);
  const SingleSample<T> in{
      row_in(call.storage, call.x, N, carver.at<T>(x_at)),
      row_in(call.storage, call.grad, outputs, carver.at<T>(grad_at)),
      somas ? row_in(call.storage, call.y, outputs, carver.at<T>(y_at)) : nullptr};
  T *private_dx = carver.at<T>(dx_at), *dx = row_out_at(call.storage, call.dx, private_dx);
  const auto dx_of = [&](int64_t i) { return i ? private_dx + i * N : dx; };
  const auto add = [&](const T* part, T* sum) {
    for (int64_t n = 0; n < N; ++n) sum[n] += part[n];
  };
  const auto outputs_of = [&](bool with_input) {
    if (with_input)
      return net.narrow ? single_outputs<T, uint16_t, true> : single_outputs<T, int32_t, true>;
    return net.narrow ? single_outputs<T, uint16_t, false> : single_outputs<T, int32_t, false>;
  };
  const auto run = outputs_of(call.dx);
  parallel(runtime, threads, [&](int64_t i) {
    for (int64_t stretch = 0; stretch < stretches; ++stretch) {
      const auto [first, last] = share_of(net, somas, i * stretches + stretch, threads * stretches);
      if (!call.dx) return run(net, call, in, first, last, nullptr);
      T* part = stretch ? carver.at<T>(stretch_at) + i * N : dx_of(i);
      memset(part, 0, size_t(N) * sizeof(T));
      run(net, call, in, first, last, part);
      if (stretch) add(part, dx_of(i));
    }
  });
  if (!call.dx) return;
  for (int64_t i = 1; i < threads; ++i) add(dx_of(i), dx);
  row_out(call.storage, dx, N, call.dx);
}

}  // namespace
