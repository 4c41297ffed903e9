"""The oracle as a backend: plain dense PyTorch behind the operators' functions."""

from __future__ import annotations

from typing import Any

import torch

from .. import reference
from ..structure import Connectivity

STORES_LOW = False
ROUNDS_X = False


def unavailable() -> str | None:
    return None


def info() -> dict[str, Any]:
    return {"threads": torch.get_num_threads()}


def _pack_signs(u: torch.Tensor) -> torch.Tensor:
    """u [B, R] -> int32 [ceil(B / 32), R], bit i of word t set where u[32 t + i] > 0."""
    batch, rows = u.shape
    words = (batch + 31) // 32
    bits = u.new_zeros((words * 32, rows), dtype=torch.int64)
    bits[:batch] = u > 0
    place = torch.arange(32, device=u.device).reshape(1, 32, 1)
    packed = (bits.reshape(words, 32, rows) << place).sum(1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def dendritic_forward(
    x: torch.Tensor,
    synapse_weight: torch.Tensor,
    dendrite_bias: torch.Tensor | None,
    cable_weight: torch.Tensor,
    soma_bias: torch.Tensor | None,
    connectivity: Connectivity,
    negative_slope: float,
    save_signs: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    y = reference.dendritic_layer(
        x,
        synapse_weight,
        dendrite_bias,
        cable_weight,
        soma_bias,
        connectivity,
        negative_slope=negative_slope,
    )
    if not save_signs:
        return y, x.new_empty((0, connectivity.num_dendrites), dtype=torch.int32)
    return y, _pack_signs(reference.sparse_linear(x, synapse_weight, dendrite_bias, connectivity))


def dendritic_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    signs: torch.Tensor,
    synapse_weight: torch.Tensor,
    dendrite_bias: torch.Tensor | None,
    cable_weight: torch.Tensor,
    connectivity: Connectivity,
    negative_slope: float,
    need_x: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if dendrite_bias is None:
        dendrite_bias = torch.zeros_like(cable_weight)
    inputs = [t.detach().requires_grad_() for t in (x, synapse_weight, dendrite_bias, cable_weight)]
    with torch.enable_grad():
        u = reference.sparse_linear(inputs[0], inputs[1], inputs[2], connectivity)
        a = torch.nn.functional.leaky_relu(u, negative_slope)
        v = torch.nn.functional.linear(a, reference.cable_matrix(inputs[3], connectivity))
    grad_v = torch.where(y > 0, grad, negative_slope * grad)
    dx, dw, dbd, dc = torch.autograd.grad(v, inputs, grad_v)
    return (dx if need_x else x.new_empty((0, x.shape[1]))), dw, dbd, dc, grad_v.sum(0)


def sparse_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, connectivity: Connectivity
) -> torch.Tensor:
    return reference.sparse_linear(x, weight, bias, connectivity)


def sparse_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    connectivity: Connectivity,
    need_x: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs = [t.detach().requires_grad_() for t in (x, weight)]
    with torch.enable_grad():
        u = reference.sparse_linear(inputs[0], inputs[1], None, connectivity)
    dx, dw = torch.autograd.grad(u, inputs, grad)
    return (dx if need_x else x.new_empty((0, x.shape[1]))), dw, grad.sum(0)
