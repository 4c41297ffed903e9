"""The order in which the C++ kernels visit dendrites. It changes the time, not the results.

With local receptive fields, dendrites that see the same inputs are visited one after another, so
that these inputs are still in the cache. The order only changes places within groups of somas (of
rows, where there are no somas), so that the outputs of a group stay in the cache, too.

Dendrites are visited by number where an order gains nothing: for random inputs, for fields whose
neighbours overlap already, and over the transposed plan.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .._pattern import synapses_of
from .._validate import Array
from ..structure import RANK_ALONG_FIELDS, Connectivity

# Size of the groups. In smaller ones fewer neighbours share inputs; in larger ones backward reads
# weights and signs from more distant addresses (6 % slower on case B of the benchmarks).
MIXED_DENDRITES, MOST_SOMAS = 1024, 64
MIXED_ROWS = 512  # where there are no somas
_AT_ONCE = 8192  # dendrites whose centres are found together, in little memory
_BAND = 4  # rows of the image in a band: bands are visited one after another
_PATCHES, _PIXELS = 256, 256  # dendrites, and inputs of each, to estimate the length of image rows
_SAMPLE = 4096  # pairs of neighbours in the estimate of shared inputs
_SHARED = 0.3  # least share of inputs in common with the next dendrite for an order to gain


class Order(NamedTuple):
    dendrite: Array  # int32 [R]: position -> dendrite
    soma: Array | None  # int32 [R]: position -> its soma; None: groups of rows
    crow: Array  # int32 [R + 1], of the dendrites in this order
    columns: Array  # uint16 or int32 [nnz]
    group_size: int  # in somas or rows


def by_centre(connectivity: Connectivity) -> Order | None:
    """For forward and for backward without dx; None: by number."""
    rank = _rank_along_fields(connectivity)
    if rank is None:
        return None
    soma = _soma_of_dendrite(connectivity)
    group = _mixed_somas(connectivity)
    dendrite = np.lexsort((rank, soma // group))
    moved = _in_order(connectivity, dendrite)
    return Order(dendrite.astype(np.int32), soma[dendrite], *moved, group)


def _mixed_somas(connectivity: Connectivity) -> int:
    """Number of somas in a group."""
    wanted = MIXED_DENDRITES * connectivity.num_somas // connectivity.num_dendrites
    return min(MOST_SOMAS, max(1, wanted))


def rows_by_centre(connectivity: Connectivity) -> Order | None:
    """For forward without somas; None: by number."""
    rank = _rank_along_fields(connectivity)
    if rank is None:
        return None
    dendrite = np.lexsort((rank, np.arange(rank.size) // MIXED_ROWS))
    return Order(dendrite.astype(np.int32), None, *_in_order(connectivity, dendrite), MIXED_ROWS)


def _in_order(connectivity: Connectivity, dendrite: Array) -> tuple[Array, Array]:
    """crow_indices and columns of the dendrites in this order."""
    crow = connectivity.crow_indices.numpy()
    ordered_crow = np.concatenate(([0], np.cumsum(np.diff(crow)[dendrite]))).astype(np.int32)
    return ordered_crow, connectivity.columns[synapses_of(crow, dendrite)]


def _soma_of_dendrite(connectivity: Connectivity) -> Array:
    """int32 [R]"""
    lengths = np.diff(connectivity.soma_ptr.numpy())
    return np.repeat(np.arange(lengths.size, dtype=np.int32), lengths)


def _along_fields(connectivity: Connectivity) -> Array:
    """Dendrites by centre [R] in bands of rows of what may be an image, there and back again."""
    crow, length = connectivity.crow_indices.numpy(), _row_length(connectivity)
    centre = np.empty((2, crow.size - 1))  # row and column
    for first in range(0, crow.size - 1, _AT_ONCE):
        part = crow[first : first + _AT_ONCE + 1]
        places = np.divmod(connectivity.col_indices.numpy()[part[0] : part[-1]], length)
        for axis, place in enumerate(places):
            total = np.concatenate(([0], np.cumsum(place, dtype=np.int64)))[part - part[0]]
            mean = np.diff(total) / np.maximum(1, np.diff(part))
            centre[axis, first : first + _AT_ONCE] = mean
    band, x = centre[0] // _BAND, centre[1]
    order: Array = np.lexsort((np.where(band % 2, -x, x), band))
    return order


def _row_length(connectivity: Connectivity) -> int:
    """Inputs per row of the image, if fields are patches of an image.

    Pixels of a patch lie above each other. So this is the most common distance between two inputs
    of a dendrite, apart from the short distances within a row.
    """
    crow, col = connectivity.crow_indices.numpy(), connectivity.col_indices.numpy()
    inputs = connectivity.in_features
    shortest = max(1, int(np.sqrt(inputs) / 2))
    counts = np.zeros(inputs + 1, np.int64)
    for r in np.unique(np.linspace(0, crow.size - 2, _PATCHES, dtype=np.int64)):
        field = col[crow[r] : min(crow[r + 1], crow[r] + _PIXELS)]
        distance = np.abs(field[:, None] - field[None, :])
        counts += np.bincount(distance[distance >= shortest], minlength=inputs + 1)
    return int(counts.argmax()) or inputs


def _rank_along_fields(connectivity: Connectivity) -> Array | None:
    """Position [R] of each dendrite in the order along the fields.

    None unless neighbours share inputs in that order, and more than twice as many as by number.
    """
    return connectivity.cached(RANK_ALONG_FIELDS, lambda: _find_rank(connectivity))


def _find_rank(connectivity: Connectivity) -> Array | None:
    rows = connectivity.num_dendrites
    if rows < 2 or connectivity.nnz == 0:
        return None
    pair = np.unique(np.linspace(0, rows - 2, min(rows - 1, _SAMPLE), dtype=np.int64))
    order = _along_fields(connectivity)
    shared = _shared(connectivity, order[pair], order[pair + 1])
    if shared <= _SHARED or shared <= 2 * _shared(connectivity, pair, pair + 1):
        return None
    rank = np.empty_like(order)
    rank[order] = np.arange(rows)
    return rank


def _shared(connectivity: Connectivity, one: Array, other: Array) -> float:
    """Share of the inputs of dendrites `one` [P] that their partners `other` [P] have, too."""
    crow, col = connectivity.crow_indices.numpy(), connectivity.col_indices.numpy()
    inputs = connectivity.in_features
    mine, its = (_inputs_of_pairs(crow, col, rows, inputs) for rows in (one, other))
    both = np.isin(mine, its, assume_unique=True, kind="sort")  # merges them: each is sorted
    return np.count_nonzero(both) / max(1, mine.size)


def _inputs_of_pairs(crow: Array, col: Array, rows: Array, inputs: int) -> Array:
    """pair * N + input for each input of dendrite rows[pair]: int64, unique."""
    pair = np.repeat(np.arange(rows.size, dtype=np.int64), crow[rows + 1] - crow[rows])
    unique: Array = pair * inputs + col[synapses_of(crow, rows)]
    return unique
