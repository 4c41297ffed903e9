"""Networks of all shapes that the kernels treat differently, and random tensors for them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

import dendrite_kernels as dk
from dendrite_kernels import Connectivity
from dendrite_kernels.transposed import build_transposed_plan


def small() -> Connectivity:
    """3 dendrites (one empty) over 4 inputs, in 2 somas."""
    return Connectivity.from_csr([0, 2, 2, 5], [1, 3, 0, 1, 2], 4, soma_ptr=[0, 1, 3])


def ragged(inputs: int, rows: int, soma_ptr: list[int], seed: int = 0) -> Connectivity:
    """Rows of 0 to 40 synapses, several of them empty; somas of the given unequal sizes."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, min(40, inputs) + 1, rows)
    counts[::5] = 0
    columns = [np.sort(rng.choice(inputs, k, replace=False)) for k in counts]
    return Connectivity.from_csr(
        np.cumsum([0, *counts]), np.concatenate(columns), inputs, soma_ptr=soma_ptr
    )


def many_slots() -> Connectivity:
    """Its plan has large blocks: more slots in one than a uint16 can number."""
    c = dk.connectivity.random(200, 64, 16, 150, seed=0)
    crow = c.crow_indices.numpy()
    c.cached("transposed", lambda: build_transposed_plan(crow, c.columns, block_rows=1000))
    return c


NETWORKS: dict[str, Callable[[], Connectivity]] = {
    "constant fan-in": lambda: dk.connectivity.random(100, 12, 4, 16, constant_fan_in=True, seed=0),
    "fan-in 7": lambda: dk.connectivity.random(90, 5, 3, 7, constant_fan_in=True, seed=0),
    "variable fan-in": lambda: dk.connectivity.random(100, 12, 4, 16, seed=0),
    "ragged": lambda: ragged(61, 40, [0, 0, 1, 7, 7, 36, 40]),
    "receptive fields": lambda: dk.connectivity.local_receptive_fields((9, 7), 150, 3, 16, seed=0),
    "colour": lambda: dk.connectivity.global_receptive_fields((8, 8), 6, 4, 16, channels=3, seed=0),
    "D=1": lambda: dk.connectivity.random(50, 37, 1, 8, seed=0),
    "S=1": lambda: dk.connectivity.random(50, 1, 70, 9, seed=0),
    "N=1": lambda: Connectivity.from_csr([0, 1, 1, 2, 3], [0, 0, 0], 1, dendrites_per_soma=2),
    "no synapse": lambda: Connectivity.from_csr([0, 0, 0, 0], [], 5, soma_ptr=[0, 2, 3]),
    "wide": lambda: dk.connectivity.random(65537, 9, 4, 12, constant_fan_in=True, seed=0),
    "several blocks": lambda: dk.connectivity.random(40, 130, 18, 5, seed=0),
    "blocks of many slots": many_slots,
}


def draw(c: Connectivity, batch: int, dtype: torch.dtype, somas: bool) -> list[torch.Tensor]:
    """x with many zeros, then the parameters, scaled to keep activations near 1."""
    x = torch.randn(batch, c.in_features, dtype=dtype)
    x[:, ::3] = 0
    fan_in = max(1.0, c.nnz / c.num_dendrites)
    weight = torch.randn(c.nnz, dtype=dtype) / fan_in**0.5
    bias = torch.randn(c.num_dendrites, dtype=dtype)
    bias[::4] = 0  # with zero inputs this gives u == 0 exactly
    if not somas:
        return [x, weight, bias]
    cable = torch.randn(c.num_dendrites, dtype=dtype) / (c.num_dendrites / c.num_somas) ** 0.5
    soma_bias = torch.randn(c.num_somas, dtype=dtype)
    soma_bias += 2 * soma_bias.sign()  # sums that cancel have noisy relative errors
    return [x, weight, bias, cable, soma_bias]


def draw_grad(batch: int, outputs: int, dtype: torch.dtype) -> torch.Tensor:
    """Mean 1, so that sums over the batch do not cancel: their relative errors would be noise."""
    return torch.randn(batch, outputs, dtype=dtype) + 1


Function = Callable[..., torch.Tensor]


def gradients(
    function: Function, tensors: list[torch.Tensor], grad: torch.Tensor
) -> list[torch.Tensor]:
    """The output and the gradients of all inputs, in the dtype of `tensors`."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]
