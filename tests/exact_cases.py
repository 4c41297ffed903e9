"""Cases of small integers: every order of additions gives the same bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import dendrite_kernels as dk


def whole_numbers(seed: int) -> tuple[dk.Connectivity, list[Tensor], Tensor]:
    """Connectivity, [x, parameters], gradient of y: their sums are exact in any order."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=g).float()

    c = dk.connectivity.random(60, 30 + seed, 4, 8, seed=seed)
    sizes = c.nnz, c.num_dendrites, c.num_dendrites, c.num_somas
    return c, [draw(65, 60), *(draw(n) for n in sizes)], draw(65, c.num_somas)


def outputs(c: dk.Connectivity, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    """y and the gradients of `tensors`, from the backend in use."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    function: Any = dk.functional.dendritic_layer
    y = function(*leaves, c, negative_slope=0.25)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]
