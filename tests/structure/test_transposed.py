"""The blocked transpose of a connectivity, against one made of Python lists and dictionaries."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch

from dendrite_kernels import transposed
from dendrite_kernels.structure import Connectivity
from dendrite_kernels.transposed import (
    TransposedPlan,
    build_transposed_plan,
    choose_block_rows,
)

Array = np.ndarray[Any, np.dtype[Any]]


def from_mask(rows: int, inputs: int, density: float, seed: int = 0) -> Connectivity:
    rng = np.random.default_rng(seed)
    return Connectivity.from_mask(rng.random((rows, inputs)) < density)


def naive_plan(c: Connectivity, block_rows: int) -> dict[str, Any]:
    """The plan by loops over blocks, columns and synapses, straight from its definition."""
    crow, col = c.crow_indices.tolist(), c.col_indices.tolist()
    blocks = []
    for first in range(0, c.num_dendrites, block_rows):
        by_column: dict[int, list[tuple[int, int]]] = {}  # column -> (row in block, CSR position)
        for row in range(first, min(first + block_rows, c.num_dendrites)):
            for position in range(crow[row], crow[row + 1]):
                by_column.setdefault(col[position], []).append((row - first, position))
        blocks.append(by_column)
    in_fours = sum(-(-len(found) // 4) * 4 for block in blocks for found in block.values())
    group = 4 if in_fours <= 1.25 * c.nnz else 1
    column_ptr, column, groups, slot_ptr, row_of, synapse = [0], [], [], [0], [], []
    slot = [-1] * c.nnz
    for b, block in enumerate(blocks):
        rows: list[int] = []
        begin, end = crow[b * block_rows], crow[min((b + 1) * block_rows, c.num_dendrites)]
        for number in sorted(block):
            column.append(number)
            found = sorted(block[number])
            groups.append(-(-len(found) // group))
            for i, (_, position) in enumerate(found):
                slot[position] = len(rows) + i
            rows += [row for row, _ in found]
            synapse += [position - begin for _, position in found]
            rows += [found[0][0]] * (groups[-1] * group - len(found))
            synapse += [end - begin] * (groups[-1] * group - len(found))
        synapse += [end - begin] * (-len(rows) % 16)
        rows += [0] * (-len(rows) % 16)
        row_of += rows
        column_ptr.append(len(column))
        slot_ptr.append(len(row_of))
    return {
        "block_rows": block_rows, "group": group, "column_ptr": column_ptr, "column": column,
        "groups": groups, "slot_ptr": slot_ptr, "row": row_of, "slot": slot,
        "synapse": synapse,
    }  # fmt: skip


def block_rows_of(c: Connectivity) -> int:
    return choose_block_rows(c.num_dendrites, c.in_features, c.nnz, torch.get_num_threads())


def assert_same_plan(plan: TransposedPlan, expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        found = getattr(plan, name)
        assert (found.tolist() if isinstance(found, np.ndarray) else found) == value, name


def clustered(rows: int, inputs: int, seed: int) -> Connectivity:
    """Columns in a narrow band, and every third row and a whole stretch of rows empty."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((rows, inputs), bool)
    band = rng.integers(0, inputs, 5)
    mask[:, band] = rng.random((rows, 5)) < 0.8
    mask[::3] = False
    mask[rows // 4 : rows // 2] = False
    return Connectivity.from_mask(mask)


AWKWARD: dict[str, Connectivity] = {
    "1 x 1": Connectivity.from_csr([0, 1], [0], 1),
    "1 x 1 empty": Connectivity.from_csr([0, 0], [], 1),
    "no synapse in two blocks": Connectivity.from_csr([0] * 1031, [], 9),
    "one row": from_mask(1, 50, 0.5),
    "one column": from_mask(1500, 1, 0.7),
    "one short of a block": from_mask(511, 7, 0.3),
    "a block": from_mask(512, 7, 0.3),
    "one more than a block": from_mask(513, 7, 0.3),
    "dense": from_mask(1100, 3, 2.0),
    "sparse": from_mask(2500, 900, 0.002),
    "empty rows and blocks": clustered(5000, 40, 1),
    "just large": from_mask(4096, 7, 0.01),
    "65536 columns": Connectivity.from_csr([0, 2, 4], [0, 65535, 5, 65535], 65536),
    "65537 columns": Connectivity.from_csr([0, 2, 4], [0, 65536, 5, 65536], 65537),
    "columns that differ in high bits": Connectivity.from_csr(
        [0, 4, 8, 12], [1, 65537, 131073, 131074] * 3, 200_000
    ),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_plan_of_awkward_networks(name: str) -> None:
    c = AWKWARD[name]
    plan = c.transposed
    assert plan is c.transposed
    assert_same_plan(plan, naive_plan(c, block_rows_of(c)))
    narrow = np.uint16 if c.in_features <= 65536 else np.int32
    dtypes = {
        "column_ptr": np.int64, "column": narrow, "groups": np.uint16,
        "slot_ptr": np.int64, "row": np.uint16, "slot": np.uint16, "synapse": np.uint16,
    }  # fmt: skip
    for field, dtype in dtypes.items():
        array = getattr(plan, field)
        assert array.dtype == dtype, field
        assert array.flags.c_contiguous, field
        assert not array.flags.writeable, field


def test_awkward_networks_cover_both_groups() -> None:
    assert {c.transposed.group for c in AWKWARD.values()} == {1, 4}


@pytest.mark.parametrize("seed", range(60))
def test_plan_of_random_networks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, inputs = (int(n) for n in rng.integers(1, 80, 2))
    c = from_mask(rows, inputs, float(rng.choice([0.0, 0.02, 0.2, 0.9])), seed)
    block_rows = int(rng.choice([1, 2, 7, 16, 64]))
    plan = build_transposed_plan(c.crow_indices.numpy(), c.columns, block_rows)
    assert_same_plan(plan, naive_plan(c, block_rows))


def test_plan_group_is_four_up_to_one_and_a_quarter_of_the_synapses() -> None:
    def with_counts(*counts: int) -> Connectivity:
        return Connectivity.from_mask(np.arange(max(counts))[:, None] < np.array(counts))

    assert with_counts(4, 4, 4).transposed.group == 4
    assert with_counts(4, 4, 4, 4, 3, 1).transposed.group == 4  # 24 slots for 20: 1.2
    assert with_counts(4, 4, 2, 4, 2).transposed.group == 4  # 20 slots for 16: exactly 1.25
    assert with_counts(4, 4, 2, 4, 1).transposed.group == 1  # 20 slots for 15


def gather(c: Connectivity, weight: Array, per_row: Array) -> Array:
    """The gradient of the inputs [N] as a backend computes it, pads and all."""
    plan = c.transposed
    out = np.zeros(c.in_features)
    for b in range(plan.slot_ptr.size - 1):
        first = b * plan.block_rows
        last = min(first + plan.block_rows, c.num_dendrites)
        synapses = slice(int(c.crow_indices[first]), int(c.crow_indices[last]))
        rows = plan.row[plan.slot_ptr[b] : plan.slot_ptr[b + 1]].astype(np.int64)
        padded = np.zeros(rows.size)  # a pad has weight 0, whatever its row
        padded[plan.slot[synapses]] = weight[synapses]
        terms = padded * per_row[first:last][rows]
        visits = slice(int(plan.column_ptr[b]), int(plan.column_ptr[b + 1]))
        columns = np.repeat(plan.column[visits], plan.groups[visits].astype(np.int64) * plan.group)
        np.add.at(out, columns, terms[: columns.size])
    return out


@pytest.mark.parametrize("name", AWKWARD)
def test_plan_gathers_the_gradient_of_the_inputs(name: str) -> None:
    c = AWKWARD[name]
    rng = np.random.default_rng(5)
    weight, per_row = rng.standard_normal(c.nnz), rng.standard_normal(c.num_dendrites)
    expected = c.to_scipy(weight).T @ per_row
    np.testing.assert_allclose(gather(c, weight, per_row), expected, rtol=1e-12, atol=1e-12)


def large(rows: int, inputs: int, k: int) -> Connectivity:
    """K columns in every row, one in each of K equal ranges of the inputs."""
    step = inputs // k
    steps = np.arange(k, dtype=np.int32) * step
    col = np.random.default_rng(0).integers(0, step, (rows, k), dtype=np.int32) + steps
    return Connectivity.from_csr(np.arange(rows + 1) * k, col.ravel(), inputs)


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 7, 64])
@pytest.mark.parametrize(
    ("rows", "inputs", "fan_in", "usual"),
    [
        (4096, 784, 16, 1024),
        (32768, 784, 16, 1024),
        (16384, 3072, 48, 1024),
        (65536, 4096, 32, 1821),  # 2048 would not be narrow
        (65536, 8192, 32, 4096),
        (1 << 20, 65536, 32, 8192),
        (4096, 784, 392, 149),  # 1024 would not be narrow
        (4096, 65536, 65536, 16),  # as many as a column wants synapses
        (1, 1, 1, 1024),
        (5000, 100, 0, 1600),
    ],
)
def test_blocks_have_enough_synapses_per_column_and_are_shared_by_threads(
    rows: int, inputs: int, fan_in: int, usual: int, threads: int
) -> None:
    chosen = choose_block_rows(rows, inputs, rows * fan_in, threads)
    least = min(512, usual)
    assert least <= chosen <= max(least, usual)
    each = math.ceil(rows / chosen / threads)  # blocks, of the thread with most of them
    assert chosen == least or each * chosen < rows / threads + each
    if rows >= threads * usual:
        assert chosen > usual / 2


