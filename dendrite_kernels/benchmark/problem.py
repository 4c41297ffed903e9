"""One layer with its input, and how far from right an answer to it is.

A sum near 0 may get either sign by rounding, and LeakyReLU has a kink at 0. Two correct results
could then differ by more than any useful tolerance, in a few of millions of values. So x, synapse
weights and dendrite biases are multiples of fixed steps: the sums of dendrites are exact in float32
and never 0. Somas whose sums are nearly 0 get a gradient of 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import dendrite_kernels as dk

from .oracle import PARAMETERS, oracle

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12}  # relative L2
TOLERANCE = TOLERANCES[torch.float32]
_STEPS = 256  # x and the weights are multiples of 1 / 256
_NEAR_ZERO = 1e-4  # of a soma's output, relative to their root mean square


class DenseForm(NamedTuple):
    """The layer as masked dense matrices: N -> R under [R, N], R -> S under [S, R]."""

    dendrite: nn.Linear
    dendrite_mask: Tensor
    soma: nn.Linear
    soma_mask: Tensor


@dataclass(frozen=True)
class Problem:
    """x [B, N], the gradient of y [B, S], and the parameters (names as the layer's), in one dtype
    on one device.
    """

    connectivity: dk.Connectivity
    x: Tensor
    grad: Tensor
    synapse_weight: Tensor  # [nnz]
    dendrite_bias: Tensor  # [R]
    cable_weight: Tensor  # [R]
    soma_bias: Tensor  # [S]
    negative_slope: float = 0.1

    @classmethod
    def draw(
        cls,
        connectivity: dk.Connectivity,
        batch: int,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> Problem:
        c = connectivity
        generator = torch.Generator().manual_seed(seed)

        def integers(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, generator=generator).to(dtype)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=dtype)

        largest = max(1, round(_STEPS * math.sqrt(6 * c.num_dendrites / max(1, c.nnz))))
        problem = cls(
            connectivity=c,
            x=integers(0, _STEPS, batch, c.in_features) / _STEPS,
            grad=normal(batch, c.num_somas),
            synapse_weight=integers(-largest, largest + 1, c.nnz) / _STEPS,
            # half a step of x * weight beside their grid
            dendrite_bias=(2 * integers(-_STEPS, _STEPS, c.num_dendrites) + 1) / (2 * _STEPS**2),
            cable_weight=normal(c.num_dendrites) / math.sqrt(c.num_dendrites / c.num_somas),
            soma_bias=normal(c.num_somas) / 10,
        )
        y = oracle(problem)["y"].abs()
        certain = y > _NEAR_ZERO * problem.negative_slope * y.square().mean().sqrt()
        return replace(problem, grad=problem.grad.mul_(certain))

    def to(self, device: str) -> Problem:
        parameters: dict[str, Any] = {name: p.to(device) for name, p in self.parameters.items()}
        return replace(self, x=self.x.to(device), grad=self.grad.to(device), **parameters)

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in PARAMETERS}

    def layer(self) -> dk.DendriticLayer:
        """A new layer with this problem's parameters."""
        layer = dk.DendriticLayer(
            self.connectivity,
            negative_slope=self.negative_slope,
            device=self.x.device,
            dtype=self.x.dtype,
        )
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                parameter.copy_(self.parameters[name])
        return layer

    @cached_property
    def dense(self) -> DenseForm:
        """Cached, because the matrices of large layers take gigabytes."""
        return DenseForm(*dk.interop.to_masked_dense(self.layer()))

    @cached_property
    def soma_of_dendrite(self) -> Tensor:
        return torch.repeat_interleave(self.connectivity.soma_ptr.to(self.x.device).diff())  # [R]

    @cached_property
    def row_of_synapse(self) -> Tensor:
        return torch.repeat_interleave(self.crow.diff())  # [nnz]

    @cached_property
    def crow(self) -> Tensor:
        return self.connectivity.crow_indices.to(self.x.device).long()  # [R + 1]

    @cached_property
    def columns(self) -> Tensor:
        return self.connectivity.col_indices.to(self.x.device).long()  # [nnz]


def largest_error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest relative L2 difference of the named results; infinite where a shape is wrong."""
    errors = []
    for name, value in found.items():
        wanted = expected[name]
        if value.shape != wanted.shape:
            return math.inf
        difference = (value.detach().double() - wanted).norm()
        errors.append(float(difference / wanted.norm().clamp(min=np.finfo(np.float64).tiny)))
    return max(errors) if all(math.isfinite(e) for e in errors) else math.inf
