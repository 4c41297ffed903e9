"""Forward and backward kernels for Numba, on tiles of samples.

A batch is cut into tiles of `lanes` samples, stored transposed: tile[n] is a `Vector` of input n
for all samples of the tile. One synapse is then one broadcast weight times one such vector, and
no lane is ever idle, whatever the connectivity.

Backward: with q[r] the gradient at the sum of dendrite r times its slope (a `Vector`, from grad, y
and one sign bit), G = <q, x> per synapse and G0 = sum of q give every weight's gradient, and the
sum of w * c * q over a column's synapses gives dx (docs/equations.md, the sign-bit identity). With
dx, work goes by blocks of dendrites: the q of a block stay in cache while its columns are visited
once each, every q read serving dx and G, which is kept in the order of the plan's slots. Without
dx, dendrites are visited as they are stored, and G is kept in their order.
"""

# ruff: noqa: I001  (one name per line would hide the code)
from __future__ import annotations

import ctypes
from typing import Any

import numba
import numpy as np
from numba.core import types

from .vectors import (
    accumulate, add, clear, correlate, element, gather, is_linear, lanes_of, leaky, load,
    load_column, load_int32, load_int64, load_uint16, multiply, multiply_add, narrow, prefetch,
    select_signs, size_of, splat, store, store_signs, total, transpose_in, transpose_out, vload,
    weigh, width_of,
)  # fmt: skip

CHUNK = 16  # somas that forward finishes before it writes them to y
CHAIN = 128  # products added up one by one: longer sums, sums of such, round off less
AHEAD = 3  # columns between the one in work and the one prefetched
STRIP = 64  # dendrites whose q or gradients stay in L1

_SIZES = [
    "tasks", "samples", "features", "rows", "somas", "tiles", "parts", "block_groups", "blocks",
    "block_rows", "group", "slots", "narrow_slots", "workspace_stride",
]  # fmt: skip
_ADDRESSES = [
    "x", "y", "signs", "crow", "columns", "soma_ptr", "weight", "dendrite_bias", "cable",
    "soma_bias", "grad", "dx", "dw", "d_dendrite_bias", "d_cable", "d_soma_bias", "column_ptr",
    "column", "groups", "slot_ptr", "row", "slot", "synapse", "workspace", "weights", "x_tiles",
    "dx_tiles", "sums", "row_sums", "soma_sums",
]  # fmt: skip


class Job(ctypes.Structure):
    """What a call wants done: sizes, and addresses of arrays (0 for one that is absent)."""

    _fields_ = [
        *[(name, ctypes.c_int64) for name in (*_SIZES, *_ADDRESSES)],
        ("slope", ctypes.c_double),
    ]


JOB = types.CPointer(numba.from_dtype(np.dtype(Job)))

# Kernels are called by each other only; wrappers would take a quarter of the compile time.
OPTIONS: dict[str, Any] = {"boundscheck": False, "error_model": "numpy"}
_NO_WRAPPERS: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
kernel = numba.njit(**OPTIONS, **_NO_WRAPPERS)
inline = numba.njit(**OPTIONS, **_NO_WRAPPERS, forceinline=True)


@inline
def load_or_zero(spec, address, index):
    return load(spec, address, index) if address != 0 else element(spec, 0.0)


@kernel
def load_tile(spec, x, stride, samples, begin, end, tile):
    """tile[n][i] = x[i][n] for n in [begin, end), 0 for samples i >= samples."""
    lanes, width, size = lanes_of(spec), width_of(spec), size_of(spec)
    if end - begin < width:
        for n in range(begin, end):
            for i in range(lanes):
                value = load(spec, x, i * stride + n) if i < samples else element(spec, 0.0)
                store(tile, n * lanes + i, value)
        return
    for start in range(begin, end, width):
        n = min(start, end - width)  # the last square overlaps the one before
        for i in range(0, lanes, width):
            source = x + size * ((i if i < samples else 0) * stride + n)
            transpose_in(spec, source, stride, samples - i, tile + size * (n * lanes + i))


