"""The tasks of a call: which part of a job each does, on which memory; compiled at first use.

`..._tasks(spec)` makes the Python source of a native function `entry(begin, end, job)`, which does
tasks [begin, end) of `job.tasks`. Tasks of one phase never wait for each other and write to
different places; what they sum is added up in a fixed order in a later phase. So results do not
depend on which thread does what, only on the number of tasks.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numba
from numba.core import types

from .kernels import (
    CHUNK,
    JOB,
    STRIP,
    collect_rows,
    correlate_rows,
    fill_q,
    finish_rows,
    gather_block,
    inline,
    kernel,
    load_gradients,
    load_tile,
    outputs,
    sign_words,
    store_tile,
    weigh_slots,
)
from .vectors import (
    Spec,
    add,
    clear,
    element,
    is_linear,
    lanes_of,
    load_int32,
    load_int64,
    register_of,
    size_of,
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
    every gradient tile.
    """

    def entry(begin_task, end_task, jobs):
        job = numba.carray(jobs, 1)[0]
        lanes, width, size, n = lanes_of(spec), register_of(spec), size_of(spec), job.features
        for task in range(begin_task, end_task):
            begin, end = share(n, width, task, job.tasks)
            first, last = share(job.somas, width, task, job.tasks)
            if job.accumulate == 0 and not is_linear(spec):
                clear(spec, job.d_soma_bias, first, last)
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


# --- backward with dx: threads own groups of blocks of dendrites ---


@kernel
def gather_tiles(spec, job, group, block, fresh, tiles, q):
    """One block of a group on the tiles [begin, end) = `tiles`; q: scratch. fresh: these tiles' dx
    hold nothing yet.
    """
    lanes, size = lanes_of(spec), size_of(spec)
    tile_size, grad_size = size * lanes * job.features, size * lanes * job.somas
    first = block * job.block_rows
    last = min(job.rows, first + job.block_rows)
    dx_tiles = job.dx_tiles + tile_size * job.tiles * group
    offset = size * load_int64(job.slot_ptr, block)
    sums, weights = job.sums + offset, job.weights + offset
    for k in range(*tiles):
        sample, grads = (job.first_tile + k) * lanes, job.grad_tiles + grad_size * k
        fill_q(spec, job, sample, grads, first, last, q, job.row_sums)
        x, dx = job.x_tiles + tile_size * k, dx_tiles + tile_size * k
        gather_block(spec, job, block, q, weights, x, dx, sums, fresh)


@kernel
def begin_block(spec, job, block, products):
    """The sums of a block before its first tile, and its weights; products: scratch."""
    first = block * job.block_rows
    clear(spec, job.sums, load_int64(job.slot_ptr, block), load_int64(job.slot_ptr, block + 1))
    clear(spec, job.row_sums, first, min(job.rows, first + job.block_rows))
    weigh_slots(spec, job, block, products)


def gather_tasks(spec):
    """Groups of blocks: own sums of dx per group; pass by pass over tiles that stay in cache, block
    by block.

    Workspace per task: the q of a block.
    """

    def entry(begin_task, end_task, jobs):
        job = numba.carray(jobs, 1)[0]
        for group in range(begin_task, end_task):
            q = job.workspace + group * job.workspace_stride
            first_block = job.blocks * group // job.block_groups
            last_block = job.blocks * (group + 1) // job.block_groups
            for start in range(0, job.tiles, job.pass_tiles):
                stop = min(job.tiles, start + job.pass_tiles)
                for block in range(first_block, last_block):
                    if job.accumulate == 0 and start == 0:
                        begin_block(spec, job, block, q)
                    gather_tiles(spec, job, group, block, block == first_block, (start, stop), q)
                    if job.finish != 0 and stop == job.tiles:
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


# --- from Python source to machine code that torch's thread pool can call ---

_SIGNATURE = types.void(types.int64, types.int64, JOB)
_compiled: dict[tuple[str, Spec], Any] = {}
_lock = threading.Lock()
_uncached: str | None = None  # why compiled code is not kept on disk, None as long as it is


def address(task: str, spec: Spec) -> int:
    """Of the native function that does tasks [begin, end) of a job; compiled at the first call."""
    key = task, spec
    if key not in _compiled:
        with _lock:
            if key not in _compiled:
                # Numba's cache tells entries apart by their code and what they close over: spec.
                make = globals()[f"{task}_tasks"]
                _compiled[key] = compiled(make(replace(spec, build=_fingerprint())), _SIGNATURE)
    function: int = _compiled[key].address
    return function


def cache_state() -> str:
    """Whether compiled code is kept for later processes."""
    return "on" if _uncached is None else f"off: {_uncached}"


def compiled(entry: Callable[..., Any], signature: Any) -> Any:
    """Load from Numba's cache or compile; without the cache where that cannot be had: a read-only
    installation and an unwritable home, a full disk, a damaged file.
    """
    global _uncached
    options = {"boundscheck": False, "error_model": "numpy"}
    if _uncached is None:
        try:
            return numba.cfunc(signature, cache=True, **options)(entry)
        except Exception as error:
            _uncached = f"{type(error).__name__}: {error}"
    return numba.cfunc(signature, **options)(entry)


@functools.cache
def _fingerprint() -> str:
    """Of the sources: Numba's cache looks only at the file of the outermost function."""
    folder = Path(__file__).parent
    digest = hashlib.blake2b(digest_size=8)
    for name in ("vectors.py", "kernels.py", "tasks.py"):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()
