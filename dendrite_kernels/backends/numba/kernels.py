"""Forward and backward kernels for Numba, on tiles of samples.

A batch is cut into tiles of `lanes` samples, stored transposed: tile[n] is a `Vector` of input n
for all samples of the tile. One synapse is then one broadcast weight times one such vector, and
no lane is ever idle, whatever the connectivity.

Backward: with q[r] the gradient at the sum of dendrite r times its slope (a `Vector`, from grad, y
and one sign bit), G = <q, x> per synapse and G0 = sum of q give every weight's gradient, and the
sum of w * c * q over a column's synapses gives dx (docs/equations.md, the sign-bit identity). With
dx, work goes by blocks of dendrites: the q of a block stay in cache while its columns are visited
once each, every q read serving dx and G, which is kept in the order of the plan's slots. Without
dx, dendrites are visited as they are stored.
"""

# ruff: noqa: I001  (one name per line would hide the code)
from __future__ import annotations

import ctypes

import numba
import numpy as np
from numba.core import types
from numba.extending import overload

from .vectors import (
    accumulate, add, clear, correlate, element, gather, is_linear, lanes_of, leaky, load,
    load_column, load_int32, load_int64, load_uint16, multiply, multiply_add, narrow, prefetch,
    register_of, select_signs, size_of, splat, store, store_signs, total, transpose_in,
    transpose_out, vload, vstore, weigh,
)  # fmt: skip

CHUNK = 16  # somas that forward finishes before it writes them to y
CHAIN = 128  # products added up one by one: longer sums, sums of such, round off less