@kernel
def store_tile(spec, tile, count, y, stride, samples):
    """y[i][n] = tile[n][i] for n < count and i < samples."""
    lanes, width, size = lanes_of(spec), width_of(spec), size_of(spec)
    if count < width:
        for n in range(count):
            for i in range(samples):
                store(y, i * stride + n, load(spec, tile, n * lanes + i))
        return
    for start in range(0, count, width):
        n = min(start, count - width)
        for i in range(0, samples, width):
            source, target = tile + size * (n * lanes + i), y + size * (i * stride + n)
            transpose_out(spec, source, target, stride, samples - i)


@inline
def excite_chain(spec, tile, columns, weights, begin, end, u):
    """u + the synapses [begin, end)."""
    j = begin
    while j + 4 <= end:
        u = weigh(spec, 4, tile, columns, weights, j, u)
        j += 4
    if j + 2 <= end:
        u = weigh(spec, 2, tile, columns, weights, j, u)
        j += 2
    if j + 1 <= end:
        u = weigh(spec, 1, tile, columns, weights, j, u)
        j += 1
    return u


@kernel
def excite_long(spec, tile, columns, weights, begin, end, u):
    """The same, chain by chain."""
    none = splat(spec, element(spec, 0.0))
    for start in range(begin, end, CHAIN):
        stop = min(end, start + CHAIN)
        u = add(u, excite_chain(spec, tile, columns, weights, start, stop, none))
    return u


@inline
def excite(spec, tile, crow, columns, weights, bias, r):
    """The sum of dendrite r."""
    u = splat(spec, load_or_zero(spec, bias, r))
    begin, end = load_int32(crow, r), load_int32(crow, r + 1)
    if end - begin > CHAIN:
        return excite_long(spec, tile, columns, weights, begin, end, u)
    return excite_chain(spec, tile, columns, weights, begin, end, u)


@kernel
def forward_rows(spec, job, tile, first, last, out):
    """out[r - first] = the plain sparse rows [first, last) for one tile."""
    crow, columns, weights, bias = job.crow, job.columns, job.weight, job.dendrite_bias
    for r in range(first, last):
        store(
            out, (r - first) * lanes_of(spec), excite(spec, tile, crow, columns, weights, bias, r)
        )


@kernel
def forward_somas(spec, job, tile, sample, first, last, out):
    """out[s - first] = activation of somas [first, last) for the tile that starts at `sample`, and
    their dendrites' signs.
    """
    crow, columns, weights, soma_ptr = job.crow, job.columns, job.weight, job.soma_ptr
    bias, cable, soma_bias, signs = job.dendrite_bias, job.cable, job.soma_bias, job.signs
    slope = splat(spec, element(spec, job.slope))
    words = sign_words(job, sample)
    for s in range(first, last):
        v = splat(spec, load_or_zero(spec, soma_bias, s))
        for r in range(load_int32(soma_ptr, s), load_int32(soma_ptr, s + 1)):
            u = excite(spec, tile, crow, columns, weights, bias, r)
            if signs != 0:
                store_signs(words, r, u)
            v = multiply_add(splat(spec, load(spec, cable, r)), leaky(u, u, slope), v)
        store(out, (s - first) * lanes_of(spec), leaky(v, v, slope))


