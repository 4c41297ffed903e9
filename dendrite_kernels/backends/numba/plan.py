"""How a call is cut into tasks: sizes, scratch memory and the native functions to run, in order.

A plan depends on sizes, number of threads and the connectivity only, so it is made once for each
and kept; `__init__.py` runs it on a call's arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...structure import Connectivity
from . import tasks as native
from .kernels import CHUNK, STRIP, Job
from .vectors import ISA_BITS, Spec, isa

_MIB = 1 << 20
_PASS = 3 * _MIB // 2  # x tiles a thread goes through for block after block should stay in L2
_PRIVATE = 256 * _MIB  # what all threads' own sums of G, or all tiles, may take
_GRAIN = 1 << 17  # multiplications worth one more thread
_SMALL = _MIB // 2  # bytes of x that a thread transposes faster than it fetches others' parts
_ROWS = 1024  # dendrites per block where the connectivity has no blocks
_ALIGNMENT = 128  # two cache lines: neighbours in memory are fetched in pairs
_BYTES = {"float32": 4, "float64": 8}

Fields = tuple[tuple[str, int], ...]  # of a job, with their values


class Step(NamedTuple):
    """One phase: set fields of the job, run the native function on range(tasks)."""

    native: int
    tasks: int
    fields: Fields


class Plan(NamedTuple):
    """All of a call but its arrays."""

    job: bytes  # a `Job` with every field that does not depend on the arrays
    regions: Fields  # scratch memory: address fields of the job and their offsets
    scratch: int  # bytes
    steps: tuple[Step, ...]

    def new_job(self) -> Any:
        return Job.from_buffer_copy(self.job)


class Call(NamedTuple):
    """What a plan is made for."""

    batch: int
    element: str
    threads: int
    linear: bool

    @property
    def size(self) -> int:
        return _BYTES[self.element]

    def threads_for(self, connectivity: Connectivity) -> int:
        """Threads that have enough to do."""
        work = max(self.batch, 32) * connectivity.nnz  # a tile takes its time even if half empty
        return max(1, min(self.threads, work // _GRAIN))


def round_up(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


@functools.cache
def _l2_bytes() -> int:
    """Of one core's second-level cache; a common size where the system does not say."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text()
        return int(text.strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        return _MIB


@functools.cache
def _native(task: str, element: str, features: int, lanes: int, linear: bool) -> int:
    column = "uint16" if features <= 65536 else "int32"  # as Connectivity.columns
    register = ISA_BITS[isa()] // (8 * _BYTES[element])
    return native.address(task, Spec(element, column, lanes, register, linear, build=""))


class _Builder:
    """Collects the parts of a plan."""

    def __init__(self, call: Call, connectivity: Connectivity, lanes: int, somas: int) -> None:
        self.call, self.lanes = call, lanes
        self.features = connectivity.in_features
        self.tiles = -(-call.batch // lanes)
        self.scratch = 0
        self.steps: list[Step] = []
        self.regions: dict[str, int] = {}
        self.fields = {
            "samples": call.batch,
            "features": self.features,
            "rows": connectivity.num_dendrites,
            "somas": somas,
            "tiles": self.tiles,
            "crow": connectivity.crow_indices.data_ptr(),
            "columns": connectivity.columns.ctypes.data,
            "soma_ptr": connectivity.soma_ptr.data_ptr(),
        }

    def reserve(self, **elements: int) -> None:
        """Scratch memory for so many elements each."""
        for name, count in elements.items():
            self.regions[name] = self.scratch
            self.scratch += round_up(count * self.call.size)

    def reserve_each(self, tasks: int, elements: int) -> None:
        """A workspace of so many elements for every task."""
        stride = round_up(elements * self.call.size)
        self.fields["workspace_stride"] = stride
        self.reserve(workspace=tasks * stride // self.call.size)

    def step(self, task: str, tasks: int, **fields: int) -> None:
        native = _native(task, self.call.element, self.features, self.lanes, self.call.linear)
        self.steps.append(Step(native, tasks, (("tasks", tasks), *fields.items())))

    def plan(self) -> Plan:
        job, regions = bytes(Job(**self.fields)), tuple(self.regions.items())
        return Plan(job, regions, self.scratch, tuple(self.steps))


def _few_lanes(call: Call) -> int:
    """32 samples of float32 in a tile, 16 of float64; half of that for a batch that fits it."""
    return (64 if call.batch * call.size <= 64 else 128) // call.size


def forward_plan(connectivity: Connectivity, call: Call) -> Plan:
    """Tasks are shares of all pairs of a tile and a chunk of somas (or of rows)."""
    outputs = connectivity.num_dendrites if call.linear else connectivity.num_somas
    build = _Builder(call, connectivity, _few_lanes(call), outputs)
    units = build.tiles * max(1, outputs // CHUNK)
    tasks = min(call.threads_for(connectivity), units)
    build.reserve_each(tasks, build.lanes * (build.features + 2 * CHUNK + 1))
    build.step("forward", tasks)
    return build.plan()


def backward_plan(connectivity: Connectivity, call: Call, need_x: bool) -> Plan:
    """See `_by_rows` (without dx) and `_by_blocks`."""
    size, features = call.size, connectivity.in_features
    somas = 0 if call.linear else connectivity.num_somas
    # Four vectors of samples hide the latency of broadcasts; two keep x in the cache where there
    # are many inputs. (Narrower machines need more vectors for the same samples anyway.)
    wide = isa() == "avx512" and call.batch * size > 128 and 256 * features <= _l2_bytes() // 2
    lanes = 256 // size if wide else _few_lanes(call)
    build = _Builder(call, connectivity, lanes, somas)
    threads = call.threads_for(connectivity)
    if not need_x:
        return _by_rows(build, somas, threads)
    plan = connectivity.transposed
    build.fields |= {
        "blocks": plan.slot_ptr.size - 1,
        "block_rows": plan.block_rows,
        "group": plan.group,
        "slots": int(plan.slot_ptr[-1]),
        "narrow_slots": int(plan.slot.itemsize == 2),
    }
    for name in ("column_ptr", "column", "groups", "slot_ptr", "row", "slot", "synapse"):
        build.fields[name] = getattr(plan, name).ctypes.data
    # For the q of a block or, before it has any, for the products of its weights.
    scratch = max(plan.block_rows * lanes, int(np.diff(plan.slot_ptr).max()) + 1)
    return _by_blocks(build, somas, min(threads, build.fields["blocks"]), threads, scratch)


def _passes(build: _Builder, at_once: int) -> Sequence[dict[str, int]]:
    """Fields of the job for each group of tiles whose x is transposed together."""
    return [
        {
            "first_tile": first,
            "tiles": min(at_once, build.tiles - first),
            "accumulate": int(first > 0),
            "finish": int(first + at_once >= build.tiles),
        }
        for first in range(0, build.tiles, at_once)
    ]


def _tiles_at_once(build: _Builder, threads: int, copies: int) -> int:
    """Tiles that every phase goes through before the next phase begins; sets those per pass.

    A phase ends when its last thread does, which on a busy machine may wait for a core: several
    threads prepare all that memory allows at once, with `copies` arrays of the size of the tiles. A
    thread alone uses tiles while they are in its cache.
    """
    tile = build.call.size * build.lanes * max(1, build.features)
    build.fields["pass_tiles"] = in_pass = max(1, _PASS // tile)
    allowed = in_pass if threads == 1 else max(in_pass, _PRIVATE // (copies * tile))
    return min(build.tiles, allowed)


def _by_rows(build: _Builder, somas: int, threads: int) -> Plan:
    """Threads own dendrites, nothing is summed twice."""
    at_once = _tiles_at_once(build, threads, copies=1)
    own_x = threads > 1 and build.call.batch * build.features * build.call.size <= _SMALL
    build.fields |= {"block_rows": _ROWS, "own_x": int(own_x)}
    build.reserve_each(threads, STRIP * build.lanes)
    x_tiles = at_once * build.lanes * build.features
    build.reserve(
        x_tiles=x_tiles * (threads if own_x else 1), grad_tiles=at_once * build.lanes * somas
    )
    for fields in _passes(build, at_once):
        build.step("prepare", threads, **fields)
        build.step("rows", threads)
    return build.plan()


def _by_blocks(build: _Builder, somas: int, groups: int, threads: int, scratch: int) -> Plan:
    """Threads own groups of blocks of dendrites; dx is summed over the groups."""
    fields, lanes = build.fields, build.lanes
    at_once = _tiles_at_once(build, threads, copies=1 + groups)
    fields["block_groups"] = groups
    build.reserve_each(threads, scratch)
    x_tiles = at_once * lanes * build.features
    build.reserve(
        x_tiles=x_tiles,
        grad_tiles=at_once * lanes * somas,
        weights=fields["slots"],
        dx_tiles=groups * x_tiles,
        sums=fields["slots"],
        row_sums=fields["rows"],
    )
    for turn in _passes(build, at_once):
        build.step("prepare", threads, **turn)
        build.step("gather", groups)
        build.step("output", threads)
    return build.plan()
