// Fused backward. With q[b, r] = (gradient at the soma) * (derivative of the dendrite, from its
// sign bit) and G[r, k] = sum_b q * x, G0[r] = sum_b q:   dw = c G,   dbd = c G0,   dc = <w_r, G_r>
// + bd G0,   dx = sum w c q. A sparse linear layer is the same with q = incoming gradient and c
// = 1. u and a are never needed.
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

// Adds (or, the first time, writes) the lane sums of a stream of vectors to consecutive numbers.
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

// visit(position, q) for positions p0..p1-1 on one tile, q being V vectors;
// G0[position] += sum_b q. soma_grad[soma][tile] is the gradient at the somas; null: q is the
// incoming gradient itself, transposed into `buffer` first.
template <class T, int V, class Visit>
DK_INLINE void for_each_q(const dk::Topology& net, const dk::BackwardCall<T>& call, int64_t p0,
                          int64_t p1, int64_t tile, const T* soma_grad, bool first, T* buffer,
                          T* G0, const Visit& visit) {
  constexpr int L = kLanes<T>, kTile = V * L;
  SumStream<T> sums(G0 + p0, first);
  const auto emit = [&](int64_t p, const vec<T>* q) DK_LAMBDA {
    vec<T> sum = q[0];
    unroll<V - 1>([&](auto t) DK_LAMBDA { sum += q[t + 1]; });
    sums.push(sum);
    visit(p, q);
  };
  const int64_t sample = tile * kTile;
  if (!soma_grad) {
    tile_in<T, V>(call.storage, call.grad, sample, min64(kTile, call.batch - sample), net.rows, p0,
                  p1, buffer);
    for (int64_t r = p0; r < p1; ++r) {
      vec<T> q[V];
      unroll<V>([&](auto t) DK_LAMBDA { q[t] = load(buffer + (r - p0) * kTile + t * L); });
      emit(r, q);
    }
    sums.finish();
    return;
  }
  const int64_t last_word = (call.batch - 1) / 32;
  const vec<T> slope = splat(call.slope);
  vec<T> active[V], inactive[V];
  const auto enter_soma = [&](int64_t s) DK_LAMBDA {
    unroll<V>([&](auto t) DK_LAMBDA {
      active[t] = load(soma_grad + s * kTile + t * L);
      inactive[t] = slope * active[t];
    });
  };
  const auto dendrite = [&](int64_t p, int64_t r) DK_LAMBDA {
    vec<T> q[V];
    if constexpr (V > 4) {  // short vectors: the whole tile lies in one word
      static_assert(32 % kTile == 0);
      const uint32_t bits = call.signs[sample / 32 * net.rows + r] >> (sample % 32);
      select_bits<T, V>(bits, active, inactive, q);
    } else {
      unroll<V>([&](auto t) DK_LAMBDA {
        const int64_t b = sample + t * L;
        const int64_t word = min64(b / 32, last_word);  // a tile may end past the last word
        const uint32_t bits = call.signs[word * net.rows + r] >> (b % 32);
        q[t] = select_bits<T>(bits, active[t], inactive[t]);
      });
    }
    emit(p, q);
  };
  if (net.order) {
    for (int64_t p = p0; p < p1; ++p) {
      enter_soma(net.soma[p]);
      dendrite(p, net.order[p]);
    }
  } else {
    for (int64_t r = p0, s = soma_of(net, p0); r < p1; ++s) {
      enter_soma(s);
      for (const int64_t end = min64(p1, net.soma_ptr[s + 1]); r < end; ++r) dendrite(r, r);
    }
  }
  sums.finish();
}

// q[row - r0][tile] of rows r0..r1-1.
template <class T, int V>
__attribute__((noinline)) void make_q(const dk::Topology& net, const dk::BackwardCall<T>& call,
                                      int64_t r0, int64_t r1, int64_t tile, const T* soma_grad,
                                      bool first, T* q, T* G0) {
  for_each_q<T, V>(net, call, r0, r1, tile, soma_grad, first, q, G0,
                   [&](int64_t r, const vec<T>* value) DK_LAMBDA {
                     unroll<V>([&](auto t) DK_LAMBDA {
                       store(q + (r - r0) * V * kLanes<T> + t * kLanes<T>, value[t]);
                     });
                   });
}

// ---- with dx: one gather of q over a block of the transposed plan feeds both dx and G ----

