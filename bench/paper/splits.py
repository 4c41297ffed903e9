"""What a run trains on: the split into training and validation, noise, the order of the classes.

Source: Chavlis & Poirazi (2025), Methods; docs/equations.md, section 8.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from bench.paper.datasets import ImageData
from bench.paper.run import Run


class Split(NamedTuple):
    """What training reads: x float32 [n, N], y int64 [n]."""

    x_train: torch.Tensor
    y_train: torch.Tensor
    x_val: torch.Tensor
    y_val: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor


def prepare(data: ImageData, run: Run) -> Split:
    """The data of a run. Its trial decides the split, and the noise on train, val and test."""
    rng = np.random.default_rng(run.trial)
    train, val = (
        _by_class(data.y_train, run.batch, rng)
        if run.task == "sequential"
        else _at_random(len(data.y_train), rng)
    )
    if not len(val):
        raise ValueError(
            f"Expected images left for validation (docs/equations.md, section 8), got none of the "
            f"{len(train)} that data set {data.name} has"
        )
    x_train, x_val, x_test = data.x_train[train], data.x_train[val], data.x_test
    if run.noise > 0:
        x_train, x_val, x_test = (_noisy(x, run.noise, rng) for x in (x_train, x_val, x_test))
    arrays = x_train, data.y_train[train], x_val, data.y_train[val], x_test, data.y_test
    return Split(*(torch.from_numpy(array) for array in arrays))


Indices = NDArray[np.int64]


def _at_random(count: int, rng: np.random.Generator) -> tuple[Indices, Indices]:
    """Shuffled; the last 10 % are for validation."""
    order = rng.permutation(count)
    kept = count - count // 10
    return order[:kept], order[kept:]


def _by_class(y: Indices, batch: int, rng: np.random.Generator) -> tuple[Indices, Indices]:
    """Class after class, each a whole number of batches; the rest, at least 10 %, validates.

    Of a class that fills n batches, n - int(0.1 N / (B C)) are for training: N samples in all, B
    in a batch, C classes.
    """
    classes, counts = np.unique(y, return_counts=True)
    held_out = int(0.1 * len(y) / (batch * len(classes)))
    kept = [(int(count) // batch - held_out) * batch for count in counts]
    if min(kept) < 1:
        raise ValueError(
            f"Expected at least {held_out + 1} batches of {batch} in each class for the sequential "
            f"task, got a class of {counts.min()} samples"
        )
    order = rng.permutation(len(y))
    members = [order[y[order] == label] for label in classes]
    train = np.concatenate([m[:k] for m, k in zip(members, kept, strict=True)])
    val = np.concatenate([m[k:] for m, k in zip(members, kept, strict=True)])
    return train, rng.permutation(val)


def _noisy(x: NDArray[np.float32], sigma: float, rng: np.random.Generator) -> NDArray[np.float32]:
    noisy: NDArray[Any] = rng.standard_normal(x.shape, np.float32)
    noisy *= np.float32(sigma)
    noisy += x
    return np.clip(noisy, 0, 1, out=noisy)
