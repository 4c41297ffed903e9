"""Forward kernels, and the job record and tile loading that backward shares, for Numba.

A batch is cut into tiles of `lanes` samples, stored transposed: tile[n] is a `Vector` of input n
for all samples of the tile. One synapse is then one broadcast weight times one such vector, and
no lane is ever idle, whatever the connectivity (design: batch-inner tiles, sign bits only).

A `..._task` function does task number `task` of `job.tasks`; tasks never wait for each other and
write to different places.
"""

# ruff: noqa: I001  (one name per line would hide the code)
from __future__ import annotations

import ctypes

import numba
import numpy as np
from numba.core import types
from numba.extending import overload

from ._numba_operations import (
    add, element, lanes_of, leaky, load, load_int32, multiply_add, register_of, size_of,
    splat, store, store_signs, transpose_in, transpose_out, vstore, weigh,
)  # fmt: skip

CHUNK = 16  # somas that forward finishes before it writes them to y
CHAIN = 128  # products added up one by one: longer sums, sums of such, round off less

_SIZES = [
    "tasks", "samples", "features", "rows", "somas", "first_tile", "tiles", "pass_tiles",
    "accumulate", "finish", "tile_groups", "block_groups", "blocks", "block_rows", "group", "slots",
    "narrow_slots", "weigh_first", "own_x", "workspace_stride",
]  # fmt: skip
_ADDRESSES = [
    "x", "y", "signs", "crow", "columns", "soma_ptr", "weight", "dendrite_bias", "cable",
    "soma_bias", "grad", "dx", "dw", "d_dendrite_bias", "d_cable", "d_soma_bias", "column_ptr",
    "column", "groups", "slot_ptr", "row", "slot", "synapse", "workspace", "weights", "x_tiles",
    "grad_tiles", "dx_tiles", "sums", "row_sums", "soma_sums",
]  # fmt: skip


class Job(ctypes.Structure):
    """What a call wants done: sizes, and addresses of arrays (0 for one that is absent)."""

    _fields_ = [
        *[(name, ctypes.c_int64) for name in (*_SIZES, *_ADDRESSES)],
        ("slope", ctypes.c_double),
    ]


JOB = types.CPointer(numba.from_dtype(np.dtype(Job)))

# Kernels are called by each other only; wrappers would take a quarter of the compile time.
OPTIONS = {
    "boundscheck": False,
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}
kernel = numba.njit(**OPTIONS)
inline = numba.njit(**OPTIONS, forceinline=True)


@inline
def load_or_zero(spec, address, index):
    return load(spec, address, index) if address != 0 else element(spec, 0.0)


@kernel
def load_tile(spec, x, gate, slope, stride, samples, begin, end, tile):
    """tile[n][i] = x[i][n] for n in [begin, end), 0 for samples i >= samples.

    With an address for a gate, not None, x[i][n] is multiplied by slope unless gate[i][n] > 0.
    """
    lanes, width, size = lanes_of(spec), register_of(spec), size_of(spec)
    if end - begin < width:
        for n in range(begin, end):
            for i in range(lanes):
                value = load(spec, x, i * stride + n) if i < samples else element(spec, 0.0)
                if gate is not None:  # noqa: SIM102
                    if i < samples and not load(spec, gate, i * stride + n) > 0:
                        value *= slope
                store(spec, tile, n * lanes + i, value)
        return
    for start in range(begin, end, width):
        n = min(start, end - width)  # the last square overlaps the one before
        for i in range(0, lanes, width):
            offset = size * ((i if i < samples else 0) * stride + n)
            square = tile + size * (n * lanes + i)
            if gate is not None:
                transpose_in(spec, x + offset, gate + offset, slope, stride, samples - i, square)
            else:
                transpose_in(spec, x + offset, None, slope, stride, samples - i, square)


@kernel
def store_tile(spec, tile, count, y, stride, samples, spare):
    """y[i][n] = tile[n][i] for n < count and i < samples; spare: room for one register."""
    lanes, width, size = lanes_of(spec), register_of(spec), size_of(spec)
    if count < width:
        for n in range(count):
            for i in range(samples):
                store(spec, y, i * stride + n, load(spec, tile, n * lanes + i))
        return
    for start in range(0, count, width):
        n = min(start, count - width)
        for i in range(0, samples, width):
            source, target = tile + size * (n * lanes + i), y + size * (i * stride + n)
            transpose_out(spec, source, target, stride, samples - i, spare)


@inline
def excite(spec, tile, columns, weights, begin, end, u):
    """u + the synapses [begin, end)."""
    j = begin
    while j + 4 <= end:
        u = weigh(spec, 4, tile, columns, weights, j, u)
        j += 4
    while j < end:
        u = weigh(spec, 1, tile, columns, weights, j, u)
        j += 1
    return u


@inline
def excite_two(spec, tile, columns, weights, begin0, end0, begin1, end1, u0, u1):
    """u0 + the synapses [begin0, end0), u1 + the synapses [begin1, end1): two chains of sums at
    once, so that neither waits for its own last addition.
    """
    both = min(end0 - begin0, end1 - begin1) & -4
    for j in range(0, both, 4):
        u0 = weigh(spec, 4, tile, columns, weights, begin0 + j, u0)
        u1 = weigh(spec, 4, tile, columns, weights, begin1 + j, u1)
    u0 = excite(spec, tile, columns, weights, begin0 + both, end0, u0)
    u1 = excite(spec, tile, columns, weights, begin1 + both, end1, u1)
    return u0, u1


