"""The short way from a function to the CPU kernels, for the calls that need nothing on the way.

Most calls of a small layer pass plain tensors that fit, with nobody watching. Native code says so
in one call, C++ or what Numba compiled; then the checks that explain what is wrong, autocast and
the dispatcher are skipped, which together cost more than a small kernel. Whoever gets None here
takes the long way, as does the first call of each Connectivity.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import is_grad_enabled
from torch._C import (
    _are_functorch_transforms_active,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
)
from torch.autograd import forward_ad, profiler

from . import autograd, backends
from .backends import cpp
from .structure import Connectivity

Maybe = torch.Tensor | None


class SparseLinear(autograd.SparseLinear):
    """The same, computed by native code at once."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Maybe,
        connectivity: Connectivity,
        topology: Any,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.connectivity = connectivity
        u: torch.Tensor = topology.forward(x, weight, bias, None, None, 1.0, False)
        return u


class DendriticLayer(autograd.DendriticLayer):
    """The same, computed by native code at once."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        synapse_weight: torch.Tensor,
        dendrite_bias: Maybe,
        cable_weight: torch.Tensor,
        soma_bias: Maybe,
        rest: tuple[Connectivity, float, Any],
    ) -> torch.Tensor:
        _, slope, topology = rest
        y: torch.Tensor
        y, signs = topology.forward(
            x, synapse_weight, dendrite_bias, cable_weight, soma_bias, slope, True
        )
        ctx.save_for_backward(x, y, signs, synapse_weight, dendrite_bias, cable_weight)
        ctx.rest = rest
        return y


# What torch.autograd.Function.apply ends in where no functorch transform is active: 4 us sooner.
_record_sparse_linear = super(torch.autograd.Function, SparseLinear).apply
_record_dendritic_layer = super(torch.autograd.Function, DendriticLayer).apply


class _Keys(dict[str | None, str]):
    """By the chosen backend: under which key a connectivity keeps what serves an operation."""

    def __init__(self, operation: str) -> None:
        self._operation = operation

    def __missing__(self, chosen: str | None) -> str:
        name = chosen
        if name is None:  # the best one for the CPU
            name = "cpp" if cpp.unavailable() is None else "numba"
        key = self[chosen] = f"{name} {self._operation}"
        return key


FORWARD, FORWARD_ROWS = _Keys("forward"), _Keys("forward rows")


def topology_of(connectivity: Connectivity | None, keys: _Keys) -> Any:
    """The backend's object to ask whether it accepts the operands; None: somebody watches, or it
    is not made yet, or the backend has none. Not for compilers.

    keys: FORWARD or FORWARD_ROWS.
    """
    if (
        _len_torch_dispatch_stack() > 0
        or _are_functorch_transforms_active()
        or _is_any_autocast_enabled()
        or profiler._is_profiler_enabled
        or forward_ad._current_level >= 0
        or connectivity is None
    ):
        return None
    return connectivity.derived.get(keys[backends.chosen])


def sparse_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: Maybe, connectivity: Connectivity
) -> Maybe:
    """x [B, N] -> u [B, R], or None. Objects of any type are welcome, but for connectivity."""
    topology = topology_of(connectivity, FORWARD_ROWS)
    if topology is None:
        return None
    requires_grad = topology.accepts(x, weight, bias, None, None)
    if requires_grad is None:
        return None
    u: torch.Tensor
    if requires_grad and is_grad_enabled():
        u = _record_sparse_linear(x, weight, bias, connectivity, topology)
    else:
        u = topology.forward(x, weight, bias, None, None, 1.0, False)
    return u


def dendritic_layer(
    x: torch.Tensor,
    synapse_weight: torch.Tensor,
    dendrite_bias: Maybe,
    cable_weight: torch.Tensor,
    soma_bias: Maybe,
    connectivity: Connectivity,
    slope: float,
) -> Maybe:
    """x [B, N] -> y [B, S], or None. Objects of any type are welcome, but for connectivity and
    slope."""
    topology = topology_of(connectivity, FORWARD)
    if topology is None or cable_weight is None:  # without it, it accepts a sparse linear layer
        return None
    requires_grad = topology.accepts(x, synapse_weight, dendrite_bias, cable_weight, soma_bias)
    if requires_grad is None:
        return None
    y: torch.Tensor
    if requires_grad and is_grad_enabled():
        y = _record_dendritic_layer(
            x, synapse_weight, dendrite_bias, cable_weight, soma_bias,
            (connectivity, slope, topology),  # one argument costs less than three
        )  # fmt: skip
    else:
        y = topology.forward(
            x, synapse_weight, dendrite_bias, cable_weight, soma_bias, slope, False
        )
    return y