// One block of dendrites on one tile. G in slot order. clear_dx: dx holds nothing yet, so rows
// without synapses are zeroed.
template <class T, int V, int Group, class Column>
__attribute__((noinline)) void gather_block(const dk::Topology& net, int64_t block, const T* weight,
                                            const T* q, const T* x, bool clear_dx, bool first,
                                            T* dx, T* G) {
  constexpr int L = kLanes<T>, kTile = V * L, BL = kBlockLanes<T>, kGroups = L / BL, kAhead = 3;
  const int64_t begin = net.plan_column_ptr[block], end = net.plan_column_ptr[block + 1];
  const Column* column = static_cast<const Column*>(net.plan_column);
  const uint16_t* row = net.plan_row + net.plan_slot_ptr[block];
  vec<T> folded[kGroups], single[L];
  int count = 0;
  const auto flush = [&](vec<T> sums) DK_LAMBDA {
    store(G, first ? sums : sums + load(G));
    G += L;
    count = 0;
  };
  int64_t next = 0;  // dx rows before this one are written
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = column[i];
    const int64_t ahead = int64_t(column[min64(i + kAhead, end - 1)]) * kTile;
    unroll<V>([&](auto t) DK_LAMBDA {
      if constexpr (t * kVectorBytes % 64 == 0) {  // where a cache line starts
        __builtin_prefetch(x + ahead + t * L);
        __builtin_prefetch(dx + ahead + t * L, 1);
      }
    });
    if (clear_dx) {
      memset(dx + next * kTile, 0, size_t(n - next) * kTile * sizeof(T));
      next = n + 1;
    }
    vec<T> xv[V], acc[V];
    unroll<V>([&](auto t) DK_LAMBDA { xv[t] = load(x + n * kTile + t * L); });
    unroll<V>([&](auto t) DK_LAMBDA { acc[t] = vec<T>{}; });
    const auto synapse = [&](int slot) DK_LAMBDA {
      const vec<T> w = splat(weight[slot]);
      const T* p = q + int64_t(row[slot]) * kTile;
      vec<T> product;
      unroll<V>([&](auto t) DK_LAMBDA {
        const vec<T> value = in_register(load(p + t * L));
        acc[t] = in_order(w * value + acc[t]);
        product = t == 0 ? value * xv[t] : value * xv[t] + product;
      });
      return product;
    };
    for (int group = net.plan_groups[i]; group > 0; --group) {
      if constexpr (Group == 4) {
        vec<T> products[4];
        unroll<4>([&](auto s) DK_LAMBDA { products[s] = synapse(s); });
        unroll<4 / BL>([&](auto g) DK_LAMBDA {
          folded[count] = fold_group<T>(products + g * BL);
          if (++count == kGroups) flush(fold_groups<T>(folded));
        });
      } else {
        single[count] = synapse(0);
        if (++count == L) flush(lane_sums<T>(single));
      }
      weight += Group;
      row += Group;
    }
    // What other blocks gave comes last: a sum of their sums rounds off less than one long chain.
    if (!clear_dx) unroll<V>([&](auto t) DK_LAMBDA { acc[t] += load(dx + n * kTile + t * L); });
    unroll<V>([&](auto t) DK_LAMBDA { store(dx + n * kTile + t * L, acc[t]); });
  }
  if (clear_dx) memset(dx + next * kTile, 0, size_t(net.in_features - next) * kTile * sizeof(T));
  if (count > 0) {  // a block's slots are padded to whole vectors, so the last store stays inside
    if constexpr (Group == 4) {
      for (int i = count; i < kGroups; ++i) folded[i] = vec<T>{};
      flush(fold_groups<T>(folded));
    } else {
      for (int i = count; i < L; ++i) single[i] = vec<T>{};
      flush(lane_sums<T>(single));
    }
  }
}

