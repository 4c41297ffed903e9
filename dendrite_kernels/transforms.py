"""A layer of parts that differentiate to any order and in both modes.

What the fused kernels cannot serve -- torch.func transforms, forward mode, the gradient of a
gradient -- is composed of the sparse product and plain torch operations. The sparse product is
bilinear, so its derivatives are the two operators again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch._C import _are_functorch_transforms_active
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import operators
from .backends.protocol import Maybe, Slopes
from .structure import Connectivity


def active() -> bool:
    """Whether torch.func or forward-mode differentiation looks at what runs now."""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


# ---- the sparse product ----


class Linear(torch.autograd.Function):
    """(x, weight, bias) -> u = x W^T + bias."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: torch.Tensor, weight: torch.Tensor, bias: Maybe, connectivity: Connectivity
    ) -> torch.Tensor:
        indices = operators.index_tensors(connectivity, x)
        u: torch.Tensor
        u, _ = operators.forward(x, weight, bias, None, None, *indices, 1.0, 1.0, False)
        return u

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, weight, _, ctx.connectivity = inputs
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Maybe, ...]:
        x, weight = ctx.saved_tensors
        need_x, _, need_bias, _ = ctx.needs_input_grad
        dx, dw, db = LinearBackward.apply(grad, x, weight, ctx.connectivity, need_x)
        return dx if need_x else None, dw, db if need_bias else None, None

    @staticmethod
    def jvp(ctx: Any, x_t: Maybe, weight_t: Maybe, bias_t: Maybe, _: None) -> torch.Tensor:
        (x, weight), connectivity = ctx.saved_tensors, ctx.connectivity
        u_t: Maybe = None if x_t is None else Linear.apply(x_t, weight, None, connectivity)
        if weight_t is not None:
            u_t = _add(u_t, Linear.apply(x, weight_t, None, connectivity))
        if bias_t is not None:
            u_t = _add(u_t, bias_t.expand(*x.shape[:-1], -1))
        if u_t is None:
            raise RuntimeError("Expected a tangent of x, weight or bias, got none")
        return u_t


class LinearBackward(torch.autograd.Function):
    """(grad, x, weight) -> (dx, dw, db): linear in grad, and in x or the weights."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        connectivity: Connectivity,
        need_x: bool,
    ) -> operators.Three:
        indices = operators.index_tensors(connectivity, x)
        none = None, None
        return operators.backward(grad, x, *none, weight, *none, *indices, 1.0, 1.0, need_x)[:3]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        grad, x, weight, ctx.connectivity, ctx.need_x = inputs
        ctx.save_for_backward(grad, x, weight)
        ctx.save_for_forward(grad, x, weight)

    @staticmethod
    def backward(
        ctx: Any, of_dx: torch.Tensor, of_dw: torch.Tensor, of_db: torch.Tensor
    ) -> tuple[Maybe, ...]:
        # <of_dx, dx> + <of_dw, dw> + <of_db, db>, differentiated
        grad, x, weight = ctx.saved_tensors
        linear, backward = Linear.apply, LinearBackward.apply
        by_grad = linear(x, of_dw, of_db, ctx.connectivity)
        by_x, _, _ = backward(grad, x, of_dw, ctx.connectivity, True)
        by_weight = None
        if ctx.need_x:
            by_grad = by_grad + linear(of_dx, weight, None, ctx.connectivity)
            _, by_weight, _ = backward(grad, of_dx, weight, ctx.connectivity, False)
        return by_grad, by_x, by_weight, None, None

    @staticmethod
    def jvp(
        ctx: Any, grad_t: Maybe, x_t: Maybe, weight_t: Maybe, *_: None
    ) -> tuple[torch.Tensor, ...]:
        grad, x, weight = ctx.saved_tensors
        parts = [
            (grad_t, x, weight, (0, 1, 2)),
            (grad, x_t, weight, (1,)),
            (grad, x, weight_t, (0,)),
        ]
        tangents: list[Maybe] = [None, None, None]
        for g, a, w, which in parts:
            if g is None or a is None or w is None:
                continue
            outputs = LinearBackward.apply(g, a, w, ctx.connectivity, ctx.need_x)
            for i in which:
                tangents[i] = _add(tangents[i], outputs[i])
        shapes = ((x if ctx.need_x else x[:0]).shape, weight.shape, grad.shape[-1:])
        return tuple(
            x.new_zeros(shape) if t is None else t
            for t, shape in zip(tangents, shapes, strict=True)
        )


def _add(a: Maybe, b: Maybe) -> Maybe:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _gathered_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: Maybe, connectivity: Connectivity
) -> torch.Tensor:
    """x [..., N] -> u [..., R] of plain torch operations, by way of [..., nnz] products.

    For torch.func inside torch.compile: the compiler follows no autograd.Function through
    transforms (torch 2.13 drops parts of its gradients without a word).
    """
    product = x.index_select(-1, connectivity.col_indices.to(x.device)) * weight
    row = _owners(connectivity.crow_indices, connectivity.nnz, x)
    u = _sums(product, row, connectivity.num_dendrites)
    return u if bias is None else u + bias


def _linear(
    x: torch.Tensor, weight: torch.Tensor, bias: Maybe, connectivity: Connectivity
) -> torch.Tensor:
    """The sparse product that differentiates to any order, in both modes."""
    run = _gathered_linear if is_compiling() else Linear.apply
    u: torch.Tensor = run(x, weight, bias, connectivity)
    return u


# ---- the cable, of plain torch operations ----


def _owners(pointer: torch.Tensor, items: int, x: torch.Tensor) -> torch.Tensor:
    """Which stretch of `pointer` each of the items is in, int64 [items] beside x."""
    steps = operators.beside(x, pointer).to(x.device).long().diff()
    return torch.repeat_interleave(steps, output_size=items)


def _soma_of(connectivity: Connectivity, x: torch.Tensor) -> torch.Tensor:
    return _owners(connectivity.soma_ptr, connectivity.num_dendrites, x)  # [R]


def _sums(values: torch.Tensor, owner: torch.Tensor, owners: int) -> torch.Tensor:
    """values [..., items] -> [..., owners]: what each owner's items add up to."""
    return values.new_zeros((*values.shape[:-1], owners)).index_add(-1, owner, values)


