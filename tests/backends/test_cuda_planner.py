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
DEVICES = [Limits(n, k << 10, (k + 1) << 10, 4 << 20) for k in SHARED for n in (1, 40, 132)]
HOPPER = Limits(132, 227 << 10, 228 << 10, 50 << 20)
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
            int(rng.choice([0, size(2**31)])),
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
            tile, signs = planner.tile_bytes(plan.kind, work), planner.sign_bytes(plan.kind, work)
            assert plan.shared_bytes == plan.kind.shared * (tile + plan.staged * signs)
            assert not plan.staged or 0 < work.sign_rows <= 65536  # 16 bits name every dendrite
            assert plan.tiles * plan.kind.samples >= work.batch
            assert (plan.tiles - 1) * plan.kind.samples < work.batch
            assert plan.parts >= 1
            assert 1 <= plan.blocks <= 2**31 - 1
            assert plan.threads % 32 == 0
            assert plan.threads <= (1024 if plan.kind.shared and work.itemsize < 8 else 512)


@pytest.mark.parametrize("limits", DEVICES, ids=str)
def test_shared_memory_is_used_where_a_tile_fits(limits: Limits) -> None:
    for work in works(100):
        shared = [k for k in KINDS[work.itemsize] if k.shared]
        fits = min(planner.tile_bytes(k, work) for k in shared) <= limits.block_shared
        for plan in plans(work, limits):
            assert plan.kind.shared == fits
            room = limits.block_shared - planner.tile_bytes(plan.kind, work)
            if plan.kind.shared and 0 < work.sign_rows <= 65536:
                assert plan.staged == (planner.sign_bytes(plan.kind, work) <= room)
            if plan.kind.shared:
                assert work.gathered + 1 <= 65536  # 16-bit indices reach every row


def test_a_tile_has_a_row_of_zeros_behind_the_inputs() -> None:
    work = Work(batch=64, gathered=52, outputs=5, rows=15, synapses=240, itemsize=4)
    bytes_ = {kind: shared for kind, shared, _ in planner.tiles_that_fit(work, HOPPER)}
    assert bytes_ == {kind: 53 * kind.samples * 4 for kind in KINDS[4] if kind.shared}


@pytest.mark.parametrize(("dendrites", "staged"), [(65536, True), (65537, False)])
def test_sign_bits_are_staged_while_16_bits_name_every_dendrite(
    dendrites: int, staged: bool
) -> None:
    work = Work(8, 52, 5, 15, 240, 4, sign_rows=dendrites)
    assert any(each for *_, each in planner.tiles_that_fit(work, HOPPER)) == staged


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
                computed[tile, warp * plan.parts + part :: plan.parts * warps] += 1
        assert (computed == 1).all()


@pytest.mark.parametrize("limits", DEVICES, ids=str)
def test_no_block_is_without_work(limits: Limits) -> None:
    for work in works(100):
        for plan in plans(work, limits):
            assert plan.parts <= max(1, planner.count_items(work, plan.kind))


def test_a_wide_layer_gathers_from_l2_without_partial_sums() -> None:
    work = Work(512, 65536, 65536, 65536 * 16, 65536 * 16 * 32, 4)
    plan = planner.plan_weight(work, HOPPER)
    assert not plan.kind.shared
    assert plan.tile_groups == 1