// w c of one block in slot order; a pad's is zero. In CSR order first, in `products`: numbers are
// gathered twice as fast as they are scattered.
template <class T, class Index>
__attribute__((noinline)) void fill_weights(const dk::Topology& net,
                                            const dk::BackwardCall<T>& call, int64_t block,
                                            T* products, T* out) {
  constexpr int L = kLanes<T>;
  const int64_t r0 = block * net.block_rows, r1 = min64(net.rows, r0 + net.block_rows),
                begin = net.crow[r0];
  for (int64_t r = r0; r < r1; ++r) {
    const vec<T> c = splat(cable_weight(call, r));
    int64_t j = net.crow[r];
    const int64_t end = net.crow[r + 1];
    for (; j + L <= end; j += L) store(products + (j - begin), load(call.weight + j) * c);
    if (j < end)  // what lies past the end is written over by the next row
      store(products + (j - begin), load_part(call.weight + j, int(end - j)) * c);
  }
  products[net.crow[r1] - begin] = 0;
  const int64_t slots = net.plan_slot_ptr[block + 1] - net.plan_slot_ptr[block];
  const Index* synapse = static_cast<const Index*>(net.plan_synapse) + net.plan_slot_ptr[block];
  for (int64_t i = 0; i < slots; i += L) store(out + i, gather(products, synapse + i));
}

// The gradient of dendrite r's weights; the lanes of the result add up to <w_r, G_r>. G(k, n): the
// n numbers of G from the dendrite's k-th synapse on, n at most one vector.
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

// Parameter gradients of one dendrite from its G and G0.
template <class T, class Source>
DK_INLINE void finish_row(const dk::Topology& net, const dk::BackwardCall<T>& call, int64_t r, T G0,
                          const Source& G) {
  const T dot = lane_sum<T>(weight_gradient<T>(net, call, r, G)),
          bias = call.dendrite_bias ? call.dendrite_bias[r] : T(0);
  call.ddendrite_bias[r] = cable_weight(call, r) * G0;
  if (call.dcable) call.dcable[r] = dot + bias * G0;
}

// The same for a block, whose G is in slot order; with copies > 1, G and G0 are sums of that many
// partial arrays, G's `stride` apart. As many dendrites at a time as a vector has lanes.
template <class T, class Index>
__attribute__((noinline)) void finish_block(const dk::Topology& net,
                                            const dk::BackwardCall<T>& call, int64_t block,
                                            int64_t copies, const T* G, int64_t stride,
                                            const T* G0) {
  constexpr int L = kLanes<T>;
  const int64_t r1 = min64(net.rows, (block + 1) * net.block_rows);
  for (int64_t r = block * net.block_rows; r < r1; r += L) {
    const int count = int(min64(L, r1 - r));
    vec<T> dots[L] = {};
    for (int i = 0; i < count; ++i) {
      const Index* slot = static_cast<const Index*>(net.plan_slot) + net.crow[r + i];
      dots[i] = weight_gradient<T>(net, call, r + i, [&](int64_t k, int n) DK_LAMBDA {
        vec<T> g = gather_part(G, slot + k, n);
        for (int64_t t = 1; t < copies; ++t) g += gather_part(G + t * stride, slot + k, n);
        return g;
      });
    }
    vec<T> sums = load_part(G0 + r, count);
    for (int64_t t = 1; t < copies; ++t) sums += load_part(G0 + t * net.rows + r, count);
    const auto own = [&](const T* numbers, T otherwise) DK_LAMBDA {
      return numbers ? load_part(numbers + r, count) : splat(otherwise);
    };
    store_part(call.ddendrite_bias + r, own(call.cable, 1) * sums, count);
    if (call.dcable)
      store_part(call.dcable + r, lane_sums<T>(dots) + own(call.dendrite_bias, 0) * sums, count);
  }
}

template <class T, int V, class Column>
void gather(const dk::Topology& net, int64_t block, const T* weight, const T* q, const T* x,
            bool clear_dx, bool first, T* dx, T* G) {
  if (net.group == 4)
    gather_block<T, V, 4, Column>(net, block, weight, q, x, clear_dx, first, dx, G);
  else
    gather_block<T, V, 1, Column>(net, block, weight, q, x, clear_dx, first, dx, G);
}

// Gradient at the somas [s0, s1) of one tile -> out[soma - s0][tile]; dsoma_bias += its sums.
template <class T, int V>
void soma_gradient(const dk::Topology& net, const dk::BackwardCall<T>& call, int64_t tile,
                   int64_t s0, int64_t s1, bool first, T* out, T* dsoma_bias) {
  constexpr int L = kLanes<T>, kTile = V * L;
  const int64_t sample = tile * kTile, S = net.somas;
  with_storage<T>(call.storage, [&](auto* type) DK_LAMBDA {
    using Stored = std::remove_pointer_t<decltype(type)>;
    const Stored *grad = static_cast<const Stored*>(call.grad) + sample * S,
                 *y = static_cast<const Stored*>(call.y) + sample * S;
    const SomaGradient<T, Stored> source{grad, y, S, call.slope};
    transpose_in<T, V>(source, min64(kTile, call.batch - sample), s0, s1, out);
  });
  SumStream<T> sums(dsoma_bias + s0, first);
  for (int64_t s = s0; s < s1; ++s) {
    vec<T> sum{};
    unroll<V>([&](auto t) DK_LAMBDA { sum += load(out + (s - s0) * kTile + t * L); });
    sums.push(sum);
  }
  sums.finish();
}

