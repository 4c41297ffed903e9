"""Which CUDA kernel runs, on how many blocks: pure functions of sizes and device limits.

A batch is cut into tiles of samples. A tile of every input sits in shared memory (or behind the L2
cache, where not even a narrow one fits), `parts` blocks share its outputs, and one warp computes
one output. csrc/cuda/tile.h describes the kinds of tile, and launch.inl lists the same ones.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

FEW_SAMPLES = 8  # up to so many, forward needs no tile
GRID_LIMIT = 2**31 - 1
_RESERVED = 1024  # bytes of shared memory that the driver keeps for each block
_WARPS = (32, 16, 8, 4)
_PARTIAL_BYTES = 64 << 20  # of partial sums are always granted; beyond, twice the gradient's size
# A rough model in cycles of one multiprocessor; only ratios matter. Half a warp gathers from one
# row of the tile, or from 2 (4) that may meet in a bank, less often when dealt out by bank.
_CONFLICTS = {1: 1.0, 2: 1.0, 4: 1.12, 8: 1.4}
_ROW_COST = 12.0  # to finish a packed row, for a warp
_CACHE_COST = 6.0  # of a gather from L2, relative to shared memory
_CHUNK_COST = 3.0  # to load the indices and weights of eight synapses
_CHUNK_LATENCY = {True: 250.0, False: 900.0}  # of one chunk in a warp alone, by Kind.shared


@dataclass(frozen=True)
class Limits:
    """What a device offers."""

    multiprocessors: int
    block_shared: int  # bytes of shared memory that a block may ask for
    multiprocessor_shared: int


@dataclass(frozen=True)
class Kind:
    """How a tile is laid out; csrc/cuda/tile.h says what the fields do."""

    vec: int
    groups: int
    shared: bool

    @property
    def samples(self) -> int:
        return 32 // self.groups * self.vec

    @property
    def banks(self) -> int:
        """Rows of the tile that share the banks of shared memory, 128 bytes; a lane has 8."""
        return max(1, self.groups // 2)

    @property
    def step(self) -> int:
        """Synapses that a warp loads at once: rows are packed to a multiple."""
        return 8 if self.groups == 1 else 4 * self.groups


KINDS = {
    4: (*(Kind(2, groups, True) for groups in (1, 2, 4, 8)), Kind(2, 1, False)),
    2: (*(Kind(4, groups, True) for groups in (1, 2, 4, 8)), Kind(4, 1, False)),
    8: (Kind(1, 1, True), Kind(1, 4, True), Kind(1, 1, False)),
}  # by the bytes of a stored sample


@dataclass(frozen=True)
class Work:
    """Sizes of one kernel call."""

    batch: int
    gathered: int  # rows of the tile, without the row of zeros for pads
    outputs: int  # one for each warp: somas, or inputs in backward-input
    rows: int  # of packed synapses: dendrites, or inputs in backward-input
    synapses: int
    itemsize: int  # bytes of a stored sample


@dataclass(frozen=True)
class TilePlan:
    """A launch: `tile_groups` > 0 only for backward-weight, whose blocks loop over tiles."""

    kind: Kind
    tiles: int
    parts: int
    tile_groups: int
    threads: int
    shared_bytes: int

    @property
    def blocks(self) -> int:
        return self.parts * (self.tile_groups or self.tiles)


def shared_bytes(kind: Kind, work: Work) -> int:
    """Dynamic shared memory of a block, with a row for pads."""
    return (work.gathered + 1) * kind.samples * work.itemsize if kind.shared else 0


@functools.lru_cache(maxsize=4096)
def plan_tiles(work: Work, limits: Limits) -> TilePlan:
    """The launch of forward or backward-input: one block for each tile and part.

    Raises:
        ValueError: the batch needs more than 2**31 - 1 blocks.
    """

    def cost(plan: TilePlan) -> float:
        rounds = -(-plan.blocks // limits.multiprocessors)
        return rounds * _block_cost(plan, work, limits)

    plan = min(_candidates(work, limits, splits=False), key=cost)
    return _checked(plan, work)


@functools.lru_cache(maxsize=4096)
def plan_weight(work: Work, limits: Limits) -> TilePlan:
    """The launch of backward-weight: group g of blocks sums over tiles g, g + tile_groups, ..."""
    sum_bytes = max(work.itemsize, 4) * max(work.synapses, 1)

    def cost(plan: TilePlan) -> float:
        rounds = -(-plan.blocks // limits.multiprocessors)
        tiles = -(-plan.tiles // plan.tile_groups)  # one after the other
        finish = plan.tile_groups * sum_bytes / (32 * limits.multiprocessors)
        return rounds * tiles * _block_cost(plan, work, limits) + finish

    plan = min(_candidates(work, limits, splits=True), key=cost)
    return _checked(plan, work)


def _checked(plan: TilePlan, work: Work) -> TilePlan:
    if plan.blocks > GRID_LIMIT:
        raise ValueError(f"Expected a batch that fits 2**31 - 1 blocks, got {work.batch} samples")
    return plan


def _candidates(work: Work, limits: Limits, splits: bool) -> Iterator[TilePlan]:
    kinds = [k for k in KINDS[work.itemsize] if shared_bytes(k, work) <= limits.block_shared]
    if any(k.shared for k in kinds):
        kinds = [k for k in kinds if k.shared]
    for kind in kinds:
        tiles = max(1, -(-work.batch // kind.samples))
        bytes_ = shared_bytes(kind, work)
        for tile_groups in _splits(work, tiles) if splits else [0]:
            side = tile_groups or tiles
            for warps in _WARPS:
                if warps > _most_warps(kind, work):
                    continue
                most = max(1, -(-work.outputs // warps))
                for rounds in (1, 2, 3, 4, 8, 16, 64):
                    parts = min(max(1, rounds * limits.multiprocessors // side), most)
                    yield TilePlan(kind, tiles, parts, tile_groups, 32 * warps, bytes_)


def _most_warps(kind: Kind, work: Work) -> int:
    """Of a block: kMaxThreads in csrc/cuda/tile.h, by the registers that kernels need."""
    return 32 if kind.shared and work.itemsize < 8 else 16


def _splits(work: Work, tiles: int) -> list[int]:
    """Numbers of partial sums worth trying: few cost little memory, many fill the device."""
    gradient = max(work.itemsize, 4) * max(work.synapses, 1)
    most = max(1, max(_PARTIAL_BYTES, 2 * gradient) // gradient)
    return [g for g in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64) if g <= min(most, tiles)]


def _block_cost(plan: TilePlan, work: Work, limits: Limits) -> float:
    kind, warps = plan.kind, plan.threads // 32
    row = kind.samples * work.itemsize / 128  # wavefronts for the samples of one synapse
    gather = row * (_CONFLICTS[kind.groups] if kind.shared else _CACHE_COST)
    rows = max(work.rows, 1)
    steps = -(-work.synapses // (rows * kind.step)) * rows  # pads and all
    step_cost = kind.step * gather + _CHUNK_COST
    throughput = (steps * step_cost + rows * _ROW_COST) / plan.parts
    chain = -(-work.outputs // (plan.parts * warps)) * steps / max(work.outputs, 1)
    latency = chain * (_CHUNK_LATENCY[kind.shared] + step_cost)
    if not kind.shared:
        return max(throughput, latency / _resident(plan, limits))
    stage = work.gathered * row * 2 + work.gathered / (4 * warps) * 16
    return stage + max(throughput, latency / _resident(plan, limits))


def _resident(plan: TilePlan, limits: Limits) -> int:
    """Blocks that a multiprocessor runs side by side, hiding each other's latency."""
    if not plan.kind.shared:
        return max(1, 768 // plan.threads)  # these kernels need up to 85 registers
    by_threads = 1024 // plan.threads
    by_shared = limits.multiprocessor_shared // (plan.shared_bytes + _RESERVED)
    blocks = -(-plan.blocks // limits.multiprocessors)
    return max(1, min(by_threads, by_shared, blocks))