def test_plan_of_blocks_with_many_slots_is_wide() -> None:
    c = large(3000, 4000, 40)
    for block_rows, dtype in ((1024, np.uint16), (2048, np.int32)):
        plan = build_transposed_plan(c.crow_indices.numpy(), c.columns, block_rows)
        assert plan.slot.dtype == plan.synapse.dtype == dtype
        assert_same_plan(plan, naive_plan(c, block_rows))


@pytest.mark.parametrize(("rows", "dtype"), [(16_380, np.uint16), (16_384, np.int32)])
def test_plan_of_one_block_at_the_limit_of_16_bits(rows: int, dtype: type) -> None:
    """Of 65,520 slots, and of 65,536, which 16 bits could number but not count."""
    c = Connectivity.from_mask(np.ones((rows, 4), np.bool_))
    plan = build_transposed_plan(c.crow_indices.numpy(), c.columns, rows)
    assert plan.slot.dtype == plan.synapse.dtype == dtype
    assert_same_plan(plan, naive_plan(c, rows))


@pytest.mark.parametrize(("inputs", "group"), [(2000, 4), (65536, 1), (200_000, 1)])
def test_plan_of_large_networks_built_by_threads(inputs: int, group: int) -> None:
    c = large(40_000, inputs, 32)
    assert c.nnz > transposed._PARALLEL_NNZ
    plan = c.transposed
    assert plan.group == group
    row_of = np.repeat(np.arange(c.num_dendrites), 32)
    block = row_of // plan.block_rows
    slots = plan.slot_ptr[block] + plan.slot
    assert np.unique(slots).size == c.nnz
    assert np.array_equal(plan.row[slots] + block * plan.block_rows, row_of)
    # In slot order synapses are sorted by block, column and row.
    order = np.argsort(slots)
    assert np.array_equal(order, np.lexsort((row_of, c.columns, block)))
    weight = np.random.default_rng(1).standard_normal(c.nnz)
    per_row = np.random.default_rng(2).standard_normal(c.num_dendrites)
    np.testing.assert_allclose(
        gather(c, weight, per_row), c.to_scipy(weight).T @ per_row, rtol=1e-9, atol=1e-9
    )
    rows = 2 * plan.block_rows
    crow, columns = c.crow_indices.numpy()[: rows + 1], c.columns[: rows * 32]
    serial = build_transposed_plan(crow, columns, plan.block_rows)
    assert np.array_equal(serial.column, plan.column[: plan.column_ptr[2]])
    assert np.array_equal(serial.row, plan.row[: plan.slot_ptr[2]])


def test_plan_and_construction_are_lean() -> None:
    c = large(60_000, 65536, 32)
    tracemalloc.start()
    try:
        crow, col = c.crow_indices, c.col_indices
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        again = Connectivity.from_csr(crow, col, c.in_features)
        construction = tracemalloc.get_traced_memory()[1] - before
        assert again.columns.size == c.nnz
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        plan = again.transposed
        build = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    arrays = [value for value in vars(plan).values() if isinstance(value, np.ndarray)]
    assert construction < 2 * col.numpy().nbytes
    assert build < 3 * sum(array.nbytes for array in arrays)
