"""A gate for each dendrite and sample, with a backward pass that reads one sign bit of each.

    v[b,s] = sum_{r in soma s} c[r] g[b,r] a[b,r] + bs[s]

With q[b,r] = gv[b,s] m(u[b,r]) g[b,r], and G, G0 its products with x and 1, the gradients are those
of docs/equations.md, section 2. Only that of the gate, gv[b,s] c[r] a[b,r], asks for a.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import is_grad_enabled
from torch._C import _get_tracing_state
from torch.compiler import is_compiling

from . import backends, operators, transforms
from .backends.protocol import Maybe, Slopes
from .structure import Connectivity

Gradients = tuple[Maybe, ...]  # of x, the four parameters and the gate


def serves() -> bool:
    """Whether nothing but eager autograd looks on. Others take the layer as a composition."""
    return not (transforms.active() or is_compiling() or _get_tracing_state() is not None)


class Layer(torch.autograd.Function):
    """x [B, N], parameters, gate [B, R] -> y [B, S]; float32 or float64, arguments fit."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        synapse_weight: torch.Tensor,
        dendrite_bias: Maybe,
        cable_weight: torch.Tensor,
        soma_bias: Maybe,
        gate: torch.Tensor,
        connectivity: Connectivity,
        slopes: Slopes,
        round_x: bool,
    ) -> torch.Tensor:
        u = _sums_of_dendrites(x, synapse_weight, dendrite_bias, connectivity, round_x)
        signs = _packed(u > 0) if any(ctx.needs_input_grad) else None
        a = F.leaky_relu(u, slopes[0], inplace=True).mul_(gate).mul_(cable_weight)
        v, _ = transforms.soma_reduce(a, connectivity, "sum")
        y = F.leaky_relu(v if soma_bias is None else v.add_(soma_bias), slopes[1], inplace=True)
        ctx.save_for_backward(x, y, signs, synapse_weight, dendrite_bias, cable_weight, gate)
        ctx.rest = connectivity, slopes, round_x, backends.chosen.get()
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:
        *rest, backend = ctx.rest
        run = _recorded if is_grad_enabled() else _gradients
        with backends.use_backend(backend):  # autograd's own thread knows of no choice
            gradients = run(ctx.needs_input_grad, grad, *ctx.saved_tensors, *rest)
        needed = zip(gradients, ctx.needs_input_grad, strict=False)
        return *(g if need else None for g, need in needed), None, None, None


def _sums_of_dendrites(
    x: torch.Tensor, weight: torch.Tensor, bias: Maybe, c: Connectivity, round_x: bool
) -> torch.Tensor:
    indices = operators.index_tensors(c, x)
    u: torch.Tensor
    u, _ = operators.forward(x, weight, bias, None, None, *indices, 1.0, 1.0, False, round_x)
    return u


def _gradients(
    needed: tuple[bool, ...],
    grad: torch.Tensor,  # [B, S]
    x: torch.Tensor,
    y: torch.Tensor,
    signs: torch.Tensor,
    synapse_weight: torch.Tensor,
    dendrite_bias: Maybe,
    cable_weight: torch.Tensor,
    gate: torch.Tensor,
    connectivity: Connectivity,
    slopes: Slopes,
    round_x: bool,
) -> Gradients:
    """From the sign bits; sums of dendrites are computed anew for the gate's gradient only."""
    c = connectivity
    grad_v = _slope_times(grad, y, slopes[1])
    spread = grad_v.index_select(1, transforms._soma_of(c, grad))  # [B, R]
    q = _slope_times(spread, _unpacked(signs, len(x)).to(x.dtype), slopes[0])
    dgate = None
    if needed[5]:
        u = _sums_of_dendrites(x, synapse_weight, dendrite_bias, c, round_x)
        dgate = u.mul_(q).mul_(cable_weight)
    row = transforms._owners(c.crow_indices, c.nnz, x)  # [nnz]
    cable = cable_weight.index_select(0, row)
    dx, products, sums, _, _ = operators.backward(
        q.mul_(gate), x, None, None, synapse_weight * cable, None, None,
        *operators.index_tensors(c, x), 1.0, 1.0, needed[0],
    )  # fmt: skip
    dc = transforms._sums(synapse_weight * products, row, c.num_dendrites)
    if dendrite_bias is not None:
        dc = dc + dendrite_bias * sums
    return dx, cable * products, cable_weight * sums, dc, grad_v.sum(0), dgate


def _recorded(
    needed: tuple[bool, ...],
    grad: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    _: torch.Tensor,
    synapse_weight: torch.Tensor,
    dendrite_bias: Maybe,
    cable_weight: torch.Tensor,
    gate: torch.Tensor,
    connectivity: Connectivity,
    slopes: Slopes,
    round_x: bool,
) -> Gradients:
    """The same of operations that differentiate, for create_graph=True.

    With a cable of its own for each sample the layer is the one that `transforms` knows, whose
    gradient at the cable is q u, one row a sample.
    """
    rounded = transforms.round_to_bfloat16(x) if round_x else x
    dx, dw, dbd, at_cable, dbs = transforms.layer_backward(
        grad, rounded, y, synapse_weight, dendrite_bias, cable_weight * gate, connectivity, slopes,
        needed[0],
    )  # fmt: skip
    return dx, dw, dbd, (at_cable * gate).sum(0), dbs, at_cable * cable_weight


def _slope_times(grad: torch.Tensor, u: torch.Tensor, slope: float) -> torch.Tensor:
    """m(u) grad: several times as fast as torch.where, whose branches nothing predicts."""
    product: torch.Tensor = torch.ops.aten.leaky_relu_backward(grad, u, slope, False)
    return product


def _packed(bits: torch.Tensor) -> torch.Tensor:
    """bool [B, R] -> uint8 [ceil(B / 8), R], bit i of [t, r] from [8 t + i, r]."""
    rows = F.pad(bits.view(torch.uint8), (0, 0, 0, -len(bits) % 8)).unflatten(0, (-1, 8))
    packed: torch.Tensor = rows[:, 0].clone()
    for i in range(1, 8):
        packed |= rows[:, i] << i
    return packed


def _unpacked(packed: torch.Tensor, batch: int) -> torch.Tensor:
    """uint8 [batch, R] of 0 and 1, the inverse of `_packed`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)[:, None]
    bits: torch.Tensor = (packed.unsqueeze(1) >> shifts) & 1
    return bits.flatten(0, 1)[:batch]
