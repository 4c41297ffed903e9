"""How the operations differentiate.

Eager code takes the fused Functions: little per call, and no [B, R] activation kept. What they
cannot serve -- torch.func transforms, forward mode, the gradient of a gradient -- is composed of
the sparse product and plain torch operations. The sparse product is bilinear, so its derivatives
are the same two operators again, to any order and in both modes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch._C import _are_functorch_transforms_active
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import operators
from .operators import dendritic_forward, sparse_forward
from .structure import Connectivity

Maybe = torch.Tensor | None


def transforms_active() -> bool:
    """Whether torch.func or forward-mode differentiation looks at what runs now."""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def _add(a: Maybe, b: Maybe) -> Maybe:
    if a is None or b is None:
        return b if a is None else a
    return a + b


class SparseLinear(torch.autograd.Function):
    """Keeps x and the weights."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Maybe,
        connectivity: Connectivity,
        run: Callable[..., torch.Tensor],  # operators.run_sparse_forward, or what it ends in
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.connectivity = connectivity
        return run(x, weight, bias, connectivity)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Maybe, ...]:
        x, weight = ctx.saved_tensors
        need_x = ctx.needs_input_grad[0]
        recorded = torch.is_grad_enabled()  # create_graph=True
        run = SparseLinearBackward.apply if recorded else operators.run_sparse_backward
        dx, dw, db = run(grad, x, weight, ctx.connectivity, need_x)
        return dx if need_x else None, dw, db if ctx.needs_input_grad[2] else None, None, None


class TransformableSparseLinear(torch.autograd.Function):
    """SparseLinear under torch.func and forward mode; slower to call."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: torch.Tensor, weight: torch.Tensor, bias: Maybe, connectivity: Connectivity
    ) -> torch.Tensor:
        return operators.run_sparse_forward(x, weight, bias, connectivity)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, weight, _, ctx.connectivity = inputs
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Maybe, ...]:
        x, weight = ctx.saved_tensors
        need_x = ctx.needs_input_grad[0]
        dx, dw, db = SparseLinearBackward.apply(grad, x, weight, ctx.connectivity, need_x)
        return dx if need_x else None, dw, db if ctx.needs_input_grad[2] else None, None

    @staticmethod
    def jvp(ctx: Any, x_t: Maybe, weight_t: Maybe, bias_t: Maybe, _: None) -> torch.Tensor:
        x, weight = ctx.saved_tensors
        apply, connectivity = TransformableSparseLinear.apply, ctx.connectivity
        u_t = None if x_t is None else apply(x_t, weight, None, connectivity)
        u_t = u_t if weight_t is None else _add(u_t, apply(x, weight_t, None, connectivity))
        if bias_t is not None:
            u_t = _add(u_t, bias_t.expand(*x.shape[:-1], -1))
        if u_t is None:
            raise RuntimeError("Expected a tangent of x, weight or bias, got none")
        return u_t


class SparseLinearBackward(torch.autograd.Function):
    """(grad, x, weight) -> (dx, dw, db): linear in grad, and in x or the weights."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        connectivity: Connectivity,
        need_x: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return operators.run_sparse_backward(grad, x, weight, connectivity, need_x)

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
        linear, backward = TransformableSparseLinear.apply, SparseLinearBackward.apply
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
            outputs = SparseLinearBackward.apply(g, a, w, ctx.connectivity, ctx.need_x)
            for i in which:
                tangents[i] = _add(tangents[i], outputs[i])
        shapes = ((x if ctx.need_x else x[:0]).shape, weight.shape, grad.shape[-1:])
        return tuple(
            x.new_zeros(shape) if t is None else t
            for t, shape in zip(tangents, shapes, strict=True)
        )


def _owners(pointer: torch.Tensor, items: int, device: torch.device) -> torch.Tensor:
    """Which stretch of `pointer` each of the items is in, int64 [items]."""
    return torch.repeat_interleave(pointer.to(device).long().diff(), output_size=items)


def _soma_of(connectivity: Connectivity, device: torch.device) -> torch.Tensor:
    return _owners(connectivity.soma_ptr, connectivity.num_dendrites, device)  # [R]


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
        v = _sums(a * cable_weight, _soma_of(connectivity, a.device), somas)
    return v if soma_bias is None else v + soma_bias


def gathered_sparse_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: Maybe, connectivity: Connectivity
) -> torch.Tensor:
    """x [..., N] -> u [..., R] of plain torch operations, by way of [..., nnz] products.

    For torch.func inside torch.compile: the compiler follows no autograd.Function through
    transforms (torch 2.13 drops parts of its gradients without a word).
    """
    device = x.device
    product = x.index_select(-1, connectivity.col_indices.to(device)) * weight
    row = _owners(connectivity.crow_indices, connectivity.nnz, device)
    u = _sums(product, row, connectivity.num_dendrites)
    return u if bias is None else u + bias


