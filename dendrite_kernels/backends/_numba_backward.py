"""Backward kernels for Numba. Read `_numba_kernels.py` first.

With q[r] the gradient at the sum of dendrite r times its slope (a `Vector`, from grad, y and one
sign bit), G = <q, x> per synapse and G0 = sum of q give every weight's gradient, and the sum of
w * c * q over a column's synapses gives dx (design: "the identity that makes training cheap").

With dx, threads work on blocks of dendrites: the q of a block stay in cache while its columns are
visited once each, every q read serving dx and G. Threads get their own sums of dx (or of G), added
in a fixed order afterwards. Without dx, rows are visited as they are stored and no sum is shared.
"""

from __future__ import annotations

import numba

from ._numba_kernels import (
    inline, kernel, load_or_zero, load_tile, sign_words, store_tile,
)  # fmt: skip
from ._numba_vector import (
    accumulate, add, correlate, element, gather, is_linear, lanes_of, load, load_column, load_int32,
    load_int64, load_uint16, multiply, multiply_add, narrow, prefetch, register_of, select_signs,
    size_of, splat, store, total, vload, vstore,
)  # fmt: skip

AHEAD = 3  # columns between the one in work and the one prefetched
STRIP = 64  # columns of dx summed before they are written out, rows finished at a time


@kernel
def zero(spec, address, count):
    """address[:count] = 0."""
    for i in range(count):
        store(spec, address, i, element(spec, 0.0))