@inline
def sign_words(job, sample):
    """Address of the words, or of the parts of them, with the sign of `sample` in bit 0.
    Little-endian, as every machine Numba runs on.
    """
    return job.signs + 4 * (sample // 32) * job.rows + sample % 32 // 8


# ---- backward ----


@kernel
def load_gradients(spec, job, sample, tile, gates, sums):
    """tile[s] = the gradient at the sums of the somas for one tile of samples; sums[s] += its sum.

    gates: scratch for a tile of y.
    """
    lanes, somas, slope = lanes_of(spec), job.somas, splat(spec, element(spec, job.slope))
    offset, samples = size_of(spec) * sample * somas, min(lanes, job.samples - sample)
    load_tile(spec, job.grad + offset, somas, samples, 0, somas, tile)
    load_tile(spec, job.y + offset, somas, samples, 0, somas, gates)
    for s in range(somas):
        grad = leaky(vload(spec, gates, s * lanes), vload(spec, tile, s * lanes), slope)
        store(tile, s * lanes, grad)
        store(sums, s, load(spec, sums, s) + total(grad))


@kernel
def first_of(pointers, count, more, target):
    """The first i of range(count) where pointers[i] + more * i is the target or above, or count."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        if load_int32(pointers, middle) + more * middle < target:
            low = middle + 1
        else:
            high = middle
    return low


@inline
def correlate_row(spec, job, tile, r, q, dw):
    """dw[j] += sum over samples of q * x, of the synapses j of dendrite r."""
    columns, width = job.columns, width_of(spec)
    j, end = load_int32(job.crow, r), load_int32(job.crow, r + 1)
    while j + width <= end:
        accumulate(dw, j, correlate(spec, 0, tile, columns, j, q))
        j += width
    while j + 4 <= end:
        accumulate(dw, j, correlate(spec, 4, tile, columns, j, q))
        j += 4
    if j + 2 <= end:
        accumulate(dw, j, correlate(spec, 2, tile, columns, j, q))
        j += 2
    if j + 1 <= end:
        accumulate(dw, j, correlate(spec, 1, tile, columns, j, q))
        j += 1


@kernel
def take_q(spec, job, sample, grads, first, last, q, sums, x_tile, dw):
    """The q of dendrites [first, last) for the tile that starts at `sample`, whose gradients at the
    somas are `grads`: q[r - first] = it and sums[r] += its sum.

    With an address for dw, not None, dw += G instead, and q is scratch.
    """
    lanes, rows, soma_ptr = lanes_of(spec), job.rows, job.soma_ptr
    if is_linear(spec):
        grad, samples = job.grad + size_of(spec) * (sample * rows + first), job.samples - sample
        load_tile(spec, grad, rows, min(lanes, samples), 0, last - first, q)
        for r in range(first, last):
            q_of_r = vload(spec, q, (r - first) * lanes)
            store(sums, r, load(spec, sums, r) + total(q_of_r))
            if dw is not None:
                correlate_row(spec, job, x_tile, r, q_of_r, dw)
        return
    slope = splat(spec, element(spec, job.slope))
    low = high = sign_words(job, sample)
    if sample + 32 < job.samples:  # else there are no such words, and all gradients are 0
        high += 4 * rows
    s = first_of(soma_ptr, job.somas, 0, first + 1) - 1
    while load_int32(soma_ptr, s) < last:
        on = vload(spec, grads, s * lanes)
        off = multiply(slope, on)
        for r in range(max(first, load_int32(soma_ptr, s)), min(last, load_int32(soma_ptr, s + 1))):
            q_of_r = select_signs(low, high, r, on, off)
            store(sums, r, load(spec, sums, r) + total(q_of_r))
            if dw is None:
                store(q, (r - first) * lanes, q_of_r)
            else:
                correlate_row(spec, job, x_tile, r, q_of_r, dw)
        s += 1


@inline
def load_slot(job, address, index):
    """A number of the plan's `slot` or `synapse`."""
    return load_uint16(address, index) if job.narrow_slots != 0 else load_int32(address, index)


@kernel
def weigh_slots(spec, job, block, products):
    """weights[slot] = w * c of the block's synapses, 0 in pads.

    products: scratch for them in the order of synapses, since gathering is faster than scattering.
    """
    crow, weight, cable, slot_ptr = job.crow, job.weight, job.cable, job.slot_ptr
    first = block * job.block_rows
    last = min(job.rows, first + job.block_rows)
    begin, past = load_int32(crow, first), load_int32(crow, last)
    for r in range(first, last):
        c = element(spec, 1.0) if is_linear(spec) else load(spec, cable, r)
        for j in range(load_int32(crow, r), load_int32(crow, r + 1)):
            store(products, j - begin, c * load(spec, weight, j))
    store(products, past - begin, element(spec, 0.0))  # of the pads
    for i in range(load_int64(slot_ptr, block), load_int64(slot_ptr, block + 1)):
        store(job.weights, i, load(spec, products, load_slot(job, job.synapse, i)))


@kernel
def gather_blocks(spec, job, sample, x_tile, grads, begin, end, q, sums, row_sums, dx_tile):
    """dx_tile = sum of w * c * q over the synapses of blocks [begin, end), sums += G and row_sums
    += G0, for the tile that starts at `sample`; q: scratch for a block's.
    """
    lanes, none = lanes_of(spec), splat(spec, element(spec, 0.0))
    column, groups, group, rows, weights = job.column, job.groups, job.group, job.row, job.weights
    clear(spec, dx_tile, 0, job.features * lanes)
    for block in range(begin, end):
        first = block * job.block_rows
        last = min(job.rows, first + job.block_rows)
        take_q(spec, job, sample, grads, first, last, q, row_sums, 0, None)
        j = load_int64(job.slot_ptr, block)
        past = load_int64(job.column_ptr, block + 1)
        for i in range(load_int64(job.column_ptr, block), past):
            n = load_column(spec, column, i) * lanes
            ahead = load_column(spec, column, min(i + AHEAD, past - 1)) * lanes
            prefetch(spec, x_tile, ahead)
            prefetch(spec, dx_tile, ahead)
            x, dx = vload(spec, x_tile, n), none
            stop = j + group * load_uint16(groups, i)
            while j + 4 <= stop:
                dx, dots = gather(spec, 4, q, rows, weights, j, x, dx)
                accumulate(sums, j, dots)
                j += 4
            while j < stop:
                dx, dot = gather(spec, 1, q, rows, weights, j, x, dx)
                accumulate(sums, j, dot)
                j += 1
            # Last what other blocks gave: a sum of sums rounds off less than one long chain.
            store(dx_tile, n, add(dx, vload(spec, dx_tile, n)))


@inline
def summed(spec, address, index, count, stride):
    """The sum of address[index + stride * i] over i < count."""
    value = load(spec, address, index)
    for i in range(1, count):
        value += load(spec, address, index + stride * i)
    return value


@kernel
def collect_rows(spec, job, first, last):
    """Gradients of dendrites [first, last) of one block, from the sums of all parts."""
    crow, slot, parts, slots, sums = job.crow, job.slot, job.parts, job.slots, job.sums
    if slot != 0:  # a block's slots are read in no order, so have them in the cache
        block = first // job.block_rows
        begin, end = load_int64(job.slot_ptr, block), load_int64(job.slot_ptr, block + 1)
        sums += size_of(spec) * begin
        for i in range(0, end - begin, lanes_of(spec)):
            for part in range(parts):
                prefetch(spec, sums, i + part * slots)
    for strip in range(first, last, STRIP):
        stop = min(last, strip + STRIP)
        if sums != 0:
            dw, narrow_slots = job.dw, job.narrow_slots != 0
            for j in range(load_int32(crow, strip), load_int32(crow, stop)):
                at = j
                if slot != 0:
                    at = load_uint16(slot, j) if narrow_slots else load_int32(slot, j)
                store(dw, j, summed(spec, sums, at, parts, slots))
            for r in range(strip, stop):
                store(job.d_dendrite_bias, r, summed(spec, job.row_sums, r, parts, job.rows))
        if not is_linear(spec):
            finish_rows(spec, job, strip, stop)


@kernel
def finish_rows(spec, job, first, last):
    """With G in dw and G0 in d_dendrite_bias of dendrites [first, last), the gradients:
    dw = c G, d_dendrite_bias = c G0, d_cable = <w, G> + bias G0.
    """
    one, width = narrow(spec), width_of(spec)
    crow, weight, dw, cable = job.crow, job.weight, job.dw, job.cable
    bias, d_bias, d_cable = job.dendrite_bias, job.d_dendrite_bias, job.d_cable
    for r in range(first, last):
        c, g0 = load(spec, cable, r), load(spec, d_bias, r)
        cs, none = splat(one, c), splat(one, element(spec, 0.0))
        dots, chain = none, none
        dot = load_or_zero(spec, bias, r) * g0
        begin, end = load_int32(crow, r), load_int32(crow, r + 1)
        j = begin
        while j + width <= end:
            g = vload(one, dw, j)
            chain = multiply_add(vload(one, weight, j), g, chain)
            store(dw, j, multiply(cs, g))
            j += width
            if (j - begin) % CHAIN == 0:
                dots, chain = add(dots, chain), none
        while j < end:
            value = load(spec, dw, j)
            dot += load(spec, weight, j) * value
            store(dw, j, c * value)
            j += 1
        store(d_cable, r, dot + total(add(dots, chain)))
        store(d_bias, r, c * g0)
