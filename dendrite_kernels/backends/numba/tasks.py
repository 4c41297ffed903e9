"""The tasks of a call: which part of a job each does, on which memory; compiled at first use.

`..._tasks(spec)` makes the Python source of a native function `entry(begin, end, job)`, which does
tasks [begin, end) of `job.tasks`. Tasks of one phase never wait for each other and write to
different places; what they sum is added up in a fixed order in a later phase. So results do not
depend on which thread does what, only on the number of tasks.
"""

# ruff: noqa: I001  (one name per line would hide the code)
from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numba
from numba import carray  # type: ignore[attr-defined]
from numba.core import types

from .kernels import (
    CHUNK, JOB, OPTIONS, STRIP, collect_rows, first_of, forward_rows, forward_somas, gather_blocks,
    inline, kernel, load_gradients, load_tile, store_tile, summed, take_q, weigh_slots,
)  # fmt: skip
from .vectors import (
    Spec, add, clear, lanes_of, load_int32, load_int64, size_of, store, vload, width_of,
)  # fmt: skip


@inline
def share(count, width, task, tasks):
    """The task's part of range(count), in multiples of `width` but for the end of the last one."""
    units = max(1, count // width)
    first, last = units * task // tasks, units * (task + 1) // tasks
    return first * width, count if last == units else last * width


@inline
def row_at(job, task, tasks):
    """First dendrite of the task's share, when each costs its synapses and a little more."""
    total = load_int32(job.crow, job.rows) + 4 * job.rows
    return first_of(job.crow, job.rows, 4, total * task // tasks)


def forward_tasks(spec):
    """y (and signs) of an equal share of all (tile, chunk of somas) pairs.

    Workspace per task: a tile of inputs, then 2 * CHUNK vectors of outputs.
    """
    linear = spec.linear

    def entry(begin_task, end_task, jobs):
        job = carray(jobs, 1)[0]
        lanes, size, n = lanes_of(spec), size_of(spec), job.features
        chunks = max(1, job.somas // CHUNK)  # the last one takes what remains
        for task in range(begin_task, end_task):
            tile = job.workspace + task * job.workspace_stride
            out = tile + size * lanes * n
            loaded = -1
            for unit in range(*share(job.tiles * chunks, 1, task, job.tasks)):
                k = unit // chunks
                sample = k * lanes
                samples = min(lanes, job.samples - sample)
                if k != loaded:
                    load_tile(spec, job.x + size * sample * n, n, samples, 0, n, tile)
                    loaded = k
                first = (unit - k * chunks) * CHUNK
                last = first + CHUNK if unit + 1 - k * chunks < chunks else job.somas
                if linear:
                    forward_rows(spec, job, tile, first, last, out)
                else:
                    forward_somas(spec, job, tile, sample, first, last, out)
                y = job.y + size * (sample * job.somas + first)
                store_tile(spec, out, last - first, y, job.somas, samples)

    return entry


# --- backward: threads own parts of the batch and, where these are few, groups of dendrites ---


def prepare_tasks(spec):
    """With dx, first: w * c of a share of the blocks, in the order of their slots, and where groups
    share x, its tiles for a share of the columns.
    """

    def entry(begin_task, end_task, jobs):
        job = carray(jobs, 1)[0]
        lanes, size, n = lanes_of(spec), size_of(spec), job.features
        for task in range(begin_task, end_task):
            products = job.workspace + task * job.workspace_stride
            for block in range(*share(job.blocks, 1, task, job.tasks)):
                weigh_slots(spec, job, block, products)
            begin, end = share(n, width_of(spec), task, job.tasks)
            for k in range(job.tiles if job.x_tiles != 0 else 0):
                samples, offset = min(lanes, job.samples - k * lanes), size * k * lanes * n
                load_tile(spec, job.x + offset, n, samples, begin, end, job.x_tiles + offset)

    return entry


def gather_tasks(spec):
    return tile_tasks(spec, need_x=True)


def correlate_tasks(spec):
    return tile_tasks(spec, need_x=False)


def tile_tasks(spec, need_x):
    """Sums of G of a group of dendrites over the tiles of a part, and dx; a group that has all
    dendrites writes dx itself. With dx, groups are of blocks.

    Workspace per task: a tile of x, of gradients and of y, then the q of a block or of a strip.
    """

    def entry(begin_task, end_task, jobs):
        job = carray(jobs, 1)[0]
        lanes, size, n, groups = lanes_of(spec), size_of(spec), job.features, job.block_groups
        for task in range(begin_task, end_task):
            part, group = task // groups, task % groups
            own_x = job.workspace + task * job.workspace_stride
            grads = own_x + size * lanes * n
            gates = grads + size * lanes * job.somas
            q = gates + size * lanes * job.somas
            sums, row_sums = job.dw, job.d_dendrite_bias
            if job.sums != 0:  # of one part of several, or in another order
                sums = job.sums + size * part * job.slots
                row_sums = job.row_sums + size * part * job.rows
            soma_sums = job.soma_sums + size * task * job.somas
            if need_x:
                begin, end = share(job.blocks, 1, group, groups)
                first, last = begin * job.block_rows, min(job.rows, end * job.block_rows)
                clear(spec, sums, load_int64(job.slot_ptr, begin), load_int64(job.slot_ptr, end))
            else:
                first, last = row_at(job, group, groups), row_at(job, group + 1, groups)
                clear(spec, sums, load_int32(job.crow, first), load_int32(job.crow, last))
            clear(spec, row_sums, first, last)
            clear(spec, soma_sums, 0, job.somas)
            for k in range(*share(job.tiles, 1, part, job.parts)):
                sample = k * lanes
                samples = min(lanes, job.samples - sample)
                x_tile = job.x_tiles + size * sample * n
                if job.x_tiles == 0:
                    x_tile = own_x
                    load_tile(spec, job.x + size * sample * n, n, samples, 0, n, x_tile)
                load_gradients(spec, job, sample, grads, gates, soma_sums)
                if need_x:
                    own = task if groups == 1 else group * job.tiles + k
                    dx = job.dx_tiles + size * lanes * n * own
                    gather_blocks(
                        spec, job, sample, x_tile, grads, begin, end, q, sums, row_sums, dx
                    )
                    if groups == 1:
                        store_tile(spec, dx, n, job.dx + size * sample * n, n, samples)
                else:
                    for strip in range(first, last, STRIP):
                        stop = min(last, strip + STRIP)
                        take_q(spec, job, sample, grads, strip, stop, q, row_sums, x_tile, sums)

    return entry


def collect_tasks(spec):
    """Last: gradients of a share of the dendrites and of the somas, from the sums of all parts, and
    a share of the columns of dx, from those of all groups.
    """

    def entry(begin_task, end_task, jobs):
        job = carray(jobs, 1)[0]
        for task in range(begin_task, end_task):
            first, end = row_at(job, task, job.tasks), row_at(job, task + 1, job.tasks)
            while first < end:
                last = min(end, (first // job.block_rows + 1) * job.block_rows)
                collect_rows(spec, job, first, last)
                first = last
            for s in range(*share(job.somas, 1, task, job.tasks)):
                stride = job.block_groups * job.somas
                store(job.d_soma_bias, s, summed(spec, job.soma_sums, s, job.parts, stride))
            if job.dx_tiles != 0 and job.block_groups > 1:
                write_columns(spec, job, *share(job.features, width_of(spec), task, job.tasks))

    return entry


@kernel
def write_columns(spec, job, begin, end):
    """Columns [begin, end) of dx: what the groups of blocks gave."""
    lanes, size, n = lanes_of(spec), size_of(spec), job.features
    for k in range(job.tiles):
        tile = job.dx_tiles + size * lanes * n * k
        for i in range(begin * lanes, end * lanes, lanes):
            value = vload(spec, tile, i)
            for group in range(1, job.block_groups):
                value = add(value, vload(spec, tile, group * job.tiles * lanes * n + i))
            store(tile, i, value)
        dx = job.dx + size * (k * lanes * n + begin)
        samples = min(lanes, job.samples - k * lanes)
        store_tile(spec, tile + size * begin * lanes, end - begin, dx, n, samples)


# --- from Python source to machine code that torch's thread pool can call ---

_SIGNATURE = types.void(types.int64, types.int64, JOB)
_compiled: dict[tuple[str, Spec], Any] = {}
_lock = threading.RLock()  # re-entrant: a signal handler may compile, too
_uncached: str | None = None  # why compiled code is not kept on disk; None: it is, or none yet


def address(task: str, spec: Spec) -> int:
    """Of the native function that does tasks [begin, end) of a job; compiled at the first call."""
    key = task, spec
    if key not in _compiled:
        with _lock:
            if key not in _compiled:
                # Numba's cache tells entries apart by their code and what they close over: spec.
                make = globals()[f"{task}_tasks"]
                made = compiled(make(replace(spec, build=_fingerprint())), _SIGNATURE)
                _compiled.setdefault(key, made)  # a plan may hold the address of the first one
    function: int = _compiled[key].address
    return function


def cache_state() -> str:
    """Whether compiled code is kept for later processes."""
    if _uncached is not None:
        return f"off: {_uncached}"
    return "on" if _compiled else "not used yet"


def compiled(entry: Callable[..., Any], signature: Any) -> Any:
    """Load from Numba's cache or compile; without the cache where that cannot be had: a read-only
    installation and an unwritable home, a full disk, a damaged file.
    """
    global _uncached
    if _uncached is None:
        try:
            return numba.cfunc(signature, cache=True, **OPTIONS)(entry)
        except Exception as error:
            remedy = "set NUMBA_CACHE_DIR to a folder that can be written, or empty the one it has"
            _uncached = f"{type(error).__name__}: {error} ({remedy})"
    return numba.cfunc(signature, **OPTIONS)(entry)


@functools.cache
def _fingerprint() -> str:
    """Of the sources: Numba's cache looks only at the file of the outermost function."""
    folder = Path(__file__).parent
    digest = hashlib.blake2b(digest_size=8)
    for name in ("vectors.py", "kernels.py", "tasks.py"):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()
