"""Some of the synapses of a connectivity."""

from __future__ import annotations

import numbers
from typing import SupportsIndex

import numpy as np
import torch

from ._validate import Array
from .structure import Connectivity

Amount = float | SupportsIndex  # of synapses: a fraction, or how many


def largest(c: Connectivity, weight: torch.Tensor, amount: Amount) -> torch.Tensor:
    """Which synapses stay when each dendrite loses those of least |weight|: bool [nnz].

    Args:
        c: of the weight [nnz].
        weight: of equal weights the later ones go first.
        amount: the fraction of a dendrite's synapses that go, rounded to a number, half to even;
            as an int their number, or all that a dendrite has if they are fewer.

    Raises:
        TypeError, ValueError: not an int >= 0 or a float from 0 to 1; a weight is NaN.
    """
    counts = np.diff(c.crow_indices.numpy())  # [R]
    return torch.from_numpy(without_smallest(c, weight, np.minimum(counts, _going(counts, amount))))


def without_smallest(c: Connectivity, weight: torch.Tensor, going: Array) -> Array:
    """Which synapses stay, bool [nnz], when dendrites lose `going` [R] of least |weight| each.

    Of equal weights the later ones go first.

    Raises:
        ValueError: a weight is NaN.
    """
    counts = np.diff(c.crow_indices.numpy())  # [R]
    size = weight.detach().abs().double().cpu().numpy()
    if np.isnan(size).any():
        raise ValueError(f"Expected weights that are numbers, got {np.isnan(size).sum()} NaN")
    stay: Array = ranks(counts, -size) < np.repeat(counts - going, counts)
    return stay


def ranks(counts: Array, values: Array) -> Array:
    """The place of each value in its row, in ascending order; of equal ones the earlier is first.

    Rows have `counts` [R] values, one after another. Those of one length are sorted together, ten
    times as fast as all in one.
    """
    rank = np.empty(values.size, np.int64)
    start = np.cumsum(counts) - counts
    for k in np.unique(counts[counts > 0]):
        index = start[counts == k][:, None] + np.arange(k)  # [rows, k]
        order = values[index].argsort(axis=1, kind="stable")
        rank[np.take_along_axis(index, order, axis=1)] = np.arange(k)
    return rank


def _going(counts: Array, amount: Amount) -> Array:
    if isinstance(amount, bool) or not isinstance(amount, numbers.Real):  # numpy's are Real too
        raise TypeError(f"Expected an amount of type int or float, got {type(amount).__name__}")
    if isinstance(amount, numbers.Integral):
        if int(amount) < 0:
            raise ValueError(f"Expected an amount >= 0 of synapses, got {amount}")
        return np.full(counts.shape, min(int(amount), counts.max(initial=0)))
    if not 0 <= float(amount) <= 1:
        raise ValueError(f"Expected an amount from 0 to 1 of the synapses, got {amount}")
    rounded: Array = np.rint(float(amount) * counts).astype(np.int64)
    return rounded


def subset(c: Connectivity, kept: torch.Tensor) -> Connectivity:
    """The connectivity without the synapses that are False in `kept` [nnz]."""
    taken = kept.cpu().numpy()
    before = np.concatenate([[0], np.cumsum(taken)])  # [nnz + 1]
    crow = before[c.crow_indices.numpy()]
    columns = c.col_indices.numpy()[taken]
    image = c.in_shape, c.channels_first
    return Connectivity(crow, columns, c.soma_ptr, c.in_features, *image, c.labels)