def cable(
    a: torch.Tensor, cable_weight: torch.Tensor, soma_bias: Maybe, connectivity: Connectivity
) -> torch.Tensor:
    """Block sum of dendrites into somas: a [..., R] -> v [..., S], no [S, R] matrix anywhere."""
    per_soma, somas = connectivity.dendrites_per_soma, connectivity.num_somas
    if per_soma is not None:
        blocks = (somas, per_soma)
        v = torch.einsum(
            "...sd,sd->...s", a.unflatten(-1, blocks), cable_weight.unflatten(0, blocks)
        )
    else:
        v = _sums(a * cable_weight, _soma_of(connectivity, a), somas)
    return v if soma_bias is None else v + soma_bias


def soma_reduce(
    u: torch.Tensor, connectivity: Connectivity, op: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """u [..., R] -> values [..., S], winner int32 [..., S]; see functional.soma_reduce."""
    per_soma, somas, rows = connectivity.dendrites_per_soma, connectivity.num_somas, u.shape[-1]
    if op == "sum":
        wide = u.float() if u.dtype in operators.LOW else u  # rounded once
        if per_soma is not None:
            sums = wide.unflatten(-1, (somas, per_soma)).sum(-1)
        else:
            sums = _sums(wide, _soma_of(connectivity, u), somas)
        none = torch.full_like(sums, -1, dtype=torch.int32, requires_grad=False)
        return sums.to(u.dtype), none
    rank = u.detach().abs() if op == "absmax" else u.detach()
    if per_soma is not None:
        first = torch.arange(0, rows, per_soma, device=u.device)  # [S]
        winner = rank.unflatten(-1, (somas, per_soma)).argmax(-1) + first
        return u.gather(-1, winner), winner.int()
    owner = _soma_of(connectivity, u).expand(u.shape)  # [..., R]
    shape = (*u.shape[:-1], somas)
    best = rank.new_full(shape, -torch.inf).scatter_reduce(-1, owner, rank, "amax")
    leads = (rank == best.gather(-1, owner)) | rank.isnan()
    row = torch.arange(rows, device=u.device).expand(u.shape)
    last = torch.full(shape, rows, device=u.device)
    winner = last.scatter_reduce(-1, owner, row.where(leads, rows), "amin")  # rows: none
    has_one = winner < rows
    values = u.gather(-1, winner.clamp(max=rows - 1))
    return values.where(has_one, 0), winner.where(has_one, -1).int()


# ---- the layer ----


def round_to_bfloat16(x: torch.Tensor) -> torch.Tensor:
    """x rounded to bfloat16, in the dtype of x; its gradient is that of x."""
    rounded = x.bfloat16().to(x.dtype)
    return torch.where(x.isfinite(), x + (rounded - x).detach(), rounded)


def layer(
    x: torch.Tensor,
    synapse_weight: torch.Tensor,
    dendrite_bias: Maybe,
    cable_weight: Maybe,
    soma_bias: Maybe,
    connectivity: Connectivity,
    slopes: Slopes,
    round_x: bool,
) -> torch.Tensor:
    """x [B, N] -> y [B, S] with leaky ReLUs of slopes >= 0, or [B, R] without a cable."""
    x = round_to_bfloat16(x) if round_x else x
    u = _linear(x, synapse_weight, dendrite_bias, connectivity)
    if cable_weight is None:
        return u
    v = cable(F.leaky_relu(u, slopes[0]), cable_weight, soma_bias, connectivity)
    return F.leaky_relu(v, slopes[1])


def layer_backward(
    grad: torch.Tensor,  # [B, S]
    x: torch.Tensor,
    y: torch.Tensor,
    synapse_weight: torch.Tensor,
    dendrite_bias: Maybe,
    cable_weight: torch.Tensor,
    connectivity: Connectivity,
    slopes: Slopes,
    need_x: bool,
) -> tuple[torch.Tensor, ...]:
    """What the fused backward computes, of operations that differentiate; recomputes u [B, R].

    The masks have no derivative: the activation is piecewise linear. Samples may have a cable each:
    then cable_weight and its gradient are [B, R].
    """
    if x.dtype in operators.LOW:  # in float32, rounded once
        dendrite_bias = None if dendrite_bias is None else dendrite_bias.float()
        dx, *gradients = layer_backward(
            grad.float(), x.float(), y.float(), synapse_weight.float(), dendrite_bias,
            cable_weight.float(), connectivity, slopes, need_x,
        )  # fmt: skip
        return dx.to(x.dtype), *(g.to(synapse_weight.dtype) for g in gradients)
    u = _linear(x, synapse_weight, dendrite_bias, connectivity)
    grad_v = torch.where(y > 0, grad, slopes[1] * grad)
    spread = grad_v.index_select(1, _soma_of(connectivity, grad))  # [B, R]
    q = torch.where(u > 0, spread, slopes[0] * spread)
    dc = q * u
    dx, dw, dbd = LinearBackward.apply(q * cable_weight, x, synapse_weight, connectivity, need_x)
    return dx, dw, dbd, dc if cable_weight.dim() > 1 else dc.sum(0), grad_v.sum(0)
