"""Mutants of the kernels: C++, CUDA through the emulator, Numba."""

from __future__ import annotations

from .plant import Mutant

_PROPERTIES = "tests/properties/test_properties.py::test_property"
_THREADS = (
    "tests/functional/test_functional.py::test_every_thread_count_and_every_strategy_is_exact"
)
_ZERO = "tests/functional/test_functional.py::test_derivative_at_zero_is_the_slope"
_LONG_ROWS = "tests/functional/test_long_sums.py::test_cable_gradients_of_long_rows"
_LONG_COLUMNS = "tests/functional/test_long_sums.py::test_long_rows_and_columns"
_ORDER = "tests/backends/test_visiting_order.py::test_results_do_not_depend_on_the_order"
_PRECISION = "tests/nn/test_torch_precision.py::test_bf16_inputs_equal_rounded_inputs"
_EXTENSION = "tests/backends/test_extension.py"
_FAST = "tests/autograd/test_fast_path.py"
_CONVERSIONS = "tests/functional/test_conversions.py"

CPU = {
    "forward: the last block of synapses is left out": Mutant(
        "csrc/cpu/forward.h",
        "for (; k + BL <= count; k += BL) {",
        "for (; k + BL < count; k += BL) {",
        _PROPERTIES,
    ),
    "forward: weights of a long row do not move on": Mutant(
        "csrc/cpu/forward.h", "      rows.weight[d] += count[d];\n", "", _LONG_ROWS
    ),
    "forward of one: the bias of the first dendrites for all": Mutant(
        "csrc/cpu/forward_single.h",
        "? u + load_part(call.dendrite_bias + r, count) : u;",
        "? u + load_part(call.dendrite_bias, count) : u;",
        _PROPERTIES,
    ),
    "forward of one: zero counts as positive": Mutant(
        "csrc/cpu/forward_single.h",
        "bits = (u > vec<T>{}) & 1;",
        "bits = (u >= vec<T>{}) & 1;",
        _PROPERTIES,
    ),
    "forward of one: only one soma without dendrites at the end": Mutant(
        "csrc/cpu/forward_single.h",
        "while (s < s1) leave_soma();",
        "if (s < s1) leave_soma();",
        _PROPERTIES,
    ),
    "forward with an order: bits go where the dendrite is visited": Mutant(
        "csrc/cpu/forward.h",
        "if (signs.words) store_signs<T, V>(signs, net.order[p], u);",
        "if (signs.words) store_signs<T, V>(signs, p, u);",
        _ORDER,
    ),
    "tile: a zero output passes the whole gradient": Mutant(
        "csrc/cpu/tile.h",
        "return y.vector(row, column) > vec<T>{} ? g : g * splat(slope);",
        "return y.vector(row, column) >= vec<T>{} ? g : g * splat(slope);",
        _ZERO,
    ),
    "tile: the last inputs are not rounded to bfloat16": Mutant(
        "csrc/cpu/tile.h",
        "return widen(narrow(source.scalar(row, column), bf16{}));",
        "return source.scalar(row, column);",
        _PRECISION,
    ),
    "tile: a chain is counted again in the next one": Mutant(
        "csrc/cpu/tile.h", "      chain_ = vec<T>{};\n", "", _LONG_ROWS
    ),
    "shuffle: a transpose of doubles swaps rows": Mutant(
        "csrc/cpu/shuffle.h", "q[0] = lo, q[1] = hi;", "q[0] = hi, q[1] = lo;", _PROPERTIES
    ),
    "plan: pads have the weight that was there": Mutant(
        "csrc/cpu/backward_plan.h", "  products[net.crow[r1] - begin] = 0;\n", "", _PROPERTIES
    ),
    "plan: dx keeps that of the tile before": Mutant(
        "csrc/cpu/backward_plan.h", "q, x, block == 0, first, dx,",
        "q, x, block == 0 && first, first, dx,", _THREADS,
    ),
    "plan: the last inputs without synapses are not cleared": Mutant(
        "csrc/cpu/backward_plan.h",
        "if (clear_dx) memset(dx + next * kTile, 0, size_t(net.in_features - next)",
        "if (clear_dx && !next) memset(dx + next * kTile, 0, size_t(net.in_features - next)",
        _PROPERTIES,
    ),
    "plan: sums of other threads with a wrong stride": Mutant(
        "csrc/cpu/backward_plan.h",
        "sums += load_part(G0 + t * net.rows + r, count);",
        "sums += load_part(G0 + t * net.somas + r, count);",
        _THREADS,
    ),
    "gradients: the bias is forgotten in that of the cable": Mutant(
        "csrc/cpu/gradients.h",
        "dot[i] + (call.dendrite_bias ? call.dendrite_bias[r] * G0[i] : T(0));",
        "dot[i];",
        _ORDER,
    ),
    "gradients: the last copy of dx is not added": Mutant(
        "csrc/cpu/gradients.h",
        "for (int64_t other = 1; other < threads; ++other)",
        "for (int64_t other = 1; other < threads - 1; ++other)",
        _THREADS,
    ),
    "rows: the last stretch of dx is lost": Mutant(
        "csrc/cpu/backward_rows.h",
        "    if (dx != sum) add_to(N * kTile, dx, sum);\n  });",
        "  });",
        _LONG_COLUMNS,
    ),
    "samples: no gradient for a soma that two threads share": Mutant(
        "csrc/cpu/samples.h",
        "soma_gradients(s0, first_soma_from(p1), i,",
        "soma_gradients(s0, first_soma_of(p1), i,",
        _THREADS,
    ),
    "backward of one: the slope of the soma is forgotten": Mutant(
        "csrc/cpu/backward_single.h",
        "const T inactive = call.slope * active;",
        "const T inactive = call.slope * in.grad[s];",
        _PROPERTIES,
    ),
    "storage: ties go away from zero in bfloat16": Mutant(
        "csrc/cpu/storage.h",
        "const Unsigned rounded = bits + 0x7fff + ((bits >> 16) & 1);",
        "const Unsigned rounded = bits + 0x8000;",
        _CONVERSIONS,
    ),
    "storage: NaN becomes a zero in bfloat16": Mutant(
        "csrc/cpu/storage.h",
        "bits = v == v ? bits + 0x7fff + ((bits >> 16) & 1) : (bits | 0x400000);",
        "bits = bits + 0x7fff + ((bits >> 16) & 1);",
        _CONVERSIONS,
    ),
    "storage: infinity becomes a number in float16": Mutant(
        "csrc/cpu/storage.h",
        "(rest << 13) + (rest < 0x7c00 ? 0x38000000 : 0x70000000);",
        "(rest << 13) + 0x38000000;",
        _CONVERSIONS,
    ),
    "binding: strided tensors are taken as contiguous": Mutant(
        "csrc/cpu/tensor.h",
        "has_shape(t, shape) && is_contiguous(t) &&",
        "has_shape(t, shape) &&",
        f"{_EXTENSION} {_FAST}",
    ),
    "binding: the last parameter decides whether a gradient is needed": Mutant(
        "csrc/cpu/bind.cpp",
        "required = required || requires_grad(p);",
        "required = requires_grad(p);",
        _FAST,
    ),
    "binding: an order of rows is taken for one of somas": Mutant(
        "csrc/cpu/bind.cpp", "if (net.order && somas != bool(net.soma))",
        "if (net.order && somas && !net.soma)", _EXTENSION,
    ),
}  # fmt: skip

