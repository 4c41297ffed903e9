// Gradients of the parameters. With q[b, r] = gv[b, s] * (bit ? 1 : slope), G[r, k] = sum_b q x and
// G0[r] = sum_b q:  dw = c G,  dbd = c G0,  dc = <w_r, G_r> + bd G0,  dbs = sum_b gv.
#pragma once

#include "tile.h"

namespace dk {

// COUNT values in each of LANES lanes -> in value[0] of lane p the sum over the lanes of value
// p / (LANES / COUNT). Lanes swap halves of what they hold, so that 8 sums over 32 lanes take 9
// shuffles instead of 40.
template <int COUNT, int LANES, class A>
DK_DEVICE void transpose_sum(A (&value)[COUNT], int lane) {
  int held = COUNT;
#pragma unroll
  for (int bit = LANES / 2; bit >= 1; bit >>= 1) {
    if (held > 1) {
      held /= 2;
      const bool upper = lane & bit;
#pragma unroll
      for (int j = 0; j < COUNT / 2; ++j) {
        if (j < held) {
          const A send = upper ? value[j] : value[j + held];
          const A keep = upper ? value[j + held] : value[j];
          value[j] = keep + __shfl_xor_sync(kAllLanes, send, bit);
        }
      }
    } else {
      value[0] += __shfl_xor_sync(kAllLanes, value[0], bit);
    }
  }
}

template <int LANES, class A>
DK_DEVICE A sum_lanes(A value) {
#pragma unroll
  for (int bit = LANES / 2; bit; bit >>= 1) value += __shfl_xor_sync(kAllLanes, value, bit);
  return value;
}

// The first tile of a group writes a partial sum, later ones add: always the same thread, in the
// order of the tiles.
template <class A>
DK_DEVICE void accumulate(A* at, A value, bool is_first) {
  *at = is_first ? value : *at + value;
}

// A warp sums over the samples of a tile for the somas of one item.
template <class K>
__global__ void __launch_bounds__(K::kMaxThreads, 1)
    backward_weight(const WeightArgs<typename K::T> args) {
  using A = typename K::A;
  DK_SHARED_MEMORY(typename K::V, shared);
  const Thread<K> me;
  const Synapses& synapses = args.synapses;
  const int32_t group = blockIdx.x / args.parts, part = blockIdx.x % args.parts;
  constexpr int kHolders = K::kLanes / K::kChunk;  // lanes that end up with the same sum
  const bool holds = me.place % kHolders == 0;
  A* const partial = args.partial + group * synapses.slots;
  A* const partial_row = args.partial_row + int64_t(group) * args.rows;
  A* const partial_soma =
      args.partial_soma ? args.partial_soma + int64_t(group) * args.outputs : nullptr;
  for (int32_t tile = group; tile < args.tile_count; tile += args.groups) {
    const bool is_first_tile = tile == group;
    const int64_t b0 = int64_t(tile) * K::kSamples;
    const unsigned char* samples;
    if constexpr (K::kShared) {
      if (!is_first_tile) __syncthreads();  // all have read the tile before
      stage<K>(shared, args.x, b0, args.batch, args.inputs, args.tile_rows, me);
      __syncthreads();
      samples = reinterpret_cast<const unsigned char*>(shared);
    } else {
      samples = reinterpret_cast<const unsigned char*>(args.tiles + b0 * args.tile_rows);
    }
    const int32_t* const rows = synapses.rows + me.group;
    for (uint32_t item = me.warp * args.parts + part; item < uint32_t(synapses.items);
         item += args.parts * me.warps) {
      const int32_t s = output_of<K>(synapses, item, me);
      Vector<A, K::kVec> grad{};
      if (s >= 0)
        grad = load_readonly<Vector<A, K::kVec>>(
            args.grad_v + (int64_t(tile) * args.outputs + s) * K::kSamples + me.place * K::kVec);
      if (partial_soma) {
        A sum = 0;
#pragma unroll
        for (int i = 0; i < K::kVec; ++i) sum += grad.value[i];
        sum = sum_lanes<K::kLanes>(sum);
        if (me.place == 0 && s >= 0 && leads_team<K>(synapses, me))
          accumulate(partial_soma + s, sum, is_first_tile);
      }
      int32_t bundle = __ldg(synapses.bundles + item);
      const int32_t last = __ldg(synapses.bundles + item + 1);
      int32_t step = __ldg(synapses.steps + bundle);
      const auto* index =
          static_cast<const typename K::Index*>(synapses.index) + first_slot<K>(step, me);
      A* to = partial + first_slot<K>(step, me) + me.place / kHolders;
      for (; bundle < last; ++bundle) {
        const int32_t r = __ldg(rows + int64_t(bundle) * K::kGroups);
        const int32_t next = __ldg(synapses.steps + bundle + 1);
        A q[K::kVec], sum = 0;
        if (args.signs) {
          const SignBits<K> bits = load_signs<K>(args.signs, args.rows, r, b0, args.batch);
#pragma unroll
          for (int i = 0; i < K::kVec; ++i)
            q[i] = bits.positive(i, me.place) ? grad.value[i] : args.slope * grad.value[i];
        } else {
#pragma unroll
          for (int i = 0; i < K::kVec; ++i) q[i] = grad.value[i];
        }
#pragma unroll
        for (int i = 0; i < K::kVec; ++i) sum += q[i];
        sum = sum_lanes<K::kLanes>(sum);
        if (me.place == 0 && r >= 0) accumulate(partial_row + r, sum, is_first_tile);
        for_steps<K>(
            next - step,
            [&](int ahead) {
              Indices<K> columns;
              columns.load(index + ahead);
              const A before = holds && !is_first_tile ? to[ahead] : A(0);  // early: it is far away
              typename K::V x[K::kChunk];
              gather_all<K>(samples, columns, me.offset, x);
              A value[K::kChunk];
#pragma unroll
              for (int j = 0; j < K::kChunk; ++j) {
                value[j] = q[0] * widen(x[j].value[0]);
#pragma unroll
                for (int i = 1; i < K::kVec; ++i) value[j] += q[i] * widen(x[j].value[i]);
              }
              transpose_sum<K::kChunk, K::kLanes>(value, me.place);
              if (holds) to[ahead] = before + value[0];
            },
            [&](int slots) {
              index += slots;
              to += slots;
            });
        step = next;
      }
    }
  }
}

// Corrects the averages of Adam for their start at 0: 1 - beta**steps, without cancellation.
template <class A>
DK_DEVICE A correction(A log_beta, A steps) {
  return -expm1(log_beta * steps);
}

// Steps the weight at `to`, which is `weight` now, with this gradient.
template <class A>
DK_DEVICE void step_adam(const AdamArgs<A>& adam, int64_t to, A weight, A grad, A correction1,
                         A correction2) {
  grad += adam.l2 * weight;
  const A m = adam.exp_avg[to], v = adam.exp_avg_sq[to];
  const A exp_avg = m + adam.rest1 * (grad - m);
  const A exp_avg_sq = adam.beta2 * v + adam.rest2 * grad * grad;
  adam.exp_avg[to] = exp_avg;
  adam.exp_avg_sq[to] = exp_avg_sq;
  const A scale = sqrt(exp_avg_sq / correction2) + adam.eps;
  adam.weight[to] = adam.decay * weight - adam.lr * (exp_avg / correction1) / scale;
}

// Sums the partial sums in their order and scales. A warp takes one bundle, always the same lanes a
// row of it. `dweight` may be `partial` itself: every element is read and then written by one
// thread, as are those of the weight that Adam steps.
template <class A, bool ADAM>
__global__ void __launch_bounds__(256, 1) finish_weight(const FinishArgs<A> args) {
  const Synapses& synapses = args.synapses;
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t bundle = thread / 32;
  const int lane = int(thread % 32);
  if (args.dsoma_bias && thread < args.somas) {
    A sum = args.partial_soma[thread];
    for (int g = 1; g < args.groups; ++g)
      sum += args.partial_soma[int64_t(g) * args.somas + thread];
    args.dsoma_bias[thread] = sum;
  }
  if (bundle >= synapses.bundle_count) return;  // the whole warp
  const int group = lane / args.chunk % args.row_groups;
  const int32_t r = __ldg(synapses.rows + bundle * args.row_groups + group);
  const A cable = args.cable && r >= 0 ? args.cable[r] : A(1);
  A dot = 0;
  const int64_t step = int64_t(args.chunk) * args.row_groups;
  const int64_t end = __ldg(synapses.steps + bundle + 1) * step;
  A correction1 = 1, correction2 = 1;
  if constexpr (ADAM) {
    const A steps = A(*args.adam.steps) + 1;
    correction1 = correction(args.adam.log_beta1, steps);
    correction2 = correction(args.adam.log_beta2, steps);
  }
  for (int64_t slot = __ldg(synapses.steps + bundle) * step + lane; slot < end; slot += 32) {
    const int64_t to = args.source ? args.source[slot] : slot;
    if (to < 0) continue;
    A sum = args.partial[slot];
    for (int g = 1; g < args.groups; ++g) sum += args.partial[g * synapses.slots + slot];
    const A weight = args.weight[to];
    dot += weight * sum;
    if constexpr (ADAM)
      step_adam(args.adam, to, weight, cable * sum, correction1, correction2);
    else
      args.dweight[to] = cable * sum;
  }
  for (int bit = 1; bit < 32; bit *= 2) {
    const A other = __shfl_xor_sync(kAllLanes, dot, bit);
    if (bit < args.chunk || bit >= args.chunk * args.row_groups) dot += other;
  }
  if (r < 0 || lane != group * args.chunk) return;
  A sum = args.partial_row[r];
  for (int g = 1; g < args.groups; ++g) sum += args.partial_row[int64_t(g) * args.rows + r];
  args.ddendrite_bias[r] = cable * sum;
  if (args.dcable) args.dcable[r] = dot + (args.dendrite_bias ? args.dendrite_bias[r] * sum : A(0));
}

}  // namespace dk