_SIZES = [
    "tasks", "samples", "features", "rows", "somas", "first_tile", "tiles", "pass_tiles",
    "accumulate", "finish", "block_groups", "blocks", "block_rows", "group", "slots",
    "narrow_slots", "own_x", "workspace_stride",
]  # fmt: skip
_ADDRESSES = [
    "x", "y", "signs", "crow", "columns", "soma_ptr", "weight", "dendrite_bias", "cable",
    "soma_bias", "grad", "dx", "dw", "d_dendrite_bias", "d_cable", "d_soma_bias", "column_ptr",
    "column", "groups", "slot_ptr", "row", "slot", "synapse", "workspace", "weights", "x_tiles",
    "grad_tiles", "dx_tiles", "sums", "row_sums",
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


# ---- backward ----

AHEAD = 3  # columns between the one in work and the one prefetched
STRIP = 64  # dendrites whose q or gradients stay in L1


# --- q ---


@kernel
def load_gradients(spec, job, sample, first, last, tile, sums):
    """tile[s] = the gradient at the sums of somas [first, last) for one tile of samples;
    sums[s] += its sum.
    """
    lanes, size, somas = lanes_of(spec), size_of(spec), job.somas
    offset, slope = size * sample * somas, element(spec, job.slope)
    samples = min(lanes, job.samples - sample)
    load_tile(spec, job.grad + offset, job.y + offset, slope, somas, samples, first, last, tile)
    for s in range(first, last):
        store(spec, sums, s, load(spec, sums, s) + total(vload(spec, tile, s * lanes)))


@kernel
def soma_of(soma_ptr, somas, row):
    """The soma that owns dendrite `row`."""
    low, high = 0, somas
    while high - low > 1:
        middle = (low + high) // 2
        if load_int32(soma_ptr, middle) <= row:
            low = middle
        else:
            high = middle
    return low


@inline
def sign_pair(job, sample):
    """Addresses of the words with the signs of `sample` and the next 31, and of 32 more."""
    low = sign_words(job, sample)
    # Beyond the batch there are no words to read, and no gradient for them to change.
    return low, sign_words(job, sample + 32) if sample + 32 < job.samples else low


def fill_q(spec, job, sample, grads, first, last, q, sums):
    """q[r - first] of dendrites [first, last) for the tile that starts at `sample`, whose
    gradients at the somas are `grads`; sums[r] += the sum of q.
    """
    raise NotImplementedError


@overload(fill_q, jit_options=OPTIONS)
def _choose_fill_q(spec, job, sample, grads, first, last, q, sums):
    return (fill_q_rows if spec.spec.linear else fill_q_somas).py_func


@kernel
def fill_q_somas(spec, job, sample, grads, first, last, q, sums):
    lanes, soma_ptr = lanes_of(spec), job.soma_ptr
    slope = splat(spec, element(spec, job.slope))
    low, high = sign_pair(job, sample)
    s, r = soma_of(soma_ptr, job.somas, first), first
    while r < last:
        on = vload(spec, grads, s * lanes)
        off = multiply(slope, on)
        end = min(last, load_int32(soma_ptr, s + 1))
        while r < end:
            x = select_signs(low, high, r, on, off)
            vstore(q, (r - first) * lanes, x)
            store(spec, sums, r, load(spec, sums, r) + total(x))
            r += 1
        s += 1


@kernel
def fill_q_rows(spec, job, sample, grads, first, last, q, sums):
    lanes, rows = lanes_of(spec), job.rows
    grad = job.grad + size_of(spec) * (sample * rows + first)
    samples = min(lanes, job.samples - sample)
    load_tile(spec, grad, None, element(spec, 1.0), rows, samples, 0, last - first, q)
    for r in range(first, last):
        store(spec, sums, r, load(spec, sums, r) + total(vload(spec, q, (r - first) * lanes)))


# --- with dx ---


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
            store(spec, products, j - begin, c * load(spec, weight, j))
    store(spec, products, past - begin, element(spec, 0.0))  # of the pads
    for i in range(load_int64(slot_ptr, block), load_int64(slot_ptr, block + 1)):
        store(spec, job.weights, i, load(spec, products, load_slot(job, job.synapse, i)))


@kernel
def gather_block(spec, job, block, q, weights, x_tile, dx_tile, sums, fresh):
    """dx_tile[n] += sum of w * c * q over the block's synapses of column n; sums[slot] += G.

    A fresh dx_tile holds nothing yet: all columns are set.
    """
    lanes, column, groups, group = lanes_of(spec), job.column, job.groups, job.group
    rows = job.row + 2 * load_int64(job.slot_ptr, block)
    last = load_int64(job.column_ptr, block + 1)
    none = splat(spec, element(spec, 0.0))
    j = done = 0
    for i in range(load_int64(job.column_ptr, block), last):
        n = load_column(spec, column, i) * lanes
        ahead = load_column(spec, column, min(i + AHEAD, last - 1)) * lanes
        prefetch(spec, x_tile, ahead)
        prefetch(spec, dx_tile, ahead)
        x = vload(spec, x_tile, n)
        if fresh:
            clear(spec, dx_tile, done, n)
            done = n + lanes
        dx = none
        end = j + group * load_uint16(groups, i)
        while j + 4 <= end:
            dx, dots = gather(spec, 4, q, rows, weights, j, x, dx)
            accumulate(sums, j, dots)
            j += 4
        while j < end:
            dx, dot = gather(spec, 1, q, rows, weights, j, x, dx)
            accumulate(sums, j, dot)
            j += 1
        # Last what other blocks gave: a sum of their sums rounds off less than one long chain.
        vstore(dx_tile, n, dx if fresh else add(dx, vload(spec, dx_tile, n)))
    if fresh:
        clear(spec, dx_tile, done, job.features * lanes)


@kernel
def collect_rows(spec, job, block, first, last):
    """Gradients of the weights of dendrites [first, last) of one block, from its sums."""
    crow, slot, dw = job.crow, job.slot, job.dw
    sums = job.sums + size_of(spec) * load_int64(job.slot_ptr, block)
    for strip in range(first, last, STRIP):
        stop = min(last, strip + STRIP)
        begin, end = load_int32(crow, strip), load_int32(crow, stop)
        for j in range(begin, end):
            store(spec, dw, j, load(spec, sums, load_slot(job, slot, j)))
        for r in range(strip, stop):
            store(spec, job.d_dendrite_bias, r, load(spec, job.row_sums, r))
        if not is_linear(spec):
            finish_rows(spec, job, strip, stop)


@kernel
def finish_rows(spec, job, first, last):
    """With G in dw and G0 in d_dendrite_bias of dendrites [first, last), the gradients:
    dw = c G, d_dendrite_bias = c G0, d_cable = <w, G> + bias G0.
    """
    one, width = narrow(spec), register_of(spec)
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
            vstore(dw, j, multiply(cs, g))
            j += width
            if (j - begin) % CHAIN == 0:
                dots, chain = add(dots, chain), none
        while j < end:
            value = load(spec, dw, j)
            dot += load(spec, weight, j) * value
            store(spec, dw, j, c * value)
            j += 1
        store(spec, d_cable, r, dot + total(add(dots, chain)))
        store(spec, d_bias, r, c * g0)


# --- without dx ---


@inline
def correlate_row(spec, job, tile, r, q):
    """dw[j] += sum over samples of q * x, of the synapses j of dendrite r."""
    columns, dw, width = job.columns, job.dw, register_of(spec)
    j, end = load_int32(job.crow, r), load_int32(job.crow, r + 1)
    while j + width <= end:
        accumulate(dw, j, correlate(spec, 0, tile, columns, j, q))
        j += width
    while j + 4 <= end:
        accumulate(dw, j, correlate(spec, 4, tile, columns, j, q))
        j += 4
    while j < end:
        accumulate(dw, j, correlate(spec, 1, tile, columns, j, q))
        j += 1


def correlate_rows(spec, job, k, x_tile, first, last, q):
    """dw += G and d_dendrite_bias += G0 of dendrites [first, last) for tile k with its x at x_tile.

    q: scratch for the vectors of a strip.
    """
    raise NotImplementedError


@overload(correlate_rows, jit_options=OPTIONS)
def _choose_correlate_rows(spec, job, k, x_tile, first, last, q):
    return (correlate_strips if spec.spec.linear else correlate_somas).py_func


@kernel
def correlate_strips(spec, job, k, x_tile, first, last, q):
    lanes = lanes_of(spec)
    for strip in range(first, last, STRIP):
        stop = min(last, strip + STRIP)
        fill_q(spec, job, (job.first_tile + k) * lanes, 0, strip, stop, q, job.d_dendrite_bias)
        for r in range(strip, stop):
            correlate_row(spec, job, x_tile, r, vload(spec, q, (r - strip) * lanes))


@kernel
def correlate_somas(spec, job, k, x_tile, first, last, q):  # its q never leave the registers
    lanes, soma_ptr = lanes_of(spec), job.soma_ptr
    grads = job.grad_tiles + size_of(spec) * k * lanes * job.somas
    slope = splat(spec, element(spec, job.slope))
    low, high = sign_pair(job, (job.first_tile + k) * lanes)
    s, r = soma_of(soma_ptr, job.somas, first), first
    while r < last:
        on = vload(spec, grads, s * lanes)
        off = multiply(slope, on)
        end = min(last, load_int32(soma_ptr, s + 1))
        while r < end:
            x = select_signs(low, high, r, on, off)
            g0 = load(spec, job.d_dendrite_bias, r) + total(x)
            store(spec, job.d_dendrite_bias, r, g0)
            correlate_row(spec, job, x_tile, r, x)
            r += 1
        s += 1
