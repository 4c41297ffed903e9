"""A network small enough for a whole training in a test, on digits drawn from a seed."""

from __future__ import annotations

import torch
from torch import nn

import dendrite_kernels as dk


def network(seed: int) -> nn.Sequential:
    """The same connectivity always; parameters by the seed."""
    torch.manual_seed(seed)
    return dk.models.build("dANN-LRF", (8, 8), 16, 4, 8, 10, seed=0)


def batches(count: int, batch: int = 16) -> list[tuple[torch.Tensor, torch.Tensor]]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images[: count * batch] / 16, dtype=torch.float32)
    y = torch.tensor(labels[: count * batch])
    return list(zip(x.split(batch), y.split(batch), strict=True))


def assert_trained_alike(a: nn.Module, b: nn.Module) -> None:
    """The same parameters, to the rounding of an optimizer that resumed."""
    theirs = dict(b.named_parameters())
    for name, value in a.named_parameters():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)