@kernel
def excite_long(spec, tile, columns, weights, begin, middle, end, u0, u1):
    """The same for [begin, middle) and [middle, end), chain by chain."""
    none, second = splat(spec, element(spec, 0.0)), middle
    while begin < middle or second < end:
        end0, end1 = min(middle, begin + CHAIN), min(end, second + CHAIN)
        sum0, sum1 = excite_two(spec, tile, columns, weights, begin, end0, second, end1, none, none)
        u0, u1 = add(u0, sum0), add(u1, sum1)
        begin, second = end0, end1
    return u0, u1


@inline
def excite_pair(spec, tile, columns, weights, begin, middle, end, u0, u1):
    """u0 + the synapses [begin, middle), u1 + the synapses [middle, end)."""
    if max(middle - begin, end - middle) > CHAIN:
        return excite_long(spec, tile, columns, weights, begin, middle, end, u0, u1)
    return excite_two(spec, tile, columns, weights, begin, middle, middle, end, u0, u1)


@inline
def excite_last(spec, tile, columns, weights, begin, end, u):
    """u + the synapses [begin, end) of a dendrite without a neighbour."""
    if end - begin > CHAIN:
        return excite_long(spec, tile, columns, weights, begin, end, end, u, u)[0]
    return excite(spec, tile, columns, weights, begin, end, u)


@kernel
def forward_somas(spec, job, tile, signs, first, last, out):
    """out[s - first] = activation of somas [first, last) for one tile, and their dendrites' signs.

    signs: address of this tile's words, 0 to save none.
    """
    crow, columns, weights, soma_ptr = job.crow, job.columns, job.weight, job.soma_ptr
    dendrite_bias, cable, soma_bias = job.dendrite_bias, job.cable, job.soma_bias
    slope, lanes = splat(spec, element(spec, job.slope)), lanes_of(spec)
    for s in range(first, last):
        v = splat(spec, load_or_zero(spec, soma_bias, s))
        r, end = load_int32(soma_ptr, s), load_int32(soma_ptr, s + 1)
        while r + 2 <= end:
            u0 = splat(spec, load_or_zero(spec, dendrite_bias, r))
            u1 = splat(spec, load_or_zero(spec, dendrite_bias, r + 1))
            j0, j1, j2 = load_int32(crow, r), load_int32(crow, r + 1), load_int32(crow, r + 2)
            u0, u1 = excite_pair(spec, tile, columns, weights, j0, j1, j2, u0, u1)
            if signs != 0:
                store_signs(signs, r, u0)
                store_signs(signs, r + 1, u1)
            v = multiply_add(splat(spec, load(spec, cable, r)), leaky(u0, slope), v)
            v = multiply_add(splat(spec, load(spec, cable, r + 1)), leaky(u1, slope), v)
            r += 2
        if r < end:
            u = splat(spec, load_or_zero(spec, dendrite_bias, r))
            j0, j1 = load_int32(crow, r), load_int32(crow, r + 1)
            u = excite_last(spec, tile, columns, weights, j0, j1, u)
            if signs != 0:
                store_signs(signs, r, u)
            v = multiply_add(splat(spec, load(spec, cable, r)), leaky(u, slope), v)
        vstore(out, (s - first) * lanes, leaky(v, slope))


@kernel
def forward_rows(spec, job, tile, signs, first, last, out):
    """out[r - first] = the plain sparse rows [first, last) for one tile."""
    crow, columns, weights, bias = job.crow, job.columns, job.weight, job.dendrite_bias
    lanes, r = lanes_of(spec), first
    while r < last:
        u0 = splat(spec, load_or_zero(spec, bias, r))
        j0, j1 = load_int32(crow, r), load_int32(crow, r + 1)
        if r + 1 < last:
            u1 = splat(spec, load_or_zero(spec, bias, r + 1))
            j2 = load_int32(crow, r + 2)
            u0, u1 = excite_pair(spec, tile, columns, weights, j0, j1, j2, u0, u1)
            vstore(out, (r + 1 - first) * lanes, u1)
        else:
            u0 = excite_last(spec, tile, columns, weights, j0, j1, u0)
        vstore(out, (r - first) * lanes, u0)
        r += 2


@inline
def sign_words(job, sample):
    """Address of the words, or of the parts of them, with the sign of `sample` in bit 0; 0 if there
    are none. Little-endian, as every machine Numba runs on.
    """
    if job.signs == 0:
        return 0
    return job.signs + 4 * (sample // 32) * job.rows + sample % 32 // 8


def outputs(spec, job, tile, signs, first, last, out):
    """`forward_rows` or `forward_somas`, whichever spec asks for."""
    raise NotImplementedError


@overload(outputs, jit_options=OPTIONS)
def _choose_outputs(spec, job, tile, signs, first, last, out):
    return (forward_rows if spec.spec.linear else forward_somas).py_func
