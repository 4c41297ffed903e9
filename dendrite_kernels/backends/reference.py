"""The oracle as a backend: plain PyTorch behind the operators' functions, on any device."""

from __future__ import annotations

from typing import Any

import torch

from .. import reference
from .protocol import Gradients, Maybe, Operands

STORES_LOW = False
ROUNDS_X = False
STEPS = False


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
    weight, dendrite_bias, cable, soma_bias, c, slope, soma_slope = operands
    u = reference.sparse_linear(x, weight, dendrite_bias, c)
    signs = _pack_signs(u if save_signs else u[:0])
    if cable is None:
        return u, signs
    a = torch.where(u > 0, u, slope * u)
    v = reference.cable(a, cable, soma_bias, c)
    return torch.where(v > 0, v, soma_slope * v), signs


def backward(
    grad: torch.Tensor, x: torch.Tensor, y: Maybe, signs: Maybe, operands: Operands, need_x: bool
) -> Gradients:
    weight, bias, cable, _, c, slope, soma_slope = operands
    row = reference.owners(c.crow_indices, x.device)
    column = c.col_indices.to(x.device)
    none = weight.new_empty(0)
    dc = dbs = none
    q = grad  # at the sums of the dendrites [B, R]
    if cable is not None and y is not None:
        u = reference.sparse_linear(x, weight, bias, c)
        grad = torch.where(y > 0, grad, soma_slope * grad)
        at_dendrite = grad.index_select(1, reference.owners(c.soma_ptr, x.device))
        dc, dbs = (at_dendrite * torch.where(u > 0, u, slope * u)).sum(0), grad.sum(0)
        through = at_dendrite * cable
        q = torch.where(u > 0, through, slope * through)
    at_synapse = q.index_select(1, row)  # [B, nnz]
    dw = (at_synapse * x.index_select(1, column)).sum(0)
    dx = x.new_empty((0, x.shape[1]))
    if need_x:
        dx = reference.sums(at_synapse * weight, column, c.in_features)
    return dx, dw, q.sum(0), dc, dbs
