"""Synapses in the order in which CUDA kernels read them; csrc/cuda/arguments.h names the arrays.

A warp computes the outputs of one item. Its groups of lanes take the rows of a bundle side by side,
a chunk of synapses of every row in each step, so that every load is wide and aligned. A bundle is
as long as its longest row: rows of about the same length go together. Pads point at the row of
zeros behind a tile and have weight 0. Groups gather at the same time: the synapses of a row are
ordered so that these seldom meet in one bank of shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...structure import Connectivity
from .plan import Kind

Array = np.ndarray[Any, np.dtype[Any]]

_WINDOW = 64  # neighbouring outputs of which those of the same length share a warp


@dataclass(frozen=True, eq=False)
class Packing:
    """Packed synapses of some rows; slots are counted over all rows."""

    team_bits: int  # 2**team_bits groups of lanes work for one output
    outputs: Array  # int32 [items * teams]: -1 for none
    bundles: Array  # int32 [items + 1]: first bundle of each item
    rows: Array  # int32 [bundles * groups]: -1 for none
    steps: Array  # int32 [bundles + 1]: first step of each bundle
    index: Array  # int16 (to be read as uint16) or int32 [slots]: row of the tile to gather
    dendrite: Array | None  # int16 or int32 [slots], 0 for a pad, in a transposed packing of somas
    source: Array | None  # int32 [slots]: CSR position, -1 for a pad; None: slots are positions
    has_pads: bool

    @property
    def slots(self) -> int:
        return int(self.index.size)


def pack_rows(connectivity: Connectivity, kind: Kind, somas: bool) -> Packing:
    """The synapses of each dendrite, as they gather inputs for somas (for u, unless `somas`)."""
    crow = connectivity.crow_indices.numpy()
    owners = connectivity.soma_ptr.numpy() if somas else np.arange(crow.size)
    return _pack(crow, connectivity.columns, connectivity.in_features, owners, kind, None, None)


def pack_columns(connectivity: Connectivity, kind: Kind, somas: bool, staged: bool) -> Packing:
    """The synapses of each input, as they gather somas (dendrites, unless `somas`).

    `staged`: the dendrites' sign bits are in shared memory, and 16 bits name a dendrite.
    """
    columns = connectivity.columns
    counts = np.bincount(columns, minlength=connectivity.in_features)
    crow = np.concatenate([[0], np.cumsum(counts)])
    order = np.argsort(columns, kind="stable").astype(np.int32)
    fan_in = np.diff(connectivity.crow_indices.numpy())
    row = np.repeat(np.arange(fan_in.size, dtype=np.int32), fan_in)[order]
    owners = np.arange(crow.size)
    if not somas:
        return _pack(crow, row, fan_in.size, owners, kind, order, None)
    members = np.diff(connectivity.soma_ptr.numpy())
    soma = np.repeat(np.arange(members.size, dtype=np.int32), members)
    dendrite = row.astype(np.uint16) if staged else row
    return _pack(crow, soma[row], members.size, owners, kind, order, dendrite)


def _pack(
    crow: Array, index: Array, gathered: int, owners: Array, kind: Kind, position: Array | None,
    dendrite: Array | None,
) -> Packing:  # fmt: skip
    """Rows crow [rows + 1] of indices [nnz] < gathered; output i owns rows owners[i : i + 2].

    `position` is None for CSR order itself.
    """
    lengths = np.diff(crow).astype(np.int64)
    chunks = -(-lengths // kind.chunk)
    members = np.diff(owners).astype(np.int64)
    team_bits = _team_bits(kind, members)
    team, teams = 1 << team_bits, kind.groups >> team_bits
    outputs = _by_length(np.add.reduceat(np.append(chunks, 0), owners[:-1]) * (members > 0), teams)
    items = -(-members.size // teams)
    place = np.empty(members.size, np.int64)  # of an output: item * teams + team
    place[outputs] = np.arange(members.size)

    # A row's place among those of its output, the longest first; then its bundle and group.
    owner = np.repeat(np.arange(members.size), members)
    ordered = np.lexsort((-chunks, owner)) if kind.groups > 1 else np.arange(lengths.size)
    rank = np.empty(lengths.size, np.int64)
    rank[ordered] = np.arange(lengths.size) - np.repeat(owners[:-1], members)
    item = place[owner] // teams
    bundle_counts = np.zeros(items, np.int64)
    np.maximum.at(bundle_counts, place // teams, -(-members // team))
    bundles = _starts(bundle_counts)
    bundle = bundles[item] + rank // team
    group = place[owner] % teams * team + rank % team

    rows = np.full(int(bundles[-1]) * kind.groups, -1, np.int32)
    rows[bundle * kind.groups + group] = np.arange(lengths.size)
    step_counts = np.zeros(int(bundles[-1]), np.int64)
    np.maximum.at(step_counts, bundle, chunks)
    steps = _starts(step_counts)

    slots = int(steps[-1]) * kind.step
    has_pads = slots != index.size
    ordered_slots = kind.groups == 1 and not has_pads  # slots are positions
    dtype = np.uint16 if gathered + has_pads <= 65536 else np.int32
    synapse_row = np.repeat(np.arange(lengths.size), lengths)
    room = step_counts[bundle] * kind.chunk  # of a row
    at = _places(synapse_row, lengths, room, group, index, kind)
    slot = (
        (steps[bundle][synapse_row] + at // kind.chunk) * kind.step
        + group[synapse_row] * kind.chunk
        + at % kind.chunk
    )

    def packed(values: Array, pad: int, dtype: Any) -> Array:
        out = np.full(slots, pad, dtype)
        out[slot] = values
        return out.view(np.int16) if dtype == np.uint16 else out

    source = np.arange(index.size, dtype=np.int32) if position is None else position
    return Packing(
        team_bits=team_bits,
        outputs=np.append(outputs, np.full(items * teams - members.size, -1)).astype(np.int32),
        bundles=bundles.astype(np.int32),
        rows=rows,
        steps=steps.astype(np.int32),
        index=packed(index, gathered if has_pads else 0, dtype),
        dendrite=None if dendrite is None else packed(dendrite, 0, dendrite.dtype),
        source=None if ordered_slots and position is None else packed(source, -1, np.int32),
        has_pads=has_pads,
    )


def _team_bits(kind: Kind, members: Array) -> int:
    """The team with which the rows of all outputs, `members` each, make the fewest bundles.

    Of those the largest: more warps share the work.
    """

    def bundles(bits: int) -> int:
        teams = kind.groups >> bits
        counts = -(-np.sort(members) // (1 << bits))
        return int(counts[::-1][::teams].sum())  # the longest of each item

    return min(reversed(range(kind.groups.bit_length())), key=bundles)


def _by_length(lengths: Array, teams: int) -> Array:
    """Outputs in the order in which warps take them, `teams` at a time."""
    outputs = np.arange(lengths.size)
    if teams == 1:
        return outputs
    return np.lexsort((-lengths, outputs // _WINDOW))


def _places(
    row: Array, lengths: Array, room: Array, group: Array, index: Array, kind: Kind
) -> Array:
    """The place of each synapse in its row, below the row's room.

    The tile's row n lies in the banks n % banks. At place k, group g gathers a row with
    n % banks == (g + k) % banks, if there is one left: half a warp then meets in no bank.
    """
    start = np.cumsum(lengths) - lengths
    places: Array = np.arange(index.size) - start[row]
    if kind.banks == 1:
        return places
    banks = kind.banks
    bank = index.astype(np.int64) % banks
    order = np.argsort(row * banks + bank, kind="stable")
    rank = np.empty(index.size, np.int64)
    rank[order] = _rank_in_run((row * banks + bank)[order])
    places = (bank - group[row]) % banks + rank * banks
    left = np.flatnonzero(places >= room[row])  # these fill what stays free in their row
    first = _starts(room)
    is_free = np.ones(int(first[-1]), np.bool_)
    taken = np.delete(first[row] + places, left)
    is_free[taken] = False
    free = np.flatnonzero(is_free)
    first_free = np.searchsorted(free, first[:-1])
    places[left] = free[first_free[row[left]] + _rank_in_run(row[left])] - first[row[left]]
    return places


def _starts(counts: Array) -> Array:
    """[n] -> [n + 1] positions of the first of each."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _rank_in_run(keys: Array) -> Array:
    """Position of each element in its run of equal, ascending keys."""
    if keys.size == 0:
        return keys
    is_first = np.append(True, keys[1:] != keys[:-1])
    start = np.flatnonzero(is_first)
    return np.arange(keys.size) - np.repeat(start, np.diff(start, append=keys.size))
