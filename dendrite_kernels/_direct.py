"""The short way from a function to the kernels, for the calls that need nothing on the way.

Most calls of a small layer pass plain tensors that fit, with nobody watching. The extension says so
in one call; then the checks that explain what is wrong, autocast and the dispatcher are skipped,
which together cost more than a small kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from . import _autograd, backends
from .topology import Connectivity

Maybe = torch.Tensor | None

# What torch.autograd.Function.apply ends in where no functorch transform is active: 4 us sooner.
apply_sparse_linear = super(torch.autograd.Function, _autograd.SparseLinear).apply
apply_dendritic_layer = super(torch.autograd.Function, _autograd.DendriticLayer).apply


def backend_for(
    x: torch.Tensor,
    weight: torch.Tensor,
    dendrite_bias: Maybe,
    cable_weight: Maybe,
    soma_bias: Maybe,
    connectivity: Connectivity,
) -> Any:
    """The backend that computes these operands just as they are; None: take the long way.

    Not for compilers. Objects of any type are welcome. Without cable_weight it is a sparse linear
    layer.
    """
    if (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_any_autocast_enabled()
        or torch.autograd.profiler._is_profiler_enabled
        or forward_ad._current_level >= 0
    ):
        return None
    backend = backends.direct()
    if backend is None or not backend.accepts(
        x, weight, dendrite_bias, cable_weight, soma_bias, connectivity
    ):
        return None
    return backend


def sparse_linear(
    backend: Any, x: torch.Tensor, weight: torch.Tensor, bias: Maybe, connectivity: Connectivity
) -> torch.Tensor:
    """x [B, N] -> u [B, R] by what `backend_for` returned."""
    u: torch.Tensor
    if _autograd.needs_grad(x, weight, bias):
        u = apply_sparse_linear(x, weight, bias, connectivity, backend.sparse_forward)
    else:
        u = backend.sparse_forward(x, weight, bias, connectivity)
    return u


def dendritic_layer(
    backend: Any,
    x: torch.Tensor,
    synapse_weight: torch.Tensor,
    dendrite_bias: Maybe,
    cable_weight: torch.Tensor,
    soma_bias: Maybe,
    connectivity: Connectivity,
    slope: float,
) -> torch.Tensor:
    """x [B, N] -> y [B, S] by what `backend_for` returned."""
    y: torch.Tensor
    if _autograd.needs_grad(x, synapse_weight, dendrite_bias, cable_weight, soma_bias):
        y = apply_dendritic_layer(
            x, synapse_weight, dendrite_bias, cable_weight, soma_bias, connectivity, slope,
            backend.dendritic_forward,
        )  # fmt: skip
    else:
        y = backend.dendritic_output(
            x, synapse_weight, dendrite_bias, cable_weight, soma_bias, connectivity, slope
        )
    return y
