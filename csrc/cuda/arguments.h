// What the host hands to the kernels: raw pointers and sizes. B samples, N inputs, R dendrites
// (rows), S somas. T is what is stored; A, in which sums run, is float, or double for double.
//
// Packed synapses: a row is a whole number of steps, a step is STEP slots. Slots hold the row of
// the tile to gather (`index`) and a weight; pads point at the zero row behind the tile, with
// weight 0.
//
// Tiles: samples of a batch are cut into tiles of `samples` each. A tile is [rows][lanes][vec]:
// sample `v * lanes + p` of the tile is at [row][p][v], so a lane's samples are one wide load.
#pragma once

#include "types.h"

namespace dk {

// Item i owns what lies from table[i] to table[i + 1], or `each` of it if there is no table.
struct Ranges {
  const int32_t* table;
  int32_t each;
};

template <class T>
struct ForwardArgs {
  using A = Accumulator<T>;
  const T* x;         // [B, N]
  const T* tiles;     // [tiles, tile_rows, samples]: x for gathers from L2; unused otherwise
  const void* index;  // [slots] uint16 or int32
  const A* weight;    // [slots]
  Ranges steps;       // of a dendrite
  Ranges dendrites;   // of a soma; of one row each without somas
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
  const T* x;       // [B, N]
  const T* tiles;   // as in ForwardArgs
  const A* grad_v;  // [tiles, outputs, samples], zero past B
  const void* index;
  Ranges steps, dendrites;
  const uint32_t* signs;                    // null without somas
  A *partial, *partial_row, *partial_soma;  // [groups, slots], [groups, R], [groups, S]
  int64_t batch, slots;
  int32_t inputs, tile_rows, rows, outputs, tile_count;
  int32_t parts, groups;  // group g sums tiles g, g + groups, ...
  A slope;
};

template <class A>
struct FinishArgs {
  const A *partial, *partial_row, *partial_soma;
  const A *weight, *dendrite_bias, *cable;  // weight in packed order; bias, cable may be null
  const int32_t* source;                    // [slots] CSR position, -1 for pads; null: identity
  Ranges steps;
  A *dweight, *ddendrite_bias, *dcable, *dsoma_bias;  // dcable, dsoma_bias null without somas
  int64_t slots;
  int32_t rows, somas, groups, step;
};

template <class T>
struct InputArgs {
  using A = Accumulator<T>;
  const A* grad_v;        // [tiles, tile_rows, samples], zero past B and in the zero row
  const void* index;      // [slots] row of grad_v: the soma (the dendrite, without somas)
  const int32_t* row;     // [slots] dendrite, for its sign bits
  const A* weight;        // [slots] synapse weight times cable weight
  Ranges steps;           // of an input
  const uint32_t* signs;  // null without somas
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
  int32_t columns, tile_rows, lanes, vec;
  Accumulator<T> slope;  // of the somas
};

// packed[i] = weight[source[i]] (* cable[row[i]]), 0 for pads.
template <class A>
struct PackArgs {
  const A *weight, *cable;
  const int32_t *source, *row;
  A* packed;
  int64_t slots;
};

}  // namespace dk
