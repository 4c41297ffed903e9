// What the host hands to the kernels: raw pointers and sizes. B samples, N inputs, R dendrites, S
// somas. T is what is stored; A, in which sums run, is float, or double for double.
//
// Tiles: samples of a batch are cut into tiles of `samples` each. A tile is [rows][lanes][vec]:
// sample `v * lanes + p` of the tile is at [row][p][v], so a lane's samples are one wide load.
#pragma once

#include "types.h"

namespace dk {

// Packed synapses (backends/cuda/pack.py): rows are dendrites, or inputs in the transposed packing,
// whose outputs are the rows themselves. A warp computes the outputs of one item, each by a team of
// 2**team_bits groups of its lanes. The groups take the rows of a bundle side by side, in steps of
// `chunk` synapses of every row. Pads gather the row of zeros behind the tile, with weight 0.
struct Synapses {
  const void* index;       // [slots] uint16 or int32: row of the tile to gather
  const void* dendrite;    // [slots] for its sign bits, in the transposed packing: uint16 if these
                           // are staged in shared memory, else int32
  const int32_t* outputs;  // [items * teams] output of each team, -1: none
  const int32_t* bundles;  // [items + 1] first bundle of each item
  const int32_t* rows;     // [bundles * groups] row of each group, -1: none
  const int32_t* steps;    // [bundles + 1] first step of each bundle
  int64_t slots;
  int32_t items, bundle_count, team_bits;
};

template <class T>
struct ForwardArgs {
  using A = Accumulator<T>;
  Synapses synapses;
  const T* x;                                  // [B, N]
  const T* tiles;                              // [tiles, tile_rows, samples] if gathered from L2
  const A* weight;                             // [slots]
  const A *dendrite_bias, *cable, *soma_bias;  // biases may be null; cable null: y is u [B, R]
  T* y;                                        // [B, S] or [B, R]
  uint32_t* signs;                             // [ceil(B / 32), R] or null
  int64_t batch;
  int32_t inputs, tile_rows, rows, outputs;
  int32_t parts;  // blocks that share a batch tile
  A slope, soma_slope;
};

template <class T>
struct WeightArgs {
  using A = Accumulator<T>;
  Synapses synapses;
  const T* x;                               // [B, N]
  const T* tiles;                           // as in ForwardArgs
  const A* grad_v;                          // [tiles, outputs, samples], zero past B
  const uint32_t* signs;                    // null without somas
  A *partial, *partial_row, *partial_soma;  // [groups, slots], [groups, R], [groups, S]
  int64_t batch;
  int32_t inputs, tile_rows, rows, outputs, tile_count;
  int32_t parts, groups;  // group g sums tiles g, g + groups, ...
  A slope;
};

// A step of torch.optim.Adam or AdamW, taken where the gradient is.
template <class A>
struct AdamArgs {
  A *weight, *exp_avg, *exp_avg_sq;  // [nnz]; null: no step, the gradient is stored
  const float* steps;                // [] taken before this one
  A lr, decay;                       // decay of the weight, before the step: 1 - lr * weight_decay
  A l2;                              // weight_decay of Adam, which joins the gradient
  A beta2, rest1, rest2;             // rest: 1 - beta, which has few digits left in float
  A log_beta1, log_beta2, eps;
};

template <class A>
struct FinishArgs {
  Synapses synapses;
  const A *partial, *partial_row, *partial_soma;
  const A *weight, *dendrite_bias, *cable;  // weight in CSR order; bias, cable may be null
  const int32_t* source;                    // [slots] CSR position, -1 for pads; null: identity
  A *dweight, *ddendrite_bias, *dcable, *dsoma_bias;  // dcable, dsoma_bias null without somas
  AdamArgs<A> adam;                                   // instead of dweight
  int32_t rows, somas, groups;
  int32_t row_groups, chunk;  // rows of a bundle, synapses of a row in a step
};

template <class T>
struct InputArgs {
  using A = Accumulator<T>;
  Synapses synapses;
  const A* grad_v;        // [tiles, tile_rows, samples], zero past B and in the zero row
  const A* weight;        // [slots] synapse weight times cable weight
  const uint32_t* signs;  // [ceil(B / 32), R]; null without somas
  T* dx;                  // [B, N]
  int64_t batch;
  int32_t inputs, tile_rows, rows, parts;
  A slope;
};

// [B, columns] -> tiles [tiles, tile_rows, samples], zero past B and past the columns.
template <class T, class O>
struct TileArgs {
  const T* in;
  const T* y;  // not null: in is multiplied with the somas' derivative, read from y
  O* out;
  int64_t batch;
  int32_t columns, tile_rows;
  int32_t lane_bits, sample_bits;  // lanes and samples of a tile are powers of two
  Accumulator<T> slope;            // of the somas
};

// packed[i] = weight[source[i]] (* cable[dendrite[i]]), 0 for pads.
template <class A>
struct PackArgs {
  const A *weight, *cable;
  const int32_t* source;
  const void* dendrite;  // as in Synapses; `staged`: uint16
  A* packed;
  int64_t slots;
  bool staged;
};

}  // namespace dk
