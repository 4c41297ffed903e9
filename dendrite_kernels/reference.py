"""The oracle: both operations in plain PyTorch, dense, any dtype and device, differentiable.

Written from the equations (docs/equations.md, sections 1 and 3; Chavlis & Poirazi 2025),
independently of every kernel. Tests use it in float64. Memory and time are those of a dense layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .activations import ActivationName, function_of
from .structure import Connectivity


def dense_weight(weight: torch.Tensor, connectivity: Connectivity) -> torch.Tensor:
    """The [R, N] matrix with `weight` [nnz] at the synapses and zero elsewhere."""
    crow, col = (
        t.to(weight.device).long() for t in (connectivity.crow_indices, connectivity.col_indices)
    )
    rows = torch.repeat_interleave(
        torch.arange(connectivity.num_dendrites, device=weight.device), crow.diff()
    )
    dense = weight.new_zeros((connectivity.num_dendrites, connectivity.in_features))
    return dense.index_put((rows, col), weight)


def sparse_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, connectivity: Connectivity
) -> torch.Tensor:
    """u = x W^T + bias: x [..., N], weight [nnz], bias [R] or None -> [..., R]."""
    return F.linear(x, dense_weight(weight, connectivity), bias)


def cable_matrix(cable_weight: torch.Tensor, connectivity: Connectivity) -> torch.Tensor:
    """The [S, R] matrix that holds each dendrite's cable weight [R] in the row of its soma."""
    somas, rows = connectivity.num_somas, connectivity.num_dendrites
    soma_ptr = connectivity.soma_ptr.to(cable_weight.device).long()
    soma = torch.repeat_interleave(torch.arange(somas, device=cable_weight.device), soma_ptr.diff())
    column = torch.arange(rows, device=cable_weight.device)
    return cable_weight.new_zeros((somas, rows)).index_put((soma, column), cable_weight)


def dendritic_layer(
    x: torch.Tensor,
    synapse_weight: torch.Tensor,
    dendrite_bias: torch.Tensor | None,
    cable_weight: torch.Tensor,
    soma_bias: torch.Tensor | None,
    connectivity: Connectivity,
    *,
    activation: ActivationName = "leaky_relu",
    negative_slope: float = 0.1,
) -> torch.Tensor:
    """y = phi(C phi(x W^T + bd) + bs): x [..., N] -> [..., S]; see functional.dendritic_layer."""
    phi = function_of(activation, negative_slope)
    a = phi(sparse_linear(x, synapse_weight, dendrite_bias, connectivity))  # [..., R]
    return phi(F.linear(a, cable_matrix(cable_weight, connectivity), soma_bias))
