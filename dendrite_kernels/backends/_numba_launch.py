"""From one call to tasks on torch's threads: job records, scratch memory, who does what."""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from ..topology import Connectivity, TransposedPlan
from . import _numba_entry, _pool
from ._numba_kernels import CHUNK, Job
from ._numba_token import ISA_BITS, Spec, isa

_KIB, _MIB = 1 << 10, 1 << 20
_WIDE_TILE = 256 * _KIB  # an x tile of 64 samples must fit this, that it and q stay in L2
_BATCH = 3 * _MIB // 2  # x tiles a thread goes through for block after block: L2 again
_GRAIN = 1 << 17  # multiplications worth one more thread
_ROWS = 1024  # dendrites per block where there is no plan
_ALIGNMENT = 128  # two cache lines: neighbours in memory are fetched in pairs
_KEPT = 256 * _MIB  # larger scratch memory is given back at once


# --- arrays of either kind ---

_ELEMENTS = {
    torch.float32: "float32",
    torch.float64: "float64",
    np.dtype(np.float32): "float32",
    np.dtype(np.float64): "float64",
}


def empty(like: Any, shape: tuple[int, ...]) -> Any:
    if isinstance(like, torch.Tensor):
        return torch.empty(shape, dtype=like.dtype)
    return np.empty(shape, like.dtype)


def zeros(like: Any, shape: tuple[int, ...]) -> Any:
    if isinstance(like, torch.Tensor):
        return torch.zeros(shape, dtype=like.dtype)
    return np.zeros(shape, like.dtype)


def empty_signs(like: Any, shape: tuple[int, ...]) -> Any:
    if isinstance(like, torch.Tensor):
        return torch.empty(shape, dtype=torch.int32)
    return np.empty(shape, np.int32)


def address(array: Any) -> int:
    if array is None:
        return 0
    return cast(int, array.data_ptr() if isinstance(array, torch.Tensor) else array.ctypes.data)


