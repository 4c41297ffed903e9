"""The tasks of a call: which part of a job each does, on which memory.

`..._tasks(spec)` makes the Python source of a native function `entry(begin, end, job)`, which does
tasks [begin, end) of `job.tasks`. Tasks of one phase never wait for each other and write to
different places; what they sum is added up in a fixed order in a later phase. So results do not
depend on which thread does what, only on the number of tasks.
"""

from __future__ import annotations

import numba

from ._numba_backward import (
    STRIP,
    collect_rows,
    correlate_rows,
    fill_q,
    finish_rows,
    gather_block,
    load_gradients,
    weigh_slots,
)
from ._numba_kernels import CHUNK, inline, kernel, load_tile, outputs, sign_words, store_tile
from ._numba_operations import (
    add,
    clear,
    element,
    is_linear,
    lanes_of,
    load,
    load_int32,
    load_int64,
    register_of,
    size_of,
    store,
    vload,
    vstore,
)


@inline
def share(count, width, task, tasks):
    """The task's part of range(count), in multiples of `width` but for the end of the last one."""
    units = max(1, count // width)
    first, last = units * task // tasks, units * (task + 1) // tasks
    return first * width, count if last == units else last * width


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


def forward_tasks(spec):
    """y (and signs) of an equal share of all (tile, chunk of somas) pairs.

    Workspace per task: a tile of inputs, then 2 * CHUNK vectors of outputs, then a spare one.
    """

    def entry(begin_task, end_task, jobs):
        job = numba.carray(jobs, 1)[0]
        lanes, size, n = lanes_of(spec), size_of(spec), job.features
        chunks = max(1, job.somas // CHUNK)  # the last one takes what remains
        for task in range(begin_task, end_task):
            tile = job.workspace + task * job.workspace_stride
            out = tile + size * lanes * n
            spare = out + size * lanes * 2 * CHUNK
            loaded = -1
            begin = job.tiles * chunks * task // job.tasks
            for unit in range(begin, job.tiles * chunks * (task + 1) // job.tasks):
                k = unit // chunks
                sample = k * lanes
                samples = min(lanes, job.samples - sample)
                if k != loaded:
                    x = job.x + size * sample * n
                    load_tile(spec, x, None, element(spec, 1.0), n, samples, 0, n, tile)
                    loaded = k
                first = (unit - k * chunks) * CHUNK
                last = first + CHUNK if unit + 1 - k * chunks < chunks else job.somas
                outputs(spec, job, tile, sign_words(job, sample), first, last, out)
                y = job.y + size * (sample * job.somas + first)
                store_tile(spec, out, last - first, y, job.somas, samples, spare)

    return entry


# --- backward: first phase of a pass over some tiles ---


def prepare_tasks(spec):
    """A share of the columns of every x tile, unless tasks have their own, and of the somas of
    every gradient tile. Before the first tile, if asked for, the weights of a share of the blocks.
    """

    def entry(begin_task, end_task, jobs):
        job = numba.carray(jobs, 1)[0]
        lanes, width, size, n = lanes_of(spec), register_of(spec), size_of(spec), job.features
        for task in range(begin_task, end_task):
            begin, end = share(n, width, task, job.tasks)
            first, last = share(job.somas, width, task, job.tasks)
            if job.accumulate == 0 and not is_linear(spec):
                clear(spec, job.d_soma_bias, first, last)
            if job.accumulate == 0 and job.weigh_first != 0:
                first_block, last_block = share(job.blocks, 1, task, job.tasks)
                products = job.workspace + task * job.workspace_stride
                for block in range(first_block, last_block):
                    weigh_slots(spec, job, block, products)
            for k in range(job.tiles):
                sample = (job.first_tile + k) * lanes
                samples = min(lanes, job.samples - sample)
                if begin < end and job.own_x == 0:
                    x, tile = job.x + size * sample * n, job.x_tiles + size * k * lanes * n
                    load_tile(spec, x, None, element(spec, 1.0), n, samples, begin, end, tile)
                if first < last and not is_linear(spec):
                    tile = job.grad_tiles + size * k * lanes * job.somas
                    load_gradients(spec, job, sample, first, last, tile, job.d_soma_bias)

    return entry


# --- backward without dx: second and last phase ---


def rows_tasks(spec):
    """All tiles for a share of the dendrites, in blocks whose sums stay in cache, pass by pass over
    tiles that do too.

    Workspace per task: the q of a strip.
    """

    def entry(begin_task, end_task, jobs):
        job = numba.carray(jobs, 1)[0]
        lanes, size, n, crow = lanes_of(spec), size_of(spec), job.features, job.crow
        tile_size = size * lanes * n
        for task in range(begin_task, end_task):
            q = job.workspace + task * job.workspace_stride
            x_tiles = job.x_tiles
            if job.own_x != 0:
                x_tiles += tile_size * job.tiles * task
                for k in range(job.tiles):
                    sample = (job.first_tile + k) * lanes
                    samples = min(lanes, job.samples - sample)
                    x, tile = job.x + size * sample * n, x_tiles + tile_size * k
                    load_tile(spec, x, None, element(spec, 1.0), n, samples, 0, n, tile)
            begin = row_at(crow, job.rows, task, job.tasks)
            end = job.rows if task + 1 == job.tasks else row_at(crow, job.rows, task + 1, job.tasks)
            for start in range(0, job.tiles, job.pass_tiles):
                stop = min(job.tiles, start + job.pass_tiles)
                for first in range(begin, end, job.block_rows):
                    last = min(end, first + job.block_rows)
                    if job.accumulate == 0 and start == 0:
                        clear(spec, job.dw, load_int32(crow, first), load_int32(crow, last))
                        clear(spec, job.d_dendrite_bias, first, last)
                    for k in range(start, stop):
                        correlate_rows(spec, job, k, x_tiles + tile_size * k, first, last, q)
                    if job.finish != 0 and stop == job.tiles and not is_linear(spec):
                        finish_rows(spec, job, first, last)

    return entry


# --- backward with dx, a few tiles: threads own blocks of dendrites (and groups of tiles) ---


@kernel
def gather_tiles(spec, job, tile_group, block_group, block, fresh, tiles, q):
    """One block of a group of blocks on the tiles [begin, end) = `tiles` of a group of tiles; q:
    scratch. fresh: these tiles' dx hold nothing yet.
    """
    lanes, size = lanes_of(spec), size_of(spec)
    tile_size, grad_size = size * lanes * job.features, size * lanes * job.somas
    first = block * job.block_rows
    last = min(job.rows, first + job.block_rows)
    dx_tiles = job.dx_tiles + tile_size * job.tiles * block_group
    row_sums = job.row_sums + size * job.rows * tile_group
    begin = load_int64(job.slot_ptr, block)
    sums, weights = job.sums + size * (job.slots * tile_group + begin), job.weights + size * begin
    for k in range(*tiles):
        sample, grads = (job.first_tile + k) * lanes, job.grad_tiles + grad_size * k
        fill_q(spec, job, sample, grads, first, last, q, row_sums)
        x, dx = job.x_tiles + tile_size * k, dx_tiles + tile_size * k
        gather_block(spec, job, block, q, weights, x, dx, sums, fresh)


@kernel
def clear_sums(spec, job, tile_group, block):
    """The sums of a block on a group of tiles, before their first tile."""
    begin, end = load_int64(job.slot_ptr, block), load_int64(job.slot_ptr, block + 1)
    first = block * job.block_rows
    last = min(job.rows, first + job.block_rows)
    clear(spec, job.sums, job.slots * tile_group + begin, job.slots * tile_group + end)
    clear(spec, job.row_sums, job.rows * tile_group + first, job.rows * tile_group + last)


def gather_tasks(spec):
    """A group of tiles times a group of blocks: own sums of dx per group of blocks, own sums of G
    per group of tiles; pass by pass over tiles that stay in cache, block by block.

    Workspace per task: the q of a block.
    """

    def entry(begin_task, end_task, jobs):
        job = numba.carray(jobs, 1)[0]
        for task in range(begin_task, end_task):
            q = job.workspace + task * job.workspace_stride
            tile_group = task // job.block_groups
            block_group = task - tile_group * job.block_groups
            first_tile = job.tiles * tile_group // job.tile_groups
            last_tile = job.tiles * (tile_group + 1) // job.tile_groups
            first_block = job.blocks * block_group // job.block_groups
            last_block = job.blocks * (block_group + 1) // job.block_groups
            for start in range(first_tile, last_tile, job.pass_tiles):
                stop = min(last_tile, start + job.pass_tiles)
                for block in range(first_block, last_block):
                    if job.accumulate == 0 and start == first_tile:
                        clear_sums(spec, job, tile_group, block)
                        if job.weigh_first == 0:
                            weigh_slots(spec, job, block, q)
                    fresh, tiles = block == first_block, (start, stop)
                    gather_tiles(spec, job, tile_group, block_group, block, fresh, tiles, q)
                    if job.finish != 0 and stop == last_tile:
                        first = block * job.block_rows
                        last = min(job.rows, first + job.block_rows)
                        collect_rows(spec, job, block, first, last)

    return entry


def output_tasks(spec):
    """A share of the columns of dx: add the sums of the groups of blocks and write them out."""

    def entry(begin_task, end_task, jobs):
        job = numba.carray(jobs, 1)[0]
        lanes, size, n = lanes_of(spec), size_of(spec), job.features
        for task in range(begin_task, end_task):
            spare = job.workspace + task * job.workspace_stride
            begin, end = share(n, register_of(spec), task, job.tasks)
            for k in range(job.tiles):
                sample = (job.first_tile + k) * lanes
                samples = min(lanes, job.samples - sample)
                tile = job.dx_tiles + size * lanes * n * k
                start = begin
                while start < end:  # strip by strip: added values are still in L1 when written
                    stop = start + STRIP if end - start >= 2 * STRIP else end
                    for i in range(start * lanes, stop * lanes, lanes):
                        value = vload(spec, tile, i)
                        for t in range(1, job.block_groups):
                            value = add(value, vload(spec, tile, t * lanes * n * job.tiles + i))
                        vstore(tile, i, value)
                    dx, source = job.dx + size * (sample * n + start), tile + size * start * lanes
                    store_tile(spec, source, stop - start, dx, n, samples, spare)
                    start = stop

    return entry


# --- backward with dx, many tiles: threads own tiles, from x to dx in one go ---


def tiles_tasks(spec):
    """dx of a share of the tiles; own sums of G, G0 and of the gradients at the somas.

    Workspace per task: a tile of x, of dx, of gradients at the somas, and of the q of a block.
    """

    def entry(begin_task, end_task, jobs):
        job = numba.carray(jobs, 1)[0]
        lanes, size, n = lanes_of(spec), size_of(spec), job.features
        for task in range(begin_task, end_task):
            x_tile = job.workspace + task * job.workspace_stride
            dx_tile = x_tile + size * lanes * n
            grads = dx_tile + size * lanes * n
            q = grads + size * lanes * job.somas
            sums = job.sums + size * job.slots * task
            row_sums = job.row_sums + size * job.rows * task
            soma_sums = job.soma_sums + size * job.somas * task
            clear(spec, sums, 0, job.slots)
            clear(spec, row_sums, 0, job.rows)
            clear(spec, soma_sums, 0, job.somas)
            for k in range(job.tiles * task // job.tasks, job.tiles * (task + 1) // job.tasks):
                sample = k * lanes
                samples = min(lanes, job.samples - sample)
                x, dx = job.x + size * sample * n, job.dx + size * sample * n
                load_tile(spec, x, None, element(spec, 1.0), n, samples, 0, n, x_tile)
                if not is_linear(spec):
                    load_gradients(spec, job, sample, 0, job.somas, grads, soma_sums)
                for block in range(job.blocks):
                    first = block * job.block_rows
                    last = min(job.rows, first + job.block_rows)
                    offset = size * load_int64(job.slot_ptr, block)
                    fill_q(spec, job, sample, grads, first, last, q, row_sums)
                    weights, own = job.weights + offset, sums + offset
                    fresh = block == 0
                    gather_block(spec, job, block, q, weights, x_tile, dx_tile, own, fresh)
                store_tile(spec, dx_tile, n, dx, n, samples, q)

    return entry


def collect_tasks(spec):
    """The gradients of the weights of a share of the dendrites and somas, from the sums of all
    groups of tiles, where no earlier phase could see them all.
    """

    def entry(begin_task, end_task, jobs):
        job = numba.carray(jobs, 1)[0]
        for task in range(begin_task, end_task):
            first, last = job.rows * task // job.tasks, job.rows * (task + 1) // job.tasks
            while first < last:
                block = first // job.block_rows
                stop = min(last, (block + 1) * job.block_rows)
                collect_rows(spec, job, block, first, stop)
                first = stop
            if job.soma_sums != 0:
                last = job.somas * (task + 1) // job.tasks
                for s in range(job.somas * task // job.tasks, last):
                    value = load(spec, job.soma_sums, s)
                    for t in range(1, job.tile_groups):
                        value += load(spec, job.soma_sums, t * job.somas + s)
                    store(spec, job.d_soma_bias, s, value)

    return entry
