"""Synapses in the order in which CUDA kernels read them.

A row is padded to whole steps, so that every load is 16 bytes wide and aligned. Pads point at the
row of zeros behind a tile and have weight 0. Where groups of lanes gather different synapses at the
same time, these are dealt out so that they seldom meet in one bank of shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...structure import Connectivity
from .plan import Kind

Array = np.ndarray[Any, np.dtype[Any]]

_CHUNK = 4  # neighbouring slots of one group within a step


@dataclass(frozen=True, eq=False)
class Packing:
    """Packed synapses of some rows; slots are counted over all rows."""

    step: int
    each: int  # steps of every row if table is None
    table: Array | None  # int32 [rows + 1]: first step of each row
    index: Array  # int16 (to be read as uint16) or int32 [slots]: row of the tile to gather
    source: Array | None  # int32 [slots]: CSR position, -1 for a pad; None: slots are positions
    row: Array | None  # int32 [slots]: dendrite (0 for a pad), in a transposed packing
    has_pads: bool

    @property
    def slots(self) -> int:
        return int(self.index.size)


def pack_rows(connectivity: Connectivity, kind: Kind) -> Packing:
    """The synapses of each dendrite, as they gather inputs."""
    crow, columns = connectivity.crow_indices.numpy(), connectivity.columns
    return _pack(crow, columns, connectivity.in_features, kind, None, None)


def pack_columns(connectivity: Connectivity, kind: Kind, somas: bool) -> Packing:
    """The synapses of each input, as they gather somas (dendrites, unless `somas`)."""
    columns = connectivity.columns
    counts = np.bincount(columns, minlength=connectivity.in_features)
    crow = np.concatenate([[0], np.cumsum(counts)])
    order = np.argsort(columns, kind="stable").astype(np.int32)
    fan_in = np.diff(connectivity.crow_indices.numpy())
    row = np.repeat(np.arange(fan_in.size, dtype=np.int32), fan_in)[order]
    if not somas:
        return _pack(crow, row, connectivity.num_dendrites, kind, order, row)
    members = np.diff(connectivity.soma_ptr.numpy())
    soma = np.repeat(np.arange(members.size, dtype=np.int32), members)
    return _pack(crow, soma[row], connectivity.num_somas, kind, order, row)


def _pack(
    crow: Array, index: Array, gathered: int, kind: Kind, position: Array | None, row: Array | None
) -> Packing:
    """Rows crow [rows + 1] of indices [nnz] < gathered; `position` is None for CSR order itself."""
    lengths = np.diff(crow).astype(np.int64)
    steps = -(-lengths // kind.step)
    table = np.concatenate([[0], np.cumsum(steps)])
    slots = int(table[-1]) * kind.step
    has_pads = slots != index.size
    limit = gathered + 1 if has_pads else gathered
    dtype = np.uint16 if limit <= 65536 else np.int32
    is_constant = bool((steps == steps[0]).all())
    ordered = kind.groups == 1 and not has_pads  # slots are positions
    packed_index = np.full(slots, gathered if has_pads else 0, dtype)
    source = np.full(slots, -1, np.int32)
    packed_row = None if row is None else np.zeros(slots, np.int32)
    slot = slice(None) if ordered else _slots(lengths, table, index, kind)
    packed_index[slot] = index
    source[slot] = np.arange(index.size, dtype=np.int32) if position is None else position
    if packed_row is not None and row is not None:
        packed_row[slot] = row
    return Packing(
        step=kind.step,
        each=int(steps[0]) if is_constant else 0,
        table=None if is_constant else table.astype(np.int32),
        index=packed_index.view(np.int16) if dtype == np.uint16 else packed_index,
        source=None if ordered and position is None else source,
        row=packed_row,
        has_pads=has_pads,
    )


def _slots(lengths: Array, table: Array, index: Array, kind: Kind) -> Array:
    """Slot of each synapse: in order, or group by bank."""
    rows = np.repeat(np.arange(lengths.size), lengths)
    first = table[:-1] * kind.step  # slot
    if kind.groups == 1:
        start = np.cumsum(lengths) - lengths
        slots: Array = first[rows] + np.arange(index.size) - start[rows]
        return slots
    # The tile's row n lies in the banks n % banks: the groups of that remainder gather it, in turn,
    # while they have room.
    banks, sharing = kind.banks, kind.groups // kind.banks
    bank = index.astype(np.int64) % banks
    key = rows * banks + bank
    order = np.argsort(key, kind="stable")
    rank = np.empty(index.size, np.int64)
    rank[order] = _rank_in_run(key[order])
    room = np.diff(table)[rows] * _CHUNK * sharing
    group, place = bank + rank % sharing * banks, rank // sharing
    slots = first[rows] + place // _CHUNK * kind.step + group * _CHUNK + place % _CHUNK
    left = np.flatnonzero(rank >= room)  # these fill what stays free in their row
    is_free = np.ones(int(table[-1]) * kind.step, np.bool_)
    is_free[slots[rank < room]] = False
    free = np.flatnonzero(is_free)
    first_free = np.searchsorted(free, first)
    slots[left] = free[first_free[rows[left]] + _rank_in_run(rows[left])]
    return slots


def _rank_in_run(keys: Array) -> Array:
    """Position of each element in its run of equal, ascending keys."""
    if keys.size == 0:
        return keys
    is_first = np.append(True, keys[1:] != keys[:-1])
    start = np.flatnonzero(is_first)
    return np.arange(keys.size) - np.repeat(start, np.diff(start, append=keys.size))