class _Workspace(threading.local):
    """Scratch memory of one Python thread, grown as needed: calls in different threads share none
    and a call leaves none in use behind.
    """

    size = 0
    place = 0  # address, aligned
    memory: np.ndarray[Any, np.dtype[np.uint8]]

    def carve(self, job: Job, **sizes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Give these fields of the job so many bytes each; hold what is returned."""
        needed = sum(sizes.values()) + _ALIGNMENT * (len(sizes) + 1)
        if needed > self.size:
            # numpy asks for huge pages from 4 MiB
            self.memory = np.empty(max(needed, 4 * _MIB), np.uint8)
            self.size = self.memory.size
            self.place = _round_up(self.memory.ctypes.data)
        place, memory = self.place, self.memory
        for name, size in sizes.items():
            setattr(job, name, place)
            place = _round_up(place + size)
        if self.size > _KEPT:
            del self.memory, self.size, self.place
        return memory


_workspace = _Workspace()


def _round_up(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


# --- jobs ---


def make_job(connectivity: Connectivity, slope: float, **arrays: Any) -> Job:
    """Sizes and CSR arrays of the connectivity, and the addresses of these arrays."""
    job = Job(slope=slope)
    for name, value in connectivity.cached("numba", lambda: _constants(connectivity)):
        setattr(job, name, value)
    for name, array in arrays.items():
        if array is not None:
            setattr(job, name, address(array))
    return job


def _constants(connectivity: Connectivity) -> list[tuple[str, int]]:
    return [
        ("features", connectivity.in_features),
        ("rows", connectivity.num_dendrites),
        ("somas", connectivity.num_somas),
        ("crow", address(connectivity.crow_indices)),
        ("columns", address(connectivity.columns)),
        ("soma_ptr", address(connectivity.soma_ptr)),
    ]


def _plan_constants(plan: TransposedPlan) -> list[tuple[str, int]]:
    arrays = "column_ptr", "column", "groups", "slot_ptr", "row", "slot"
    return [
        ("blocks", plan.slot_ptr.size - 1),
        ("block_rows", plan.block_rows),
        ("group", plan.group),
        ("slots", int(plan.slot_ptr[-1])),
        ("block_slots", int(np.diff(plan.slot_ptr).max())),
        *[(name, address(getattr(plan, name))) for name in arrays],
    ]


@functools.cache
def _native(task: str, element: str, column: str, lanes: int, linear: bool) -> int:
    size = 32 if element == "float32" else 64
    register = ISA_BITS[isa()] // size
    return _numba_entry.address(task, Spec(element, column, lanes, register, linear, build=""))


class _Launcher(NamedTuple):
    """Runs kernels for one dtype, width of tiles and kind of operation."""

    element: str
    column: str
    lanes: int
    linear: bool

    def __call__(self, task: str, job: Job, tasks: int) -> None:
        job.tasks = tasks
        _pool.run(_native(task, *self), tasks, ctypes.addressof(job))


def _size(element: str) -> int:
    return 4 if element == "float32" else 8


def _column(features: int) -> str:
    """Type of `Connectivity.columns`."""
    return "uint16" if features <= 65536 else "int32"


def _threads(multiplications: int) -> int:
    if _pool.forked():
        return 1
    return max(1, min(torch.get_num_threads(), multiplications // _GRAIN))


# --- forward ---


def forward(job: Job, connectivity: Connectivity, x: Any, linear: bool) -> None:
    """Compute job.y (and job.signs) from job.x and the weights."""
    batch, element = x.shape[0], _ELEMENTS[x.dtype]
    if batch == 0:
        return
    if linear:
        job.somas = job.rows
    size = _size(element)
    lanes = 128 // size
    job.samples, job.tiles = batch, -(-batch // lanes)
    units = job.tiles * max(1, job.somas // CHUNK)
    tasks = min(_threads(job.tiles * lanes * connectivity.nnz), units)
    job.workspace_stride = size * lanes * (job.features + 2 * CHUNK + 1)
    memory = _workspace.carve(job, workspace=tasks * job.workspace_stride)
    launch = _Launcher(element, _column(job.features), lanes, linear)
    launch("forward", job, tasks)
    del memory


# --- backward ---


class Schedule(NamedTuple):
    """How backward divides its work: task = tile_group * block_groups + block_group."""

    tile_groups: int
    block_groups: int
    tiles: int  # tiles in one pass over the network; x of these is transposed before the pass


def schedule(tiles: int, blocks: int, threads: int, tile_bytes: int) -> Schedule:
    """The split of tiles x blocks among threads that ends first.

    Among equals the one with most groups of blocks: their sums of G are their own, and reading
    weights and writing gradients is divided too.
    """
    best = min(
        (-(-tiles // min(threads // groups, tiles)) * -(-blocks // groups), -groups)
        for groups in range(1, min(threads, blocks) + 1)
    )
    block_groups = -best[1]
    tile_groups = min(threads // block_groups, tiles)
    return Schedule(
        tile_groups, block_groups, min(tiles, tile_groups * max(1, _BATCH // tile_bytes))
    )


def _backward_lanes(batch: int, features: int, size: int) -> int:
    """64 samples of float32 where they fit, or 32; half of that for float64."""
    wide = isa() == "avx512" and batch > 128 // size and 256 * features <= _WIDE_TILE
    return (256 if wide else 128) // size


def backward(job: Job, connectivity: Connectivity, x: Any, need_x: bool, linear: bool) -> None:
    """Compute all gradients that job has an address for."""
    batch, element = x.shape[0], _ELEMENTS[x.dtype]
    size = _size(element)
    if linear:
        job.somas = job.rows
    lanes = _backward_lanes(batch, job.features, size)
    tiles = -(-batch // lanes)
    launch = _Launcher(element, _column(job.features), lanes, linear)
    threads = _threads(tiles * lanes * connectivity.nnz)
    tile_bytes = size * lanes * (job.features + (job.somas if linear else 0))
    job.samples = batch
    if need_x:
        _with_dx(job, connectivity, launch, tiles, threads, tile_bytes)
    else:
        _without_dx(job, launch, tiles, threads, tile_bytes)


def _without_dx(job: Job, launch: _Launcher, tiles: int, threads: int, tile_bytes: int) -> None:
    size, lanes = _size(launch.element), launch.lanes
    at_once = min(tiles, max(1, _BATCH // tile_bytes))
    memory = _workspace.carve(
        job,
        x_tiles=at_once * size * lanes * job.features,
        grad_tiles=at_once * size * lanes * job.somas,
    )
    job.block_rows = _ROWS
    for first in range(0, tiles, at_once):
        job.first_tile, job.tiles = first, min(at_once, tiles - first)
        job.accumulate, job.finish = first > 0, first + at_once >= tiles
        launch("prepare", job, threads)
        launch("rows", job, threads)
    del memory


def _with_dx(
    job: Job,
    connectivity: Connectivity,
    launch: _Launcher,
    tiles: int,
    threads: int,
    tile_bytes: int,
) -> None:
    plan = connectivity.transposed
    for name, value in connectivity.cached("numba plan", lambda: _plan_constants(plan)):
        setattr(job, name, value)
    split = schedule(tiles, job.blocks, threads, tile_bytes)
    job.tile_groups, job.block_groups = split.tile_groups, split.block_groups
    size, lanes, tasks = _size(launch.element), launch.lanes, split.tile_groups * split.block_groups
    x_bytes = split.tiles * size * lanes * job.features
    block = size * (job.block_slots + (0 if launch.linear else plan.block_rows * lanes))
    job.workspace_stride = -(-max(block, size * lanes) // _ALIGNMENT) * _ALIGNMENT
    memory = _workspace.carve(
        job,
        workspace=max(tasks, threads) * job.workspace_stride,
        x_tiles=x_bytes,
        grad_tiles=split.tiles * size * lanes * job.somas,
        dx_tiles=split.block_groups * x_bytes,
        sums=split.tile_groups * size * job.slots,
        row_sums=split.tile_groups * size * job.rows,
    )
    for first in range(0, tiles, split.tiles):
        job.first_tile, job.tiles = first, min(split.tiles, tiles - first)
        job.accumulate = first > 0
        last = first + split.tiles >= tiles
        job.finish = last and split.tile_groups == 1
        launch("prepare", job, threads)
        launch("gather", job, tasks)
        launch("output", job, threads)
    if split.tile_groups > 1:
        launch("collect", job, threads)
    del memory
