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
    going = np.minimum(counts, _going(counts, amount))
    rows = np.repeat(np.arange(counts.size), counts)  # [nnz]
    size = weight.detach().abs().double().cpu().numpy()
    if np.isnan(size).any():
        raise ValueError(f"Expected weights that are numbers, got {np.isnan(size).sum()} NaN")
    order = np.lexsort((-size, rows))  # each row's synapses, the largest first
    rank = np.arange(c.nnz) - c.crow_indices.numpy()[rows]
    kept = np.zeros(c.nnz, np.bool_)
    kept[order] = rank < (counts - going)[rows]
    return torch.from_numpy(kept)


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