class DendriticLayer(torch.autograd.Function):
    """Keeps x, y, the parameters and one sign bit per dendrite and sample."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,  # [B, N]
        synapse_weight: torch.Tensor,
        dendrite_bias: Maybe,
        cable_weight: torch.Tensor,
        soma_bias: Maybe,
        rest: tuple[Connectivity, float, Callable[..., tuple[torch.Tensor, torch.Tensor]]],
    ) -> torch.Tensor:
        connectivity, slope, run = rest
        y, signs = run(
            x, synapse_weight, dendrite_bias, cable_weight, soma_bias, connectivity, slope, True
        )
        ctx.save_for_backward(x, y, signs, synapse_weight, dendrite_bias, cable_weight)
        ctx.rest = rest
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Maybe, ...]:
        x, y, signs, synapse_weight, dendrite_bias, cable_weight = ctx.saved_tensors
        need_x = ctx.needs_input_grad[0]
        connectivity, slope, _ = ctx.rest
        if torch.is_grad_enabled():  # create_graph=True: this pass is recorded in turn
            gradients = composed_backward(
                grad, x, y, synapse_weight, dendrite_bias, cable_weight, connectivity, slope,
                need_x,
            )  # fmt: skip
        else:
            gradients = operators.run_dendritic_backward(
                grad, x, y, signs, synapse_weight, dendrite_bias, cable_weight, connectivity,
                slope, need_x,
            )  # fmt: skip
        return *wanted(ctx, gradients), None


def wanted(ctx: Any, gradients: tuple[torch.Tensor, ...]) -> tuple[Maybe, ...]:
    """Of x and the parameters, in the order of forward; a bias that is None has no gradient."""
    dx, dw, dbd, dc, dbs = gradients
    need_x, _, need_dendrite_bias, _, need_soma_bias, *_ = ctx.needs_input_grad
    return (
        dx if need_x else None,
        dw,
        dbd if need_dendrite_bias else None,
        dc,
        dbs if need_soma_bias else None,
    )


def composed_backward(
    grad: torch.Tensor,  # [B, S]
    x: torch.Tensor,
    y: torch.Tensor,
    synapse_weight: torch.Tensor,
    dendrite_bias: Maybe,
    cable_weight: torch.Tensor,
    connectivity: Connectivity,
    slope: float,
    need_x: bool,
) -> tuple[torch.Tensor, ...]:
    """What the fused backward computes, of operations that differentiate; recomputes u [B, R].

    The masks have no derivative: the activation is piecewise linear.
    """
    if x.dtype in operators.LOW:  # in float32, rounded once
        dendrite_bias = None if dendrite_bias is None else dendrite_bias.float()
        dx, *gradients = composed_backward(
            grad.float(), x.float(), y.float(), synapse_weight.float(), dendrite_bias,
            cable_weight.float(), connectivity, slope, need_x,
        )  # fmt: skip
        return dx.to(x.dtype), *(g.to(synapse_weight.dtype) for g in gradients)
    run = operators.run_sparse_forward
    u = SparseLinear.apply(x, synapse_weight, dendrite_bias, connectivity, run)
    grad_v = torch.where(y > 0, grad, slope * grad)
    spread = grad_v.index_select(1, _soma_of(connectivity, grad.device))  # [B, R]
    q = torch.where(u > 0, spread, slope * spread)
    dc = (q * u).sum(0)
    dx, dw, dbd = SparseLinearBackward.apply(
        q * cable_weight, x, synapse_weight, connectivity, need_x
    )
    return dx, dw, dbd, dc, grad_v.sum(0)


def needs_grad(*tensors: Maybe) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:  # any() would be a generator's start and end slower
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def round_to_bfloat16(x: torch.Tensor) -> torch.Tensor:
    """x rounded to bfloat16, in the dtype of x; its gradient is that of x."""
    rounded = x.bfloat16().to(x.dtype)
    return torch.where(x.isfinite(), x + (rounded - x).detach(), rounded)


def sparse_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: Maybe, connectivity: Connectivity, round_x: bool
) -> torch.Tensor:
    """x [B, N] -> u [B, R]; arguments fit."""
    if transforms_active():
        run = gathered_sparse_linear if is_compiling() else TransformableSparseLinear.apply
        x = round_to_bfloat16(x) if round_x else x
        transformed: torch.Tensor = run(x, weight, bias, connectivity)
        return transformed
    u: torch.Tensor
    if is_compiling():
        u = sparse_forward(
            x, weight, bias, connectivity.crow_indices, connectivity.col_indices,
            connectivity.soma_ptr, round_x,
        )  # fmt: skip
        return u
    compute = (
        partial(operators.run_sparse_forward, round_x=True)
        if round_x
        else operators.run_sparse_forward
    )
    if needs_grad(x, weight, bias):
        u = SparseLinear.apply(x, weight, bias, connectivity, compute)
    else:
        u = compute(x, weight, bias, connectivity)
    return u


def dendritic_layer(
    x: torch.Tensor,
    synapse_weight: torch.Tensor,
    dendrite_bias: Maybe,
    cable_weight: torch.Tensor,
    soma_bias: Maybe,
    connectivity: Connectivity,
    slope: float,
    round_x: bool,
) -> torch.Tensor:
    """x [B, N] -> y [B, S] with a leaky ReLU of slope >= 0; arguments fit."""
    parameters = synapse_weight, dendrite_bias, cable_weight, soma_bias
    if transforms_active():
        u = sparse_linear(x, synapse_weight, dendrite_bias, connectivity, round_x)
        v = cable(F.leaky_relu(u, slope), cable_weight, soma_bias, connectivity)
        return F.leaky_relu(v, slope)
    recorded = needs_grad(x, *parameters)
    y: torch.Tensor
    if is_compiling():
        y, _ = dendritic_forward(
            x, *parameters, connectivity.crow_indices, connectivity.col_indices,
            connectivity.soma_ptr, slope, recorded, round_x,
        )  # fmt: skip
        return y
    run = operators.run_dendritic_forward
    compute = partial(run, round_x=True) if round_x else run
    if recorded:
        y = DendriticLayer.apply(x, *parameters, (connectivity, slope, compute))
    else:
        y, _ = compute(x, *parameters, connectivity, slope, False)
    return y
