"""Backward kernels for Numba. Read `_numba_kernels.py` first.

With q[r] the gradient at the sum of dendrite r times its slope (a `Vector`, from grad, y and one
sign bit), G = <q, x> per synapse and G0 = sum of q give every weight's gradient, and the sum of
w * c * q over a column's synapses gives dx (design: "the identity that makes training cheap").

With dx, work goes by blocks of dendrites: the q of a block stay in cache while its columns are
visited once each, every q read serving dx and G, which is kept in the order of the plan's slots.
Without dx, dendrites are visited as they are stored.
"""

from __future__ import annotations

from numba.extending import overload

from ._numba_kernels import (
    CHAIN,
    OPTIONS,
    inline,
    kernel,
    load_or_zero,
    load_tile,
    sign_words,
)
from ._numba_operations import (
    accumulate,
    add,
    clear,
    correlate,
    element,
    gather,
    is_linear,
    lanes_of,
    load,
    load_column,
    load_int32,
    load_int64,
    load_uint16,
    multiply,
    multiply_add,
    narrow,
    prefetch,
    register_of,
    select_signs,
    size_of,
    splat,
    store,
    total,
    vload,
    vstore,
)

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
    """Gradients of the weights of dendrites [first, last) of one block, from the sums of all
    groups of tiles.
    """
    size = size_of(spec)
    crow, slot, dw, groups = job.crow, job.slot, job.dw, job.tile_groups
    stride = size * job.slots
    sums = job.sums + size * load_int64(job.slot_ptr, block)
    for strip in range(first, last, STRIP):
        stop = min(last, strip + STRIP)
        begin, end = load_int32(crow, strip), load_int32(crow, stop)
        for j in range(begin, end):
            store(spec, dw, j, load(spec, sums, load_slot(job, slot, j)))
        for t in range(1, groups):
            for j in range(begin, end):
                value = load(spec, sums + t * stride, load_slot(job, slot, j))
                store(spec, dw, j, load(spec, dw, j) + value)
        for r in range(strip, stop):
            value = load(spec, job.row_sums, r)
            for t in range(1, groups):
                value += load(spec, job.row_sums, t * job.rows + r)
            store(spec, job.d_dendrite_bias, r, value)
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
