"""A trial of other people's modules: what do they compute?"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ._modules import copied


def _inputs(like: torch.Tensor) -> Iterator[torch.Tensor]:
    """Zeros, and random numbers in batches and scales that tell clamps and norms from products."""
    inputs = like.shape[1]
    generator = torch.Generator().manual_seed(0)
    yield like.new_zeros((3, inputs))
    for batch in ((1,), (2,), (2, 3), (64,)):
        for scale in (1, 1000):
            x = scale * torch.randn(*batch, inputs, generator=generator, device="cpu")
            yield x.to(like)


@torch.no_grad()
def check_linear(module: nn.Module, plain: nn.Linear, mask: torch.Tensor) -> None:
    """ValueError unless a copy of the module computes what the mask lets pass, in both modes.

    The module, its mode and torch's generators stay as they are.
    """
    tried, weight = copied(module, {}), plain.weight * mask
    device = weight.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        for training in (True, False):
            tried.train(training)
            for x in _inputs(weight):
                expected = nn.functional.linear(x, weight, plain.bias)
                _compare(tried, x, expected)


def _compare(module: nn.Module, x: torch.Tensor, expected: torch.Tensor) -> None:
    name = type(module).__name__
    try:
        y = module(x.clone())
    except Exception as error:  # code of anyone
        raise ValueError(f"Expected {name} to take inputs [B, {x.shape[1]}]: {error!r}") from error
    tolerance = torch.finfo(x.dtype).eps ** 0.5
    if not isinstance(y, torch.Tensor) or y.shape != expected.shape or y.dtype != expected.dtype:
        raise ValueError(f"Expected {name} to give {list(expected.shape)}, got another output")
    if not (y - expected).norm() <= tolerance * expected.norm():
        raise ValueError(f"Expected {name} to compute x @ (weight * mask).T + bias, got other sums")
