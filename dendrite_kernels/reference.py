"""The oracle: both operations in plain PyTorch, synapse by synapse, any dtype, differentiable.

Written from the equations (docs/equations.md, sections 1 and 3; Chavlis & Poirazi 2025),
independently of every kernel. Tests use it in float64. It takes B * nnz numbers of memory.
"""

from __future__ import annotations

import torch

from .activations import ActivationName, function_of
from .structure import Connectivity


def owners(pointer: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Which of the stretches that `pointer` delimits each item is in: [pointer[-1]] integers."""
    counts = pointer.to(device).long().diff()
    return torch.repeat_interleave(torch.arange(counts.numel(), device=device), counts)


def sums(values: torch.Tensor, owner: torch.Tensor, count: int) -> torch.Tensor:
    """values [..., n] -> [..., count]: the sum of what each owner has. NaN stays with its owner."""
    total = values.new_zeros((*values.shape[:-1], count))
    return total.index_add(-1, owner, values)


def sparse_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, connectivity: Connectivity
) -> torch.Tensor:
    """u = x W^T + bias: x [..., N], weight [nnz], bias [R] or None -> [..., R]."""
    row = owners(connectivity.crow_indices, x.device)
    column = connectivity.col_indices.to(x.device)
    u = sums(x.index_select(-1, column) * weight, row, connectivity.num_dendrites)
    return u if bias is None else u + bias


def cable(
    a: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, connectivity: Connectivity
) -> torch.Tensor:
    """v = C a + bias: each dendrite of a [..., R] feeds its soma -> [..., S]."""
    v = sums(a * weight, owners(connectivity.soma_ptr, a.device), connectivity.num_somas)
    return v if bias is None else v + bias


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
    soma_activation: ActivationName | None = None,
    gate: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = psi(C phi(x W^T + bd) + bs): x [..., N] -> [..., S]; see functional.dendritic_layer.

    A gate [R] or [..., R] multiplies phi.
    """
    phi = function_of(activation, negative_slope)
    psi = function_of(soma_activation or activation, negative_slope)
    a = phi(sparse_linear(x, synapse_weight, dendrite_bias, connectivity))  # [..., R]
    a = a if gate is None else a * gate
    return psi(cable(a, cable_weight, soma_bias, connectivity))
