"""Where new synapses may go, which of those places to take, and the connectivity with them.

An edge is one number for a synapse: row * N + column. Sorted edges are in CSR order.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from ._subset import ranks
from ._validate import Array
from .structure import RANK_ALONG_FIELDS, Connectivity


def _integer(c: Connectivity) -> type:
    """Of edges: half the memory where it does."""
    return np.int32 if c.num_dendrites * (c.in_features + 1) < 2**31 else np.int64


def rows_of(c: Connectivity) -> Array:
    """The dendrite of each synapse [nnz]."""
    return np.repeat(np.arange(c.num_dendrites, dtype=_integer(c)), np.diff(c.crow_indices.numpy()))


def edges_of(c: Connectivity) -> Array:
    """[nnz], sorted."""
    edges: Array = rows_of(c) * c.in_features + c.col_indices.numpy()
    return edges


class Places(NamedTuple):
    """The inputs that dendrites do not see, numbered from 0 in each dendrite, column by column."""

    counts: Array  # int64 [R]: how many a dendrite has
    of_region: Array | None  # which edges of the region they are, bool; None: there is no region
    region: Array | None  # their edges
    present: Array  # [nnz]: row * (N + 1) + how many places come before each synapse
    crow: Array  # of the present synapses
    in_features: int

    def edges(self, rows: Array, numbers: Array) -> Array:
        """The edges of places by their numbers, beside their rows; all is sorted."""
        edges: Array
        if self.region is not None:
            start = np.cumsum(self.counts) - self.counts
            edges = self.region[start[rows] + numbers]
        else:
            both = np.concatenate([self.present, rows * (self.in_features + 1) + numbers])
            is_place = both.argsort(kind="stable") >= self.present.size  # merges two sorted runs
            before: Array = np.cumsum(~is_place, dtype=rows.dtype)[is_place] - self.crow[rows]
            edges = rows * self.in_features + numbers + before
        return edges


def places(c: Connectivity, region: Connectivity | None) -> Places:
    """Those of the region, or all."""
    crow, rows, n = c.crow_indices.numpy(), rows_of(c), c.in_features
    if region is None:
        before = c.col_indices.numpy() - (np.arange(c.nnz, dtype=np.int32) - crow[rows])
        return Places(n - np.diff(crow), None, None, rows * (n + 1) + before, crow, n)
    edges = edges_of(region)
    free = np.isin(edges, edges_of(c), assume_unique=True, invert=True, kind="sort")
    counts = np.bincount(rows_of(region)[free], minlength=c.num_dendrites)
    return Places(counts, free, edges[free], np.empty(0, rows.dtype), crow, n)


def drawn(free: Places, wanted: Array, generator: torch.Generator | None) -> Array:
    """`wanted` [R] distinct places of each dendrite, uniformly: sorted edges.

    Source: R. Floyd's sampling (Bentley & Floyd, Comm. ACM 30:754, 1987), many rows at a time.
    """
    integer = free.present.dtype
    numbers = np.empty(wanted.sum(), integer)
    start = np.cumsum(wanted) - wanted
    for n in np.unique(wanted[wanted > 0]).tolist():
        rows = np.flatnonzero(wanted == n)
        least = (free.counts[rows] - n).astype(integer)
        uniform = torch.rand(n, rows.size, dtype=torch.float64, generator=generator).numpy()
        chosen = np.empty((n, rows.size), integer)
        for j in range(n):
            number = (uniform[j] * (least + j + 1)).astype(integer)
            again = (chosen[:j] == number).any(axis=0)
            chosen[j] = np.where(again, least + j, number)
        numbers[start[rows][:, None] + np.arange(n)] = np.sort(chosen.T, axis=1)
    return free.edges(np.repeat(np.arange(wanted.size, dtype=integer), wanted), numbers)


def best(free: Places, wanted: Array, scores: Array, generator: torch.Generator | None) -> Array:
    """The `wanted` [R] places of each dendrite with the largest scores >= 0: sorted edges.

    `scores` is float64, one for each edge of the region. Among zeros it draws.
    """
    assert free.region is not None
    ties = torch.rand(free.region.size, dtype=torch.float64, generator=generator).numpy()
    scores = scores[free.of_region] + ties * 1e-300
    return free.region[ranks(free.counts, -scores) < np.repeat(wanted, free.counts)]


def merged(c: Connectivity, kept: Array, new: Array) -> tuple[Connectivity, Array]:
    """The synapses of `kept` (bool [nnz]) and the `new` edges, which are sorted and not there yet.

    Returns:
        Their connectivity, and for each of its synapses the one of `c` that it is, -1 if new.
    """
    old, n = np.flatnonzero(kept), c.in_features
    edges = np.concatenate([edges_of(c)[old], new])
    source = np.concatenate([old, np.full(new.size, -1)])
    order = np.argsort(edges, kind="stable")  # of two sorted runs
    before = np.arange(c.num_dendrites + 1, dtype=edges.dtype) * n
    crow = np.searchsorted(edges[order], before)
    columns = edges[order] - np.repeat(before[:-1], np.diff(crow))
    image = c.in_shape, c.channels_first
    made = Connectivity(crow, columns, c.soma_ptr, n, *image, c.labels)
    if c.derived.get(RANK_ALONG_FIELDS, False) is None:  # looking again takes longer than a step
        made.cached(RANK_ALONG_FIELDS, lambda: None)
    return made, source[order]