@pytest.mark.parametrize("l2", [4 << 20, 50 << 20])
def test_tiles_in_use_fit_the_l2_cache(l2: int) -> None:
    work = Work(512, 65536, 65536, 65536 * 16, 65536 * 16 * 32, 4)
    limits = Limits(132, 227 << 10, 228 << 10, l2)
    tile_bytes = 65537 * 64 * 4
    plan = planner.plan_tiles(work, limits)
    assert plan.parts >= limits.multiprocessors // max(1, l2 // tile_bytes)
    weight = planner.plan_weight(work, limits)
    assert weight.tile_groups <= max(1, l2 // tile_bytes)
    assert weight.parts * weight.tile_groups >= limits.multiprocessors


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


def unpack(packing: pack.Packing, kind: Kind) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, output and source (-1: a pad) of every slot, walked along as the kernels do."""
    teams = kind.groups >> packing.team_bits
    row, output = np.full((2, packing.slots), -1)
    for item in range(packing.bundles.size - 1):
        for bundle in range(packing.bundles[item], packing.bundles[item + 1]):
            for group in range(kind.groups):
                for step in range(packing.steps[bundle], packing.steps[bundle + 1]):
                    first = step * kind.step + group * kind.chunk
                    row[first : first + kind.chunk] = packing.rows[bundle * kind.groups + group]
                    team = item * teams + (group >> packing.team_bits)
                    output[first : first + kind.chunk] = packing.outputs[team]
    source = np.arange(packing.slots) if packing.source is None else packing.source
    return row, output, source


def check_structure(packing: pack.Packing, kind: Kind, owners: np.ndarray) -> None:
    """Every output and every row once; outputs own the rows of their items."""
    assert packing.slots == packing.steps[-1] * kind.step
    assert packing.bundles[-1] == packing.steps.size - 1
    outputs = packing.outputs[packing.outputs >= 0]
    assert (np.sort(outputs) == np.arange(owners.size - 1)).all()
    rows = packing.rows[packing.rows >= 0]
    assert (np.sort(rows) == np.arange(owners[-1])).all()
    owner = np.repeat(np.arange(owners.size - 1), np.diff(owners))
    teams = kind.groups >> packing.team_bits
    bundle_item = np.repeat(np.arange(packing.bundles.size - 1), np.diff(packing.bundles))
    group = np.arange(packing.rows.size) % kind.groups
    item = np.repeat(bundle_item, kind.groups)
    team = packing.outputs[item * teams + (group >> packing.team_bits)]
    has_row = packing.rows >= 0
    assert (team[has_row] == owner[rows]).all()


@pytest.mark.parametrize("kind", LAYOUTS, ids=str)
@pytest.mark.parametrize("somas", [True, False])
@pytest.mark.parametrize("c", NETWORKS, ids=lambda c: f"{c.num_dendrites}x{c.in_features}")
def test_packed_rows_hold_every_synapse_once(c: dk.Connectivity, somas: bool, kind: Kind) -> None:
    packing = pack.pack_rows(c, kind, somas)
    row, _, source = unpack(packing, kind)
    check_structure(packing, kind, c.soma_ptr.numpy() if somas else np.arange(c.num_dendrites + 1))
    index = packing.index.view(np.uint16).astype(int)
    kept = source >= 0
    assert packing.has_pads == (packing.slots != c.nnz)
    assert (np.sort(source[kept]) == np.arange(c.nnz)).all()
    assert (index[~kept] == c.in_features).all()  # the row of zeros
    rows = np.repeat(np.arange(c.num_dendrites), np.diff(c.crow_indices.numpy()))
    assert (row[kept] == rows[source[kept]]).all()
    assert (index[kept] == c.columns[source[kept]]).all()


@pytest.mark.parametrize("kind", LAYOUTS, ids=str)
@pytest.mark.parametrize("somas", [True, False])
@pytest.mark.parametrize("c", NETWORKS, ids=lambda c: f"{c.num_dendrites}x{c.in_features}")
def test_packed_columns_are_the_transpose(c: dk.Connectivity, somas: bool, kind: Kind) -> None:
    packing = pack.pack_columns(c, kind, somas, True)
    column, output, source = unpack(packing, kind)
    check_structure(packing, kind, np.arange(c.in_features + 1))
    assert (np.diff(packing.bundles) <= 1).all()  # backward_input takes an item for a bundle
    index = packing.index.view(np.uint16).astype(int)
    kept = source >= 0
    assert (np.sort(source[kept]) == np.arange(c.nnz)).all()
    assert (column[kept] == c.columns[source[kept]]).all()
    assert (output[kept] == column[kept]).all()
    rows = np.repeat(np.arange(c.num_dendrites), np.diff(c.crow_indices.numpy()))[source[kept]]
    owner = np.repeat(np.arange(c.num_somas), np.diff(c.soma_ptr.numpy()))
    assert (index[kept] == (owner[rows] if somas else rows)).all()
    assert (index[~kept] == (c.num_somas if somas else c.num_dendrites)).all()
    if somas:
        assert packing.dendrite is not None
        dendrite = packing.dendrite.view(np.uint16).astype(int)
        assert (dendrite[kept] == rows).all()
        assert (dendrite[~kept] == 0).all()
    else:
        assert packing.dendrite is None


@pytest.mark.parametrize("dendrites", [1, 2, 3, 12, 16])
def test_groups_share_somas_with_few_dendrites(dendrites: int) -> None:
    c = dk.connectivity.random(60, 24, dendrites, 8, constant_fan_in=True, seed=1)
    packing = pack.pack_rows(c, Kind(2, 8, True), True)
    assert 1 << packing.team_bits == {1: 1, 2: 2, 3: 1, 12: 4, 16: 8}[dendrites]
    assert (packing.rows >= 0).all()


def test_one_large_soma_does_not_pad_all_others() -> None:
    members = np.array([64] + [1] * 640)
    crow = np.arange(members.sum() + 1) * 8
    columns = np.tile(np.arange(8), members.sum())
    ends = np.concatenate([[0], np.cumsum(members)])
    c = dk.Connectivity.from_csr(crow.tolist(), columns.tolist(), 9, soma_ptr=ends.tolist())
    assert pack.pack_rows(c, Kind(2, 8, True), True).slots < 1.7 * c.nnz


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_rows_of_varying_length_take_few_pads(groups: int) -> None:
    """Rows of a bundle have about the same length: to the pads of whole chunks come few more."""
    c = dk.connectivity.random(784, 256, 16, 16, seed=1)
    kind = Kind(2, groups, True)
    fan_in = np.diff(c.crow_indices.numpy())
    least = int((-(-fan_in // kind.chunk) * kind.chunk).sum())
    assert pack.pack_rows(c, kind, True).slots <= (1.2 if groups == 8 else 1.1) * least
    counts = np.bincount(c.columns, minlength=784)
    least = int((-(-counts // kind.chunk) * kind.chunk).sum())
    assert pack.pack_columns(c, kind, True, True).slots <= 1.1 * least


# Wavefronts of shared memory for one gather of a warp: 2 are the least for 32 lanes of 8 bytes, and
# 3.0 (4 groups) and 4.3 (8 groups) the mean of random rows.
MOST = {"A": {1: 2.0, 2: 2.0, 4: 2.3, 8: 2.95}, "D": {1: 2.0, 2: 2.0, 4: 2.2, 8: 2.7}}


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("size", MOST)
def test_groups_seldom_meet_in_a_bank(groups: int, size: str) -> None:
    inputs, dendrites, synapses = {"A": (784, 16, 16), "D": (4096, 16, 32)}[size]
    c = dk.connectivity.random(inputs, 64, dendrites, synapses, constant_fan_in=True, seed=1)
    kind = Kind(2, groups, True)
    index = pack.pack_rows(c, kind, True).index.view(np.uint16).astype(int)
    assert wavefronts(index, kind) <= MOST[size][groups]


def wavefronts(index: np.ndarray, kind: Kind) -> float:
    """Mean over the gathers: half a warp at a time, equal rows cost once."""
    gathers = index.reshape(-1, kind.groups, kind.chunk).transpose(0, 2, 1)
    total = 0.0
    for half in np.split(gathers, 2, axis=2) if kind.groups > 1 else [gathers, gathers]:
        rows = np.sort(half.reshape(-1, half.shape[2]), axis=1)
        is_new = np.append(np.ones((len(rows), 1), bool), np.diff(rows, axis=1) != 0, axis=1)
        ways = [(is_new & (rows % kind.banks == bank)).sum(1) for bank in range(kind.banks)]
        total += float(np.max(ways, axis=0).mean())
    return total


def test_indices_have_16_bits_while_the_zero_row_fits() -> None:
    def width(inputs: int, synapses: int) -> int:
        c = dk.connectivity.random(inputs, 2, 2, synapses, constant_fan_in=True, seed=1)
        return int(pack.pack_rows(c, Kind(2, 1, False), True).index.itemsize)

    assert width(65535, 5) == 2
    assert width(65536, 5) == 4  # pads would need row 65536
    assert width(65536, 8) == 2
    assert width(65537, 8) == 4


def test_dendrites_have_16_bits_where_their_signs_are_staged() -> None:
    c = dk.connectivity.random(30, 2, 3, 2, constant_fan_in=True, seed=1)
    for staged, size in ((True, 2), (False, 4)):
        packing = pack.pack_columns(c, Kind(2, 4, True), True, staged)
        assert packing.dendrite is not None
        assert packing.dendrite.itemsize == size
        assert packing.index.itemsize == 2