@inline
def share(count, width, task, tasks):
    """The task's part of range(count), in multiples of `width` but for the end of the last one."""
    units = max(1, count // width)
    first, last = units * task // tasks, units * (task + 1) // tasks
    return first * width, count if last == units else last * width


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


# --- first phase: transposed tiles of x and of the gradient at the somas ---


def prepare_tasks(spec):
    """A share of the columns of every x tile; a share of the somas of every gradient tile, and
    their sums over the batch.
    """

    def entry(begin_task, end_task, jobs):
        job = numba.carray(jobs, 1)[0]
        for task in range(begin_task, end_task):
            lanes, width, size = lanes_of(spec), register_of(spec), size_of(spec)
            slope = element(spec, job.slope)
            begin, end = share(job.features, width, task, job.tasks)
            first, last = share(job.somas, width, task, job.tasks)
            if job.accumulate == 0:
                zero(spec, job.d_soma_bias + size * first, last - first)
            for k in range(job.tiles):
                sample = (job.first_tile + k) * lanes
                samples = min(lanes, job.samples - sample)
                x, n = job.x + size * sample * job.features, job.features
                tile = job.x_tiles + size * k * lanes * n
                if begin < end:
                    load_tile(spec, x, None, slope, n, samples, begin, end, tile)
                n = job.somas
                grad, y = job.grad + size * sample * n, job.y + size * sample * n
                tile = job.grad_tiles + size * k * lanes * n
                if first < last:
                    if is_linear(spec):
                        load_tile(spec, grad, None, slope, n, samples, first, last, tile)
                    else:
                        load_tile(spec, grad, y, slope, n, samples, first, last, tile)
                for s in range(first, last):
                    before = load(spec, job.d_soma_bias, s)
                    store(spec, job.d_soma_bias, s, before + total(vload(spec, tile, s * lanes)))

    return entry


# --- second phase with dx: blocks of dendrites, column by column ---


@kernel
def weigh_slots(spec, job, block, first, last, weights):
    """weights[slot] = w * c of the block's synapses, 0 in pads."""
    crow, slot, weight, cable = job.crow, job.slot, job.weight, job.cable
    begin = load_int64(job.slot_ptr, block)
    zero(spec, weights, load_int64(job.slot_ptr, block + 1) - begin)
    for r in range(first, last):
        c = element(spec, 1.0) if is_linear(spec) else load(spec, cable, r)
        for j in range(load_int32(crow, r), load_int32(crow, r + 1)):
            store(spec, weights, load_int32(slot, j), c * load(spec, weight, j))


@kernel
def fill_q(spec, job, k, first, last, q, row_sums):
    """q[r - first] of dendrites [first, last) for tile k; row_sums[r] += its sum."""
    lanes, size, soma_ptr = lanes_of(spec), size_of(spec), job.soma_ptr
    grads = job.grad_tiles + size * k * lanes * job.somas
    slope = splat(spec, element(spec, job.slope))
    low, high = sign_pair(spec, job, k)
    s, r = soma_of(soma_ptr, job.somas, first), first
    while r < last:
        on = vload(spec, grads, s * lanes)
        off = multiply(slope, on)
        end = min(last, load_int32(soma_ptr, s + 1))
        while r < end:
            x = select_signs(low, high, r, on, off)
            vstore(q, (r - first) * lanes, x)
            store(spec, row_sums, r, load(spec, row_sums, r) + total(x))
            r += 1
        s += 1


@inline
def sign_pair(spec, job, k):
    """Addresses of the sign words of tile k's samples below 32 and from 32 on."""
    sample = (job.first_tile + k) * lanes_of(spec)
    low = sign_words(job, sample)
    # Beyond the batch there are no words to read, and no gradient for them to change.
    return low, sign_words(job, sample + 32) if sample + 32 < job.samples else low


@kernel
def gather_block(spec, job, block, q, weights, x_tile, dx_tile, sums):
    """dx_tile[n] += sum of w * c * q over the block's synapses of column n; sums[slot] += G."""
    lanes, column, groups, group = lanes_of(spec), job.column, job.groups, job.group
    rows = job.row + 2 * load_int64(job.slot_ptr, block)
    last = load_int64(job.column_ptr, block + 1)
    j = 0
    for i in range(load_int64(job.column_ptr, block), last):
        n = load_column(spec, column, i) * lanes
        ahead = load_column(spec, column, min(i + AHEAD, last - 1)) * lanes
        prefetch(spec, x_tile, ahead)
        prefetch(spec, dx_tile, ahead)
        x, dx = vload(spec, x_tile, n), vload(spec, dx_tile, n)
        end = j + group * load_uint16(groups, i)
        while j + 4 <= end:
            dx, dots = gather(spec, 4, q, rows, weights, j, x, dx)
            accumulate(sums, j, dots)
            j += 4
        while j < end:
            dx, dot = gather(spec, 1, q, rows, weights, j, x, dx)
            accumulate(sums, j, dot)
            j += 1
        vstore(dx_tile, n, dx)


def gather_tasks(spec):
    """A group of tiles times a group of blocks: own sums of dx per group of blocks, own sums of G
    per group of tiles. Workspace per task: weights of a block's slots, then a tile of its q.
    """

    def entry(begin_task, end_task, jobs):
        job = numba.carray(jobs, 1)[0]
        for task in range(begin_task, end_task):
            lanes, size = lanes_of(spec), size_of(spec)
            tile_group = task // job.block_groups
            block_group = task - tile_group * job.block_groups
            first_tile = job.tiles * tile_group // job.tile_groups
            last_tile = job.tiles * (tile_group + 1) // job.tile_groups
            first_block = job.blocks * block_group // job.block_groups
            last_block = job.blocks * (block_group + 1) // job.block_groups
            weights = job.workspace + task * job.workspace_stride
            q = weights + size * job.block_slots
            tile_size, grad_size = size * lanes * job.features, size * lanes * job.somas
            dx = job.dx_tiles + tile_size * job.tiles * block_group
            row_sums = job.row_sums + size * job.rows * tile_group
            zero(spec, dx + tile_size * first_tile, (last_tile - first_tile) * lanes * job.features)
            for block in range(first_block, last_block):
                first = block * job.block_rows
                last = min(job.rows, first + job.block_rows)
                begin, end = load_int64(job.slot_ptr, block), load_int64(job.slot_ptr, block + 1)
                sums = job.sums + size * (job.slots * tile_group + begin)
                weigh_slots(spec, job, block, first, last, weights)
                if job.accumulate == 0:
                    zero(spec, sums, end - begin)
                    zero(spec, row_sums + size * first, last - first)
                for k in range(first_tile, last_tile):
                    if is_linear(spec):
                        q = job.grad_tiles + grad_size * k + size * lanes * first
                    else:
                        fill_q(spec, job, k, first, last, q, row_sums)
                    x_tile, dx_tile = job.x_tiles + tile_size * k, dx + tile_size * k
                    gather_block(spec, job, block, q, weights, x_tile, dx_tile, sums)
                if job.finish != 0:
                    collect_rows(spec, job, block, first, last)

    return entry


@kernel
def collect_rows(spec, job, block, first, last):
    """Gradients of all weights of dendrites [first, last) of one block from the tile groups'
    sums.
    """
    size = size_of(spec)
    crow, slot, dw, groups = job.crow, job.slot, job.dw, job.tile_groups
    stride = size * job.slots
    sums = job.sums + size * load_int64(job.slot_ptr, block)
    for strip in range(first, last, STRIP):
        stop = min(last, strip + STRIP)
        for j in range(load_int32(crow, strip), load_int32(crow, stop)):
            place = load_int32(slot, j)
            value = load(spec, sums, place)
            for t in range(1, groups):
                value += load(spec, sums + t * stride, place)
            store(spec, dw, j, value)
        if not is_linear(spec):
            for r in range(strip, stop):
                value = load(spec, job.row_sums, r)
                for t in range(1, groups):
                    value += load(spec, job.row_sums, t * job.rows + r)
                store(spec, job.d_dendrite_bias, r, value)
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
        cs, dots = splat(one, c), splat(one, element(spec, 0.0))
        dot = load_or_zero(spec, bias, r) * g0
        j, end = load_int32(crow, r), load_int32(crow, r + 1)
        while j + width <= end:
            g = vload(one, dw, j)
            dots = multiply_add(vload(one, weight, j), g, dots)
            vstore(dw, j, multiply(cs, g))
            j += width
        while j < end:
            value = load(spec, dw, j)
            dot += load(spec, weight, j) * value
            store(spec, dw, j, c * value)
            j += 1
        store(spec, d_cable, r, dot + total(dots))
        store(spec, d_bias, r, c * g0)


# --- second phase without dx: rows as they are stored ---


@kernel
def row_at(crow, rows, task, tasks):
    """First dendrite of the task's share, when each costs its synapses and a little more."""
    target = (load_int32(crow, rows) + 4 * rows) * task // tasks
    low, high = 0, rows
    while low < high:
        middle = (low + high) // 2
        if load_int32(crow, middle) + 4 * middle < target:
            low = middle + 1
        else:
            high = middle
    return low


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


@kernel
def correlate_rows(spec, job, k, first, last):
    """dw += G and d_dendrite_bias += G0 of dendrites [first, last) for tile k."""
    lanes, size, soma_ptr = lanes_of(spec), size_of(spec), job.soma_ptr
    tile = job.x_tiles + size * k * lanes * job.features
    grads = job.grad_tiles + size * k * lanes * job.somas
    if is_linear(spec):
        for r in range(first, last):
            correlate_row(spec, job, tile, r, vload(spec, grads, r * lanes))
        return
    slope = splat(spec, element(spec, job.slope))
    low, high = sign_pair(spec, job, k)
    s, r = soma_of(soma_ptr, job.somas, first), first
    while r < last:
        on = vload(spec, grads, s * lanes)
        off = multiply(slope, on)
        end = min(last, load_int32(soma_ptr, s + 1))
        while r < end:
            q = select_signs(low, high, r, on, off)
            g0 = load(spec, job.d_dendrite_bias, r) + total(q)
            store(spec, job.d_dendrite_bias, r, g0)
            correlate_row(spec, job, tile, r, q)
            r += 1
        s += 1


def rows_tasks(spec):
    """All tiles for a share of the dendrites, in blocks whose sums stay in cache."""

    def entry(begin_task, end_task, jobs):
        job = numba.carray(jobs, 1)[0]
        for task in range(begin_task, end_task):
            size, crow = size_of(spec), job.crow
            end = job.rows if task + 1 == job.tasks else row_at(crow, job.rows, task + 1, job.tasks)
            for first in range(row_at(crow, job.rows, task, job.tasks), end, job.block_rows):
                last = min(end, first + job.block_rows)
                if job.accumulate == 0:
                    j = load_int32(crow, first)
                    zero(spec, job.dw + size * j, load_int32(crow, last) - j)
                    if not is_linear(spec):
                        zero(spec, job.d_dendrite_bias + size * first, last - first)
                for k in range(job.tiles):
                    correlate_rows(spec, job, k, first, last)
                if job.finish != 0 and not is_linear(spec):
                    finish_rows(spec, job, first, last)

    return entry


# --- third phase, with dx ---


def output_tasks(spec):
    """A share of the columns of dx: add the block groups' sums and write them out."""

    def entry(begin_task, end_task, jobs):
        job = numba.carray(jobs, 1)[0]
        for task in range(begin_task, end_task):
            lanes, width, size = lanes_of(spec), register_of(spec), size_of(spec)
            spare = job.workspace + task * job.workspace_stride
            stride = lanes * job.features
            begin, end = share(job.features, width, task, job.tasks)
            for k in range(job.tiles):
                sample = (job.first_tile + k) * lanes
                samples = min(lanes, job.samples - sample)
                tile = job.dx_tiles + size * stride * k
                start = begin
                while start < end:
                    stop = start + STRIP if end - start >= 2 * STRIP else end
                    for n in range(start, stop):
                        value = vload(spec, tile, n * lanes)
                        for t in range(1, job.block_groups):
                            value = add(
                                value, vload(spec, tile, t * stride * job.tiles + n * lanes)
                            )
                        vstore(tile, n * lanes, value)
                    dx = job.dx + size * (sample * job.features + start)
                    source = tile + size * start * lanes
                    store_tile(spec, source, stop - start, dx, job.features, samples, spare)
                    start = stop

    return entry


def collect_tasks(spec):
    """The gradients of the weights of a share of the dendrites, from the sums of all tile groups,
    where `gather_task` could not see them all.
    """

    def entry(begin_task, end_task, jobs):
        job = numba.carray(jobs, 1)[0]
        for task in range(begin_task, end_task):
            first = job.rows * task // job.tasks
            last = job.rows * (task + 1) // job.tasks
            while first < last:
                block = first // job.block_rows
                stop = min(last, (block + 1) * job.block_rows)
                collect_rows(spec, job, block, first, stop)
                first = stop

    return entry
