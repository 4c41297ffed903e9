"""How a call is cut into tasks: sizes, scratch memory and the native functions to run, in order.

A plan depends on sizes, number of threads and the connectivity only, so it is made once for each
and kept; `__init__.py` runs it on a call's arrays.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...structure import Connectivity
from . import tasks as native
from .kernels import CHUNK, STRIP, Job
from .vectors import ISA_BITS, Spec, isa

_MIB = 1 << 20
_PRIVATE = 256 * _MIB  # what all threads' own sums of G, or those of dx, may take
_GRAIN = 1 << 17  # multiplications worth one more thread
_ALIGNMENT = 128  # two cache lines: neighbours in memory are fetched in pairs
_BYTES = {"float32": 4, "float64": 8}


class Plan(NamedTuple):
    """All of a call but its arrays."""

    job: Job  # every field that does not depend on the arrays; copied for each call
    regions: tuple[tuple[str, int], ...]  # scratch memory: address fields and their offsets
    scratch: int  # bytes
    steps: tuple[tuple[int, int], ...]  # native functions, and how many tasks each has


class Call(NamedTuple):
    """What a plan is made for."""

    batch: int
    element: str
    threads: int
    linear: bool


@functools.cache
def _l2_bytes() -> int:
    """Of one core's second-level cache; a common size where the system does not say."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text()
        return int(text.strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        return _MIB


class _Builder:
    """Collects the parts of a plan."""

    def __init__(self, call: Call, connectivity: Connectivity, somas: int, wide: bool) -> None:
        self.call, self.size = call, _BYTES[call.element]
        self.features = connectivity.in_features
        work = max(call.batch, 32) * connectivity.nnz  # a tile takes its time even if half empty
        self.threads = max(1, min(call.threads, work // _GRAIN))  # that have enough to do
        self.lanes = self._lanes(wide)
        self.tiles = -(-call.batch // self.lanes)
        self.scratch = 0
        self.steps: list[tuple[int, int]] = []
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

    def _lanes(self, wide: bool) -> int:
        """Samples in a tile: 32 of float32, 16 of float64; half of that for a batch that fits it.

        Twice as many if wide, where registers of AVX-512 hold more: four vectors of samples hide
        the latency of broadcasts, if x stays in the cache.
        """
        batch = self.call.batch * self.size
        wide = wide and isa() == "avx512" and 512 * self.features <= _l2_bytes()
        return (64 if batch <= 64 else 256 if wide and batch > 128 else 128) // self.size

    def reserve(self, **elements: int) -> None:
        """Scratch memory for so many elements each."""
        for name, count in elements.items():
            self.regions[name] = self.scratch
            self.scratch += -(-count * self.size // _ALIGNMENT) * _ALIGNMENT

    def reserve_each(self, tasks: int, elements: int) -> None:
        """A workspace of so many elements for every task."""
        stride = -(-elements * self.size // _ALIGNMENT) * _ALIGNMENT
        self.fields["workspace_stride"] = stride
        self.reserve(workspace=tasks * stride // self.size)

    def step(self, task: str, tasks: int) -> None:
        column = "uint16" if self.features <= 65536 else "int32"  # as Connectivity.columns
        width = ISA_BITS[isa()] // (8 * self.size)
        spec = Spec(self.call.element, column, self.lanes, width, self.call.linear, build="")
        self.steps.append((native.address(task, spec), tasks))

    def plan(self) -> Plan:
        regions, steps = tuple(self.regions.items()), tuple(self.steps)
        return Plan(Job(**self.fields), regions, self.scratch, steps)


def forward_plan(connectivity: Connectivity, call: Call) -> Plan:
    """Tasks are shares of all pairs of a tile and a chunk of somas (or of rows)."""
    outputs = connectivity.num_dendrites if call.linear else connectivity.num_somas
    build = _Builder(call, connectivity, outputs, wide=False)
    units = build.tiles * max(1, outputs // CHUNK)
    tasks = min(build.threads, units)
    build.reserve_each(tasks, build.lanes * (build.features + 2 * CHUNK))
    build.step("forward", tasks)
    return build.plan()


def backward_plan(connectivity: Connectivity, call: Call, need_x: bool) -> Plan:
    """Tasks are pairs of a part of the batch and a group of dendrites, which have their own sums of
    G for the part and, with dx, their own sums of dx for the group.
    """
    somas = 0 if call.linear else connectivity.num_somas
    build = _Builder(call, connectivity, somas, wide=True)
    fields, lanes, threads = build.fields, build.lanes, build.threads
    fields |= {"blocks": 1, "block_rows": fields["rows"], "slots": connectivity.nnz}
    scratch = STRIP * lanes  # for the q of a strip
    if need_x:
        plan = connectivity.transposed
        fields |= {
            "blocks": plan.slot_ptr.size - 1,
            "block_rows": plan.block_rows,
            "group": plan.group,
            "slots": int(plan.slot_ptr[-1]),
            "narrow_slots": int(plan.slot.itemsize == 2),
        }
        for name in ("column_ptr", "column", "groups", "slot_ptr", "row", "slot", "synapse"):
            fields[name] = getattr(plan, name).ctypes.data
        # For the q of a block or, before, for the products of its weights.
        scratch = max(plan.block_rows * lanes, int(np.diff(plan.slot_ptr).max()) + 1)
    parts, groups = _cut(build, need_x)
    fields |= {"parts": parts, "block_groups": groups}
    build.reserve_each(threads, lanes * (build.features + 2 * somas) + scratch)
    build.reserve(soma_sums=parts * groups * somas)
    if need_x or parts > 1:
        build.reserve(sums=parts * fields["slots"], row_sums=parts * fields["rows"])
    if need_x:
        own = parts if groups == 1 else groups * build.tiles
        build.reserve(weights=fields["slots"], dx_tiles=own * lanes * build.features)
        if groups > 1:
            build.reserve(x_tiles=build.tiles * lanes * build.features)
        build.step("prepare", min(threads, fields["blocks"]))
    build.step("gather" if need_x else "correlate", parts * groups)
    build.step("collect", threads)
    return build.plan()


def _cut(build: _Builder, need_x: bool) -> tuple[int, int]:
    """Parts of the batch, and groups of dendrites: with dx of blocks, which then end first."""
    tiles, threads, x_size = build.tiles, build.threads, build.call.batch * build.features
    blocks, slots = build.fields["blocks"], build.fields["slots"]
    most = max(1, min(threads, tiles, _PRIVATE // (max(1, slots) * build.size)))
    large_x = x_size > 4 * slots  # adding up sums of dx, of groups, costs more than G, of parts
    if not need_x:
        parts = most if large_x else 1
        return parts, threads // parts

    def turns(parts: int) -> float:
        groups = min(blocks, threads // parts)
        added = groups if large_x else parts
        return -(-tiles // parts) * -(-blocks // groups) * (1.25 if added > 1 else 1)

    parts = min(range(1, most + 1), key=turns)
    groups = min(blocks, threads // parts)
    return parts, groups if groups * x_size * build.size <= _PRIVATE else 1
