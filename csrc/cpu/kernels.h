// The interface between binding and kernels: raw pointers and sizes, no torch, no Python. B
// samples, N inputs, R dendrites (rows), S somas. Every ISA has a table of functions; the binding
// chooses one at import.
#pragma once

#include <stdint.h>

namespace dk {

// CSR connectivity and, for the gradient of the input, its blocked transpose. TransposedPlan in
// transposed.py explains the plan_ fields.
struct Topology {
  int64_t in_features, rows, somas, nnz;
  int64_t fan_in;           // constant number of synapses per dendrite, 0 if it varies
  const int32_t* crow;      // [R + 1]
  const int32_t* soma_ptr;  // [S + 1]
  const void* columns;      // [nnz] uint16 if in_features <= 65536, else int32
  bool narrow;              // columns (and plan_column) are uint16
  // The order in which dendrites are visited; null: by number. Neighbours in it share inputs, which
  // then come from the cache. It permutes dendrites only within groups: groups of somas for forward
  // and for backward without dx, groups of rows for forward without a soma stage.
  const int32_t* order;         // [R] position -> dendrite
  const int32_t* soma;          // [R] position -> soma; null: groups of rows
  const int32_t* ordered_crow;  // [R + 1] crow and columns of the dendrites in that order
  const void* ordered_columns;  // [nnz]
  int64_t group_size;           // in somas or rows
  int64_t blocks, block_rows, group;
  const int64_t* plan_column_ptr;  // [blocks + 1]
  const int64_t* plan_slot_ptr;    // [blocks + 1]
  const void* plan_column;
  const uint16_t* plan_groups;
  const uint16_t* plan_row;
  const void* plan_slot;     // [nnz] uint16 or int32, as plan_narrow says
  const void* plan_synapse;  // [slots], of the same type
  bool plan_narrow;
};

// Threads and memory come from the caller: kernels use torch's pool and allocate nothing.
struct Runtime {
  int threads;
  int64_t l2_bytes;  // second-level cache of one core
  // Runs body(begin, end, context) over disjoint ranges that cover [0, n).
  void (*parallel)(int64_t n, void (*body)(int64_t, int64_t, void*), void* context);
  // At least `bytes` of 64-byte aligned, uninitialised memory that lives until the call returns.
  void* (*workspace)(void* context, int64_t bytes);
  void* workspace_context;
};

// How x, y and their gradients are stored: `full` as T, the others as 16-bit numbers, which kernels
// widen to float32. Parameters and their gradients are always T.
enum class Storage { full, bf16, f16 };

// cable == nullptr: no soma stage, y is u [B, R] (a sparse linear layer).
template <class T>
struct ForwardCall {
  int64_t batch;
  Storage storage;
  bool round_x;   // round x to bfloat16 when it is read (float32 only)
  const void* x;  // [B, N]
  const T *weight, *dendrite_bias, *cable, *soma_bias;  // biases may be null
  void* y;                                              // [B, S] or [B, R]
  uint32_t* signs;                                      // [ceil(B / 32), R] or null
  T slope, soma_slope;  // of the leaky ReLUs of dendrites and of somas
};

template <class T>
struct BackwardCall {
  int64_t batch;
  Storage storage;
  const void *grad, *x, *y;                 // y null: sparse linear
  const T *weight, *dendrite_bias, *cable;  // cable null: sparse linear
  const uint32_t* signs;
  T slope, soma_slope;  // of the leaky ReLUs of dendrites and of somas
  void* dx;             // null: not needed
  T *dweight, *ddendrite_bias;
  T *dcable, *dsoma_bias;  // null: sparse linear
};

struct KernelTable {
  const char* isa;
  void (*forward_f32)(const Topology&, const ForwardCall<float>&, const Runtime&);
  void (*forward_f64)(const Topology&, const ForwardCall<double>&, const Runtime&);
  void (*backward_f32)(const Topology&, const BackwardCall<float>&, const Runtime&);
  void (*backward_f64)(const Topology&, const BackwardCall<double>&, const Runtime&);
};

extern const KernelTable kernels_base, kernels_avx2, kernels_avx512, kernels_neon;

}  // namespace dk