// ---- without dx: gather rows of x in CSR order, no plan ----

// Room for G of the dendrite at a position in gather_rows: it ends in a whole vector.
template <class T>
DK_INLINE int64_t padded_row(const dk::Topology& net, int64_t p) {
  const int64_t r = dendrite_at(net, p);
  return ceil_div(net.crow[r + 1] - net.crow[r], kLanes<T>) * kLanes<T>;
}

// G of positions p0..p1-1 on one tile, one padded row after the other; returns the end of them.
// WithInput: dx += w c q, too. Whole: every row has net.fan_in synapses and fills its vectors (5 %
// faster: nothing has to be asked of a row).
template <class T, int V, class Column, bool WithInput, bool Whole>
__attribute__((noinline)) T* gather_rows(const dk::Topology& net, const dk::BackwardCall<T>& call,
                                         int64_t p0, int64_t p1, int64_t tile, const T* soma_grad,
                                         const T* x, bool first, T* buffer, T* G0, T* G, T* dx) {
  constexpr int L = kLanes<T>, kTile = V * L, BL = kBlockLanes<T>, kGroups = L / BL;
  const int32_t* crow = net.order ? net.ordered_crow : net.crow;
  const auto* columns = static_cast<const Column*>(net.order ? net.ordered_columns : net.columns);
  T* out = G;
  for_each_q<T, V>(
      net, call, p0, p1, tile, soma_grad, first, buffer, G0,
      [&](int64_t p, const vec<T>* q) DK_LAMBDA {
        const int64_t begin = Whole ? p * net.fan_in : int64_t(crow[p]);
        const int64_t count = Whole ? net.fan_in : crow[p + 1] - begin;
        const Column* column = columns + begin;
        const T* weight = call.weight + begin;
        const T cable = WithInput ? cable_weight(call, p) : T(0);
        const auto product = [&](int64_t k) DK_LAMBDA {
          const int64_t at = int64_t(column[k]) * kTile;
          const vec<T> w = WithInput ? splat(weight[k] * cable) : vec<T>{};
          vec<T> sum;
          unroll<V>([&](auto t) DK_LAMBDA {
            sum = t == 0 ? q[t] * load(x + at + t * L) : q[t] * load(x + at + t * L) + sum;
            if constexpr (WithInput) store(dx + at + t * L, w * q[t] + load(dx + at + t * L));
          });
          return sum;
        };
        for (int64_t k = 0; k < count; k += L, out += L) {
          vec<T> folded[kGroups];
          if (Whole || k + L <= count)
            unroll<kGroups>([&](auto g) DK_LAMBDA {
              vec<T> products[BL];
              unroll<BL>([&](auto s) DK_LAMBDA { products[s] = product(k + g * BL + s); });
              folded[g] = fold_group<T>(products);
            });
          else
            unroll<kGroups>([&](auto g) DK_LAMBDA {
              vec<T> products[BL];
              unroll<BL>([&](auto s) DK_LAMBDA {
                products[s] = k + g * BL + s < count ? product(k + g * BL + s) : vec<T>{};
              });
              folded[g] = fold_group<T>(products);
            });
          const vec<T> sums = fold_groups<T>(folded);
          store(out, first ? sums : sums + load(out));
        }
      });
  return out;
}

template <class T>
DK_INLINE bool whole_rows(const dk::Topology& net) {
  return net.fan_in > 0 && net.fan_in % kLanes<T> == 0;
}

template <class T, int V, class Column, bool WithInput>
auto pick_gather_rows(const dk::Topology& net) {
  if constexpr (!WithInput)
    if (whole_rows<T>(net)) return gather_rows<T, V, Column, false, true>;
  return gather_rows<T, V, Column, WithInput, false>;
}

}  // namespace
