"""The blocked transpose of a connectivity: what backward gathers the input gradient from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import numpy as np
import torch

from ._validate import SIZE_LIMIT, Array

# Dendrites per block, measured on AVX-512: with fewer synapses in a column, reading x and dx takes
# longer than all else; more dendrites than the most do not leave their q in L2; fewer than the
# least (5 % slower than the usual 1024) are not worth a thread. Many synapses per dendrite fill
# such blocks with fewer dendrites, whose q then stay in L1.
_LEAST_ROWS, _USUAL_ROWS, _MOST_ROWS = 512, 1024, 8192
_SYNAPSES_PER_COLUMN = 16
_NARROW_SLOTS = (1 << 16) - 1  # of a block, so that each is a uint16
_MOST_PADDED = 1.25  # slots per synapse; with more, pads take what groups of four save, and memory
_PARALLEL_NNZ = 1 << 20  # below this, starting threads costs more than it saves


@dataclass(frozen=True, eq=False)
class TransposedPlan:
    """The synapses of each block of dendrites, grouped by input column (read-only arrays).

    Backward gathers the gradient of an input from its column's slots, block after block, without
    atomics. Slots of a block run column by column in the order of `column`, and by ascending row
    within a column. The pads that fill a column's last group repeat the column's first row; those
    at the end of a block have row 0. Slots and synapses are uint16 where no block has more than
    65535 slots, else int32.
    """

    block_rows: int  # dendrites per block; the last block may be shorter
    group: int  # 4 or 1: a column's slots within a block are padded to a multiple of it
    column_ptr: Array  # int64 [blocks + 1]: block b visits column[column_ptr[b]:column_ptr[b + 1]]
    column: Array  # uint16 or int32 [C]: ascending in a block, only columns with a synapse there
    groups: Array  # uint16 [C]: groups of slots of that column in that block
    slot_ptr: Array  # int64 [blocks + 1], multiples of 16: block b owns slot_ptr[b]:slot_ptr[b + 1]
    row: Array  # uint16 [slots]: dendrite counted from its block's first
    slot: Array  # [nnz]: CSR position -> slot counted from its block's first
    synapse: Array  # [slots]: CSR position counted from its block's first; a pad's is past the last


def choose_block_rows(rows: int, inputs: int, nnz: int, threads: int) -> int:
    """Dendrites per block of the plan for `rows` dendrites; every thread gets as many blocks."""
    fan_in = max(1.0, nnz / rows)
    narrow = max(1.0, _NARROW_SLOTS / (1.125 * fan_in))  # with pads
    wanted = max(min(_USUAL_ROWS, narrow), _SYNAPSES_PER_COLUMN * inputs / fan_in)
    wanted = min(_MOST_ROWS, wanted)
    if 0.8 * wanted <= narrow:
        wanted = min(wanted, narrow)
    blocks = threads * math.ceil(rows / (threads * wanted))
    return math.ceil(max(min(_LEAST_ROWS, wanted), rows / blocks))


def build_transposed_plan(crow: Array, columns: Array, block_rows: int) -> TransposedPlan:
    """Group CSR synapses (crow [R + 1], columns uint16 or int32 [nnz]) by column in blocks."""
    rows, nnz = crow.size - 1, columns.size
    starts = np.append(np.arange(0, rows, block_rows), rows)  # first row of each block, and the end
    edges = crow[starts].astype(np.int64)
    slot = np.empty(nnz, np.int32)

    def rank(b: int) -> tuple[Array, Array]:
        """Write slots as if without pads; return the block's columns and their counts."""
        part = columns[edges[b] : edges[b + 1]]
        order = _stable_argsort(part)
        part = part[order]
        slot[edges[b] : edges[b + 1]][order] = np.arange(part.size, dtype=np.int32)
        is_first = np.ones(part.size, np.bool_)
        np.not_equal(part[1:], part[:-1], out=is_first[1:])
        first = np.flatnonzero(is_first)
        return part[first], np.diff(first, append=part.size).astype(np.uint16)

    def fill(b: int) -> None:
        """Write the rows and synapses of block b, having shifted each column's slots to make room
        for pads."""
        slots, out = slot[edges[b] : edges[b + 1]], row[slot_ptr[b] : slot_ptr[b + 1]]
        local_crow = crow[starts[b] : starts[b + 1] + 1]
        local_row = np.repeat(np.arange(local_crow.size - 1, dtype=np.uint16), np.diff(local_crow))
        if group > 1:
            lengths, begin = groups[b] * group, np.cumsum(counts[b], dtype=np.int64) - counts[b]
            shift = np.cumsum(lengths, dtype=np.int64) - lengths - begin
            by_column = np.empty_like(local_row)
            by_column[slots] = local_row
            out[: lengths.sum(dtype=np.int64)] = np.repeat(by_column[begin], lengths)  # the pads
            slots += np.repeat(shift.astype(np.int32), counts[b])[slots]
        out[slots] = local_row
        of_block = synapse[slot_ptr[b] : slot_ptr[b + 1]]
        of_block.fill(slots.size)
        of_block[slots] = np.arange(slots.size, dtype=synapse.dtype)

    with ThreadPoolExecutor(torch.get_num_threads() if nnz > _PARALLEL_NNZ else 1) as pool:
        blocks = range(starts.size - 1)
        found = list(pool.map(rank, blocks))
        columns_of, counts = [part for part, _ in found], [count for _, count in found]
        in_fours = sum(int(((count + 3) // 4).sum(dtype=np.int64)) for count in counts) * 4
        group = 4 if in_fours <= min(_MOST_PADDED * nnz, SIZE_LIMIT - 1) else 1
        groups = [(count + (group - 1)) // group for count in counts]
        totals = [int(part.sum(dtype=np.int64)) * group for part in groups]
        slot_ptr = _offsets([-(-total // 16) * 16 for total in totals])
        narrow = np.uint16 if max(totals) <= _NARROW_SLOTS else np.int32
        row, synapse = np.zeros(slot_ptr[-1], np.uint16), np.empty(slot_ptr[-1], narrow)
        list(pool.map(fill, blocks))
    plan = TransposedPlan(
        block_rows, group, _offsets([part.size for part in columns_of]), np.concatenate(columns_of),
        np.concatenate(groups), slot_ptr, row, slot.astype(narrow, copy=False), synapse,
    )  # fmt: skip
    for field in fields(plan):
        value = getattr(plan, field.name)
        if isinstance(value, np.ndarray):
            value.flags.writeable = False
    return plan


def _stable_argsort(columns: Array) -> Array:
    """Stable order by radix passes over 16 bits, where numpy's sort takes linear time."""
    if columns.dtype == np.uint16:
        return np.argsort(columns, kind="stable")
    low = np.argsort(columns.astype(np.uint16), kind="stable")
    high = (columns >> 16).astype(np.uint16)[low]
    return low[np.argsort(high, kind="stable")]


def _offsets(sizes: Sequence[int]) -> Array:
    """[n] sizes -> [n + 1] int64 offsets."""
    return np.cumsum([0, *sizes], dtype=np.int64)
