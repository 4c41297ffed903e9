"""The host side of the CUDA backend: pure functions of sizes, limits and synapses."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import dendrite_kernels as dk
from dendrite_kernels.backends.cuda import pack
from dendrite_kernels.backends.cuda import plan as planner
from dendrite_kernels.backends.cuda.plan import KINDS, Kind, Limits, TilePlan, Work

SHARED = [48, 99, 163, 227]  # KiB that blocks of GPUs since 7.5 may ask for
DEVICES = [Limits(n, kib << 10, (kib + 1) << 10) for kib in SHARED for n in (1, 40, 132)]
ROOT = Path(__file__).parents[2]


def works(count: int) -> list[Work]:
    """Sizes from 1 to beyond 2**31, each drawn on a logarithmic scale."""
    rng = np.random.default_rng(0)

    def size(limit: float) -> int:
        return int(2 ** rng.uniform(0, np.log2(limit)))

    return [
        Work(
            size(2**33),
            size(2**31),
            size(2**31),
            size(2**31),
            size(2**31),
            int(rng.choice([2, 4, 8])),
        )
        for _ in range(count)
    ]


def plans(work: Work, limits: Limits) -> list[TilePlan]:
    found = []
    for plan in (planner.plan_tiles, planner.plan_weight):
        try:
            found.append(plan(work, limits))
        except ValueError:
            # Only what no grid can hold is refused.
            assert -(-work.batch // 8) * 1 > 2**24
    return found


@pytest.mark.parametrize("limits", DEVICES, ids=str)
def test_a_plan_fits_the_device(limits: Limits) -> None:
    for work in works(100):
        for plan in plans(work, limits):
            assert plan.kind in KINDS[work.itemsize]
            assert plan.shared_bytes <= limits.block_shared
            assert plan.shared_bytes == planner.shared_bytes(plan.kind, work)
            assert plan.tiles * plan.kind.samples >= work.batch
            assert (plan.tiles - 1) * plan.kind.samples < work.batch
            assert plan.parts >= 1
            assert 1 <= plan.blocks <= 2**31 - 1
            assert plan.threads % 32 == 0
            assert plan.threads <= (1024 if plan.kind.shared and work.itemsize < 8 else 512)


@pytest.mark.parametrize("limits", DEVICES, ids=str)
def test_shared_memory_is_used_where_a_tile_fits(limits: Limits) -> None:
    for work in works(100):
        narrowest = min(planner.shared_bytes(k, work) for k in KINDS[work.itemsize] if k.shared)
        for plan in plans(work, limits):
            assert plan.kind.shared == (narrowest <= limits.block_shared)
            if plan.kind.shared:
                assert work.gathered + 1 <= 65536  # 16-bit indices reach every row


@pytest.mark.parametrize("limits", DEVICES[::3], ids=str)
def test_partial_sums_stay_small(limits: Limits) -> None:
    for work in works(100):
        plan = planner.plan_weight(work, limits)
        gradient = max(work.itemsize, 4) * work.synapses
        assert 1 <= plan.tile_groups <= plan.tiles
        assert plan.tile_groups * gradient <= max(64 << 20, 2 * gradient)


def test_every_output_is_computed_once() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        batch, gathered, outputs, synapses = (int(rng.integers(1, n)) for n in (300, 300, 200, 999))
        work = Work(batch, gathered, outputs, outputs, synapses, int(rng.choice([2, 4, 8])))
        plan = planner.plan_tiles(work, DEVICES[int(rng.integers(len(DEVICES)))])
        warps = plan.threads // 32
        computed = np.zeros((plan.tiles, work.outputs), int)
        for block in range(plan.blocks):  # as forward_tile does
            tile, part = divmod(block, plan.parts)
            for warp in range(warps):
                computed[tile, part * warps + warp :: plan.parts * warps] += 1
        assert (computed == 1).all()


def test_a_wide_layer_gathers_from_l2_without_partial_sums() -> None:
    work = Work(512, 65536, 65536, 65536 * 16, 65536 * 16 * 32, 4)
    plan = planner.plan_weight(work, Limits(132, 227 << 10, 228 << 10))
    assert not plan.kind.shared
    assert plan.tile_groups == 1


def test_a_grid_that_is_too_large_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected a batch that fits"):
        planner.plan_tiles(Work(2**40, 10**4, 1, 1, 1, 4), DEVICES[0])


def test_kinds_are_those_that_are_compiled() -> None:
    text = (ROOT / "csrc/cuda/launch.inl").read_text()
    for size, kinds in KINDS.items():
        table = text.split(f"struct Kinds<{size}> {{")[1].split("};")[0]
        found = re.findall(r"Kind<T, (\d), (\d), (true|false), (\w+)>", table)
        compiled = {(Kind(int(v), int(g), s == "true"), index) for v, g, s, index in found}
        wanted = {(kind, "uint16_t") for kind in kinds}
        wanted |= {(kind, "int32_t") for kind in kinds if not kind.shared}
        assert compiled == wanted


# ---- packing ----


def _varied(seed: int) -> dk.Connectivity:
    rng = np.random.default_rng(seed)
    n, rows = int(rng.integers(1, 80)), int(rng.integers(1, 40))
    mask = rng.random((rows, n)) < rng.random((rows, 1)) ** 2
    somas = np.sort(rng.integers(0, rows + 1, size=int(rng.integers(0, 6))))
    return dk.Connectivity.from_mask(mask, soma_ptr=[0, *somas, rows])


NETWORKS = [
    *(_varied(seed) for seed in range(12)),
    dk.connectivity.random(64, 4, 4, 32, constant_fan_in=True, seed=1),
    dk.connectivity.random(200, 4, 4, 16, constant_fan_in=True, seed=2),
    dk.connectivity.random(9, 3, 2, 9, constant_fan_in=True, seed=3),
]
LAYOUTS = [Kind(2, groups, True) for groups in (1, 2, 4, 8)]


def table(packing: pack.Packing, rows: int) -> np.ndarray:
    if packing.table is not None:
        return packing.table * packing.step
    return np.arange(rows + 1) * packing.each * packing.step


@pytest.mark.parametrize("kind", LAYOUTS, ids=str)
@pytest.mark.parametrize("c", NETWORKS, ids=lambda c: f"{c.num_dendrites}x{c.in_features}")
def test_packed_rows_hold_every_synapse_once(c: dk.Connectivity, kind: Kind) -> None:
    packing = pack.pack_rows(c, kind)
    first = table(packing, c.num_dendrites)
    index = packing.index.view(np.uint16).astype(int)
    source = np.arange(c.nnz) if packing.source is None else packing.source
    assert packing.slots == first[-1]
    assert packing.slots % kind.step == 0
    assert packing.has_pads == (packing.slots != c.nnz)
    assert (np.sort(source[source >= 0]) == np.arange(c.nnz)).all()
    assert (index[source < 0] == c.in_features).all()  # the row of zeros
    crow, columns = c.crow_indices.numpy(), c.columns
    for r in range(c.num_dendrites):
        mine = source[first[r] : first[r + 1]]
        assert set(mine[mine >= 0]) == set(range(crow[r], crow[r + 1]))
    kept = source >= 0
    assert (index[kept] == columns[source[kept]]).all()


@pytest.mark.parametrize("kind", LAYOUTS, ids=str)
@pytest.mark.parametrize("somas", [True, False])
@pytest.mark.parametrize("c", NETWORKS, ids=lambda c: f"{c.num_dendrites}x{c.in_features}")
def test_packed_columns_are_the_transpose(c: dk.Connectivity, somas: bool, kind: Kind) -> None:
    packing = pack.pack_columns(c, kind, somas)
    first = table(packing, c.in_features)
    assert packing.source is not None
    assert packing.row is not None
    source, row = packing.source, packing.row
    index = packing.index.view(np.uint16).astype(int)
    kept = source >= 0
    assert (np.sort(source[kept]) == np.arange(c.nnz)).all()
    rows = np.repeat(np.arange(c.num_dendrites), np.diff(c.crow_indices.numpy()))
    assert (row[kept] == rows[source[kept]]).all()
    assert (row[~kept] == 0).all()
    owner = np.repeat(np.arange(c.num_somas), np.diff(c.soma_ptr.numpy()))
    assert (index[kept] == (owner[row[kept]] if somas else row[kept])).all()
    assert (index[~kept] == (c.num_somas if somas else c.num_dendrites)).all()
    column = np.repeat(np.arange(c.in_features), np.diff(first))
    assert (column[kept] == c.columns[source[kept]]).all()


@pytest.mark.parametrize("groups", [4, 8])
def test_groups_seldom_meet_in_a_bank(groups: int) -> None:
    c = dk.connectivity.random(4096, 64, 16, 32, constant_fan_in=True, seed=1)
    kind = Kind(2, groups, True)
    index = pack.pack_rows(c, kind).index.view(np.uint16).astype(int)
    # [steps, groups, chunk]: one place of a chunk is gathered at once by the groups of half a warp
    half = groups // 2
    together = index.reshape(-1, groups, 4).transpose(0, 2, 1).reshape(-1, half) % kind.banks
    ways = np.stack([(together == bank).sum(1) for bank in range(kind.banks)]).max(0).mean()
    assert ways < {2: 1.2, 4: 1.5}[half]  # 1.5 and 2.1 as drawn


def test_indices_have_16_bits_while_the_zero_row_fits() -> None:
    def width(inputs: int, synapses: int) -> int:
        c = dk.connectivity.random(inputs, 2, 2, synapses, constant_fan_in=True, seed=1)
        return int(pack.pack_rows(c, Kind(2, 1, False)).index.itemsize)

    assert width(65535, 5) == 2
    assert width(65536, 5) == 4  # pads would need row 65536
    assert width(65536, 8) == 2
    assert width(65537, 8) == 4
