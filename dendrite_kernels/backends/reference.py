"""The oracle as a backend: plain dense PyTorch behind the operators' functions."""

from __future__ import annotations

from typing import Any

import torch

from .. import reference
from .protocol import Gradients, Maybe, Operands

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


def forward(
    x: torch.Tensor, operands: Operands, save_signs: bool, round_x: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    weight, dendrite_bias, cable, soma_bias, connectivity, slope = operands
    u = reference.sparse_linear(x, weight, dendrite_bias, connectivity)
    signs = _pack_signs(u if save_signs else u[:0])
    if cable is None:
        return u, signs
    y = reference.dendritic_layer(
        x, weight, dendrite_bias, cable, soma_bias, connectivity, negative_slope=slope
    )
    return y, signs


def backward(
    grad: torch.Tensor, x: torch.Tensor, y: Maybe, signs: Maybe, operands: Operands, need_x: bool
) -> Gradients:
    weight, bias, cable, _, connectivity, slope = operands
    bias = weight.new_zeros(connectivity.num_dendrites) if bias is None else bias
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
    if cable is not None:
        inputs.append(cable.detach().requires_grad_())
    with torch.enable_grad():
        v = reference.sparse_linear(inputs[0], inputs[1], inputs[2], connectivity)
        if cable is not None:
            a = torch.nn.functional.leaky_relu(v, slope)
            v = torch.nn.functional.linear(a, reference.cable_matrix(inputs[3], connectivity))
    if y is not None:
        grad = torch.where(y > 0, grad, slope * grad)
    dx, dw, dbd, *dc = torch.autograd.grad(v, inputs, grad)
    dx = dx if need_x else x.new_empty((0, x.shape[1]))
    none = weight.new_empty(0)
    return (dx, dw, dbd, dc[0], grad.sum(0)) if dc else (dx, dw, dbd, none, none)
