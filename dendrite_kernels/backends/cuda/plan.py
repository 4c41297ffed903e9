"""Which CUDA kernel runs, on how many blocks: pure functions of sizes and device limits.

A batch is cut into tiles of samples. A tile of every input sits in shared memory (or behind the L2
cache, where not even a narrow one fits), `parts` blocks share its outputs, and one warp computes
one item: one output or a few. csrc/cuda/tile.h describes the kinds of tile, and launch.inl lists
the same ones.
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


@dataclass(frozen=True)
class Limits:
    """What a device offers."""

    multiprocessors: int
    block_shared: int  # bytes of shared memory that a block may ask for
    multiprocessor_shared: int
    l2: int  # bytes


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
    def chunk(self) -> int:
        """Synapses that a lane loads at once: rows are packed to a multiple."""
        return 8 if self.groups == 1 else 4

    @property
    def step(self) -> int:
        """Synapses that a warp loads at once."""
        return self.chunk * self.groups


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
    outputs: int  # somas, or inputs in backward-input
    rows: int  # of packed synapses: dendrites, or inputs in backward-input
    synapses: int
    itemsize: int  # bytes of a stored sample
    sign_rows: int = 0  # dendrites whose sign bits are gathered: backward-input with somas


@dataclass(frozen=True)
class TilePlan:
    """A launch: `tile_groups` > 0 only for backward-weight, whose blocks loop over tiles."""

    kind: Kind
    tiles: int
    parts: int
    tile_groups: int
    threads: int
    shared_bytes: int
    staged: bool = False  # sign bits are in shared memory, behind the tile

    @property
    def blocks(self) -> int:
        return self.parts * (self.tile_groups or self.tiles)


def tile_bytes(kind: Kind, work: Work) -> int:
    """A tile with a row for pads."""
    return (work.gathered + 1) * kind.samples * work.itemsize


def sign_bytes(kind: Kind, work: Work) -> int:
    """The sign bits of a tile."""
    return work.sign_rows * kind.samples // 8


@functools.lru_cache(maxsize=4096)
def plan_tiles(work: Work, limits: Limits) -> TilePlan:
    """The launch of forward or backward-input: one block for each tile and part.

    Raises:
        ValueError: the batch needs more than 2**31 - 1 blocks.
    """
    costs = COSTS["backward_input" if work.sign_rows else "forward"]

    def cost(plan: TilePlan) -> float:
        rounds = -(-plan.blocks // limits.multiprocessors)
        return rounds * block_cycles(plan, work, limits, costs)

    plan = min(_candidates(work, limits, splits=False), key=cost)
    return _checked(plan, work)


@functools.lru_cache(maxsize=4096)
def plan_weight(work: Work, limits: Limits) -> TilePlan:
    """The launch of backward-weight: group g of blocks sums over tiles g, g + tile_groups, ..."""
    sum_bytes = max(work.itemsize, 4) * max(work.synapses, 1)

    def cost(plan: TilePlan) -> float:
        rounds = -(-plan.blocks // limits.multiprocessors)
        tiles = -(-plan.tiles // plan.tile_groups)  # one after the other
        finish = plan.tile_groups * sum_bytes / (L2_BYTES * limits.multiprocessors)
        return rounds * tiles * block_cycles(plan, work, limits, COSTS["backward_weight"]) + finish

    plan = min(_candidates(work, limits, splits=True), key=cost)
    return _checked(plan, work)


def _checked(plan: TilePlan, work: Work) -> TilePlan:
    if plan.blocks > GRID_LIMIT:
        raise ValueError(f"Expected a batch that fits 2**31 - 1 blocks, got {work.batch} samples")
    return plan


def _candidates(work: Work, limits: Limits, splits: bool) -> Iterator[TilePlan]:
    for kind, shared, staged in tiles_that_fit(work, limits):
        tiles = max(1, -(-work.batch // kind.samples))
        items = count_items(work, kind)
        # Tiles in use at a time: where L2 holds them, no more than it has room for.
        live = tiles if kind.shared else max(1, limits.l2 // tile_bytes(kind, work))
        for tile_groups in _splits(work, min(tiles, live)) if splits else [0]:
            side = min(tile_groups or tiles, live)
            for warps in _WARPS:
                if warps > _most_warps(kind, work):
                    continue
                for rounds in (1, 2, 3, 4, 8, 16, 64):
                    parts = min(max(1, rounds * limits.multiprocessors // side), items)
                    yield TilePlan(kind, tiles, parts, tile_groups, 32 * warps, shared, staged)


def tiles_that_fit(work: Work, limits: Limits) -> list[tuple[Kind, int, bool]]:
    """Kinds of tile, the shared memory of a block, and whether it holds sign bits, too.

    A tile is in shared memory if a narrow one fits there. Sign bits are if they fit behind it, and
    16 bits name every dendrite.
    """
    found = []
    for kind in KINDS[work.itemsize]:
        tile, signs = tile_bytes(kind, work), sign_bytes(kind, work)
        if kind.shared and tile <= limits.block_shared:
            staged = 0 < work.sign_rows <= 65536 and tile + signs <= limits.block_shared
            found.append((kind, tile + signs if staged else tile, staged))
    return found or [(k, 0, False) for k in KINDS[work.itemsize] if not k.shared]


def count_items(work: Work, kind: Kind) -> int:
    """What warps compute, one item each: one output, or as many as there are teams."""
    outputs = max(work.outputs, 1)
    return -(-outputs * _team(-(-max(work.rows, 1) // outputs), kind) // kind.groups)


def _team(members: int, kind: Kind) -> int:
    """Groups that work for one output with this many rows: those that leave the fewest idle."""
    bits = reversed(range(kind.groups.bit_length()))
    return 1 << min(bits, key=lambda n: -(-members >> n) << n)


def _most_warps(kind: Kind, work: Work) -> int:
    """Of a block: kMaxThreads in csrc/cuda/tile.h, by the registers that kernels need."""
    return 32 if kind.shared and work.itemsize < 8 else 16


def _splits(work: Work, tiles: int) -> list[int]:
    """Numbers of partial sums worth trying: few cost little memory, many fill the device."""
    gradient = max(work.itemsize, 4) * max(work.synapses, 1)
    most = max(1, max(_PARTIAL_BYTES, 2 * gradient) // gradient)
    return [g for g in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64) if g <= min(most, tiles)]


# ---- A rough model in cycles of one multiprocessor; only ratios matter ----


@dataclass(frozen=True)
class Costs:
    """Of one kernel, for kinds with one group of lanes and with more of them.

    Instructions of a warp are those of the machine code: python -m tests.cuda_emulator.sass f32.
    """

    step: tuple[int, int]  # instructions
    bundle: tuple[int, int]
    item: int
    wavefronts: tuple[float, float]  # in a step, beside those of samples: sign bits, shuffles
    slot_bytes: int  # index, weight and what else a synapse reads or writes in each tile


COSTS = {
    "forward": Costs((44, 27), (76, 70), 100, (0, 0), 6),
    "backward_weight": Costs((77, 41), (88, 75), 88, (9, 4), 10),
    "backward_input": Costs((114, 62), (0, 0), 120, (8, 6), 8),
}
_CONFLICTS = {1: 1.0, 2: 1.0, 4: 1.12, 8: 1.35}  # wavefronts of a gather, by groups of lanes
ISSUE, L2_BYTES = 4.0, 24.0  # instructions and bytes from L2 in a cycle
_SECTOR = 32  # bytes that L2 sends at least
_LATENCY = {True: 600.0, False: 900.0}  # of one step in a warp alone, by Kind.shared


def demands(plan: TilePlan, work: Work, costs: Costs) -> tuple[float, float, float]:
    """What a block asks for on one tile: instructions, wavefronts, bytes from L2."""
    kind, several = plan.kind, plan.kind.groups > 1
    items, bundles, steps = _counts(work, kind)
    issue = steps * costs.step[several] + bundles * costs.bundle[several] + items * costs.item
    gathers = steps * kind.chunk
    banks = steps * costs.wavefronts[several] + gathers * 2 * _CONFLICTS[kind.groups]
    bytes_ = steps * kind.step * costs.slot_bytes
    if not kind.shared:
        banks, bytes_ = 0.0, bytes_ + gathers * kind.samples * work.itemsize
    if work.sign_rows and not plan.staged:
        bytes_ += steps * kind.step * _SECTOR
    share = -(-items // plan.parts) / items  # of the block with the most
    return issue * share, banks * share, bytes_ * share


def block_cycles(plan: TilePlan, work: Work, limits: Limits, costs: Costs) -> float:
    """One block on one tile, if others keep its multiprocessor busy while it waits."""
    kind, warps = plan.kind, plan.threads // 32
    issue, banks, bytes_ = demands(plan, work, costs)
    items, _, steps = _counts(work, kind)
    turns = -(-items // (plan.parts * warps))  # of a warp, one after the other
    latency = turns * (steps / items / 4 + 1) * _LATENCY[kind.shared]  # four steps are in flight
    busy = max(issue / ISSUE, banks, bytes_ / L2_BYTES, latency / _resident(plan, limits))
    return busy + stage_cycles(plan, work)


def stage_cycles(plan: TilePlan, work: Work) -> float:
    """To copy a tile to shared memory, before anything else."""
    if not plan.kind.shared:
        return 0.0
    return plan.shared_bytes / L2_BYTES + work.gathered * plan.kind.samples / 16


def _counts(work: Work, kind: Kind) -> tuple[int, int, int]:
    """Items, bundles and steps of all outputs, as pack.py makes them of rows of equal length."""
    outputs, rows = max(work.outputs, 1), max(work.rows, 1)
    members = -(-rows // outputs)
    items = count_items(work, kind)
    bundles = items * -(-members // _team(members, kind))
    return items, bundles, bundles * max(1, -(-work.synapses // (rows * kind.chunk)))


def _resident(plan: TilePlan, limits: Limits) -> int:
    """Blocks that a multiprocessor runs side by side, hiding each other's latency."""
    if not plan.kind.shared:
        return max(1, 768 // plan.threads)  # these kernels need up to 85 registers
    by_threads = 1024 // plan.threads
    by_shared = limits.multiprocessor_shared // (plan.shared_bytes + _RESERVED)
    blocks = -(-plan.blocks // limits.multiprocessors)
    return max(1, min(by_threads, by_shared, blocks))