_EMULATOR = (
    "tests/cuda_emulator/test_cuda_emulator.py"
    "::test_kernels_match_the_oracle_in_every_order_of_threads"
)

# test_cuda_emulator.py has mutants of its own, which check the emulator.
CUDA = {
    "CUDA forward: the soma's slope for dendrites": Mutant(
        "csrc/cuda/forward.h",
        "v[i] += cable * leaky(u[i], args.slope);",
        "v[i] += cable * leaky(u[i], args.soma_slope);",
        _EMULATOR,
    ),
    "CUDA forward of few: a pad is read as an input": Mutant(
        "csrc/cuda/forward.h",
        "if (n < uint32_t(args.inputs)) {",
        "if (n <= uint32_t(args.inputs)) {",
        _EMULATOR,
    ),
    "CUDA layout: a zero output passes the whole gradient": Mutant(
        "csrc/cuda/layout.h", "!(widen(args.y[at]) > A(0))", "!(widen(args.y[at]) >= A(0))",
        _EMULATOR,
    ),
    "CUDA weight: no barrier before the next tile": Mutant(
        "csrc/cuda/backward_weight.h",
        "      if (!is_first_tile) __syncthreads();  // all have read the tile before\n",
        "",
        _EMULATOR,
    ),
    "CUDA weight: only the first lanes of a group sum the cable's gradient": Mutant(
        "csrc/cuda/backward_weight.h",
        "if (bit < args.chunk || bit >= args.chunk * args.row_groups) dot += other;",
        "if (bit < args.chunk) dot += other;",
        _EMULATOR,
    ),
    "CUDA weight: Adam forgets its second average": Mutant(
        "csrc/cuda/backward_weight.h", "  adam.exp_avg_sq[to] = exp_avg_sq;\n", "", _EMULATOR
    ),
    "CUDA input: sign words behind the batch are read": Mutant(
        "csrc/cuda/backward_input.h",
        "const bool exists = b0 + 32 * w < batch;",
        "const bool exists = b0 + w < batch;",
        _EMULATOR,
    ),
}  # fmt: skip

_NUMBA = "tests/backends/test_numba_backend.py"

NUMBA = {
    "Numba: zero counts as positive": Mutant(
        "dendrite_kernels/backends/numba/vectors.py",
        'return b.fcmp_ordered(">", x, _zero(x.type))',
        'return b.fcmp_ordered(">=", x, _zero(x.type))',
        _NUMBA,
    ),
    "Numba: samples past the batch repeat the first": Mutant(
        "dendrite_kernels/backends/numba/vectors.py",
        "square.append(b.select(valid, row, _zero(spec.register)))",
        "square.append(row)",
        _NUMBA,
    ),
    "Numba: the end of the last share is lost": Mutant(
        "dendrite_kernels/backends/numba/tasks.py",
        "return first * width, count if last == units else last * width",
        "return first * width, last * width",
        _NUMBA,
    ),
    "Numba: a long row runs into the next": Mutant(
        "dendrite_kernels/backends/numba/kernels.py",
        "stop = min(end, start + CHAIN)",
        "stop = start + CHAIN",
        _LONG_ROWS,
    ),
    "Numba: the bias is forgotten in the gradient of the cable": Mutant(
        "dendrite_kernels/backends/numba/kernels.py",
        "dot = load_or_zero(spec, bias, r) * g0",
        "dot = element(spec, 0.0)",
        _NUMBA,
    ),
    "Numba: sums of parts with a wrong stride": Mutant(
        "dendrite_kernels/backends/numba/kernels.py",
        "summed(spec, job.row_sums, r, parts, job.rows)",
        "summed(spec, job.row_sums, r, parts, job.somas)",
        _NUMBA,
    ),
    "Numba: a call inside another takes its memory": Mutant(
        "dendrite_kernels/backends/numba/__init__.py",
        "taken, self.kept = self.kept, None",
        "taken = self.kept",
        _NUMBA,
    ),
}

MUTANTS = CPU | CUDA | NUMBA
