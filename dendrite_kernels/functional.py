"""The two operations as differentiable functions: one torch.autograd.Function each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from . import ops
from .reference import activation_function
from .topology import Connectivity

Maybe = torch.Tensor | None
_DTYPES = (torch.float32, torch.float64)
# Piecewise linear through the origin: backward needs only the sign of what went in.
_SLOPES = {"relu": 0.0, "identity": 1.0}


def check_activation(activation: str, negative_slope: float) -> None:
    """ValueError unless the name is known and the slope is finite and not negative."""
    activation_function(activation, negative_slope)
    if not (math.isfinite(negative_slope) and negative_slope >= 0):
        raise ValueError(f"Expected a finite negative_slope >= 0, got {negative_slope}")


def _check(
    x: torch.Tensor, connectivity: Connectivity, parameters: Sequence[tuple[str, Maybe, int]]
) -> None:
    """Parameters are (name, tensor or None, length). Everything must fit before a kernel runs."""
    if not isinstance(connectivity, Connectivity):
        raise TypeError(f"Expected a Connectivity, got {type(connectivity).__name__}")
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"Expected x to be a torch.Tensor, got {type(x).__name__}")
    if x.dim() == 0 or x.shape[-1] != connectivity.in_features:
        raise ValueError(
            f"Expected x of shape [..., {connectivity.in_features}], got {list(x.shape)}"
        )
    if x.dtype not in _DTYPES:
        raise TypeError(f"Expected x of dtype float32 or float64, got {x.dtype}")
    for name, tensor, length in parameters:
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"Expected {name} to be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dim() != 1 or tensor.shape[0] != length:
            raise ValueError(f"Expected {name} of shape [{length}], got {list(tensor.shape)}")
        if tensor.dtype != x.dtype:
            raise TypeError(f"Expected {name} of dtype {x.dtype} like x, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"Expected {name} on {x.device} like x, got {tensor.device}")


def _needs_grad(*tensors: Maybe) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class _DendriticLayer(torch.autograd.Function):
    """Keeps x, y, the parameters and one sign bit per dendrite and sample."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,  # [B, N]
        synapse_weight: torch.Tensor,
        dendrite_bias: Maybe,
        cable_weight: torch.Tensor,
        soma_bias: Maybe,
        connectivity: Connectivity,
        slope: float,
    ) -> torch.Tensor:
        indices = ops.index_tensors(connectivity)
        y, signs = ops.dendritic_forward(
            x, synapse_weight, dendrite_bias, cable_weight, soma_bias, *indices, slope, True
        )
        ctx.save_for_backward(x, y, signs, synapse_weight, dendrite_bias, cable_weight)
        ctx.connectivity, ctx.slope = connectivity, slope
        ctx.has_soma_bias = soma_bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Maybe, ...]:
        x, y, signs, synapse_weight, dendrite_bias, cable_weight = ctx.saved_tensors
        need_x = ctx.needs_input_grad[0]
        dx, dw, dbd, dc, dbs = ops.dendritic_backward(
            grad, x, y, signs, synapse_weight, dendrite_bias, cable_weight,
            *ops.index_tensors(ctx.connectivity), ctx.slope, need_x,
        )  # fmt: skip
        return (
            dx if need_x else None,
            dw,
            None if dendrite_bias is None else dbd,
            dc,
            dbs if ctx.has_soma_bias else None,
            None,
            None,
        )


class _SparseLinear(torch.autograd.Function):
    """Keeps x and the weights."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: Maybe, connectivity: Connectivity
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.connectivity, ctx.has_bias = connectivity, bias is not None
        u: torch.Tensor = ops.sparse_forward(x, weight, bias, *ops.index_tensors(connectivity))
        return u

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Maybe, ...]:
        x, weight = ctx.saved_tensors
        need_x = ctx.needs_input_grad[0]
        indices = ops.index_tensors(ctx.connectivity)
        dx, dw, db = ops.sparse_backward(grad, x, weight, *indices, need_x)
        return dx if need_x else None, dw, db if ctx.has_bias else None, None


def _flatten(x: torch.Tensor) -> torch.Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _unflatten(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])


def sparse_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: Maybe, connectivity: Connectivity
) -> torch.Tensor:
    """u = x W^T + bias with W [R, N] sparse: only the synapses that exist are computed.

    Args:
        x: [..., N], float32 or float64, any strides.
        weight: [nnz], in the order of connectivity.col_indices.
        bias: [R] or None.
        connectivity: which inputs each of the R rows sees; its somas play no part.

    Returns:
        [..., R].

    Raises:
        TypeError, ValueError: a dtype, shape or device does not fit.
    """
    _check(
        x,
        connectivity,
        [("weight", weight, connectivity.nnz), ("bias", bias, connectivity.num_dendrites)],
    )
    if connectivity.is_dense:  # dense synapses are a matrix product
        return F.linear(
            x, weight.reshape(connectivity.num_dendrites, connectivity.in_features), bias
        )
    rows = _flatten(x)
    if _needs_grad(x, weight, bias):
        u = _SparseLinear.apply(rows, weight, bias, connectivity)
    else:
        u = ops.sparse_forward(rows, weight, bias, *ops.index_tensors(connectivity))
    return _unflatten(u, x)


def _cable(
    a: torch.Tensor, cable_weight: torch.Tensor, soma_bias: Maybe, connectivity: Connectivity
) -> torch.Tensor:
    """Block sum of dendrites into somas: a [..., R] -> v [..., S], no [S, R] matrix anywhere."""
    per_soma = connectivity.dendrites_per_soma
    if per_soma is not None:
        blocks = (connectivity.num_somas, per_soma)
        v = torch.einsum(
            "...sd,sd->...s", a.unflatten(-1, blocks), cable_weight.unflatten(0, blocks)
        )
    else:
        soma_ptr = connectivity.soma_ptr.to(a.device).long()
        soma = torch.repeat_interleave(soma_ptr.diff())  # [R]
        v = a.new_zeros((*a.shape[:-1], connectivity.num_somas)).index_add(
            -1, soma, a * cable_weight
        )
    return v if soma_bias is None else v + soma_bias


def dendritic_layer(
    x: torch.Tensor,
    synapse_weight: torch.Tensor,
    dendrite_bias: Maybe,
    cable_weight: torch.Tensor,
    soma_bias: Maybe,
    connectivity: Connectivity,
    *,
    activation: str = "leaky_relu",
    negative_slope: float = 0.1,
) -> torch.Tensor:
    """A dendrosomatic layer: synapses -> dendrites -> cable -> somas.

        u[r] = sum_k synapse_weight[r, k] x[col[r, k]] + dendrite_bias[r];   a = phi(u)
        v[s] = sum_{r in soma s} cable_weight[r] a[r] + soma_bias[s];        y = phi(v)

    leaky_relu, relu and identity run as one fused kernel whose backward keeps a sign bit per
    dendrite and sample; other activations keep u; dense synapses are a matrix product.

    Args:
        x: [..., N], float32 or float64, any strides.
        synapse_weight: [nnz], in the order of connectivity.col_indices.
        dendrite_bias: [R] or None.
        cable_weight: [R].
        soma_bias: [S] or None.
        connectivity: which inputs each dendrite sees, which dendrites each soma owns.
        activation: leaky_relu, relu, identity, tanh, sigmoid, gelu, silu or elu, at both stages.
        negative_slope: of leaky_relu, >= 0 (the derivative at 0 is the slope, as in PyTorch).

    Returns:
        [..., S].

    Raises:
        TypeError, ValueError: a dtype, shape, device or option does not fit.

    Source: Chavlis & Poirazi (2025), paper.md section 1, items 1 and 2.
    """
    check_activation(activation, negative_slope)
    _check(
        x,
        connectivity,
        [
            ("synapse_weight", synapse_weight, connectivity.nnz),
            ("dendrite_bias", dendrite_bias, connectivity.num_dendrites),
            ("cable_weight", cable_weight, connectivity.num_dendrites),
            ("soma_bias", soma_bias, connectivity.num_somas),
        ],
    )
    slope = negative_slope if activation == "leaky_relu" else _SLOPES.get(activation)
    if slope is None or connectivity.is_dense:
        phi = activation_function(activation, negative_slope)
        a = phi(sparse_linear(x, synapse_weight, dendrite_bias, connectivity))
        return phi(_cable(a, cable_weight, soma_bias, connectivity))
    rows = _flatten(x)
    if _needs_grad(x, synapse_weight, dendrite_bias, cable_weight, soma_bias):
        y = _DendriticLayer.apply(
            rows, synapse_weight, dendrite_bias, cable_weight, soma_bias, connectivity, slope
        )
    else:
        y, _ = ops.dendritic_forward(
            rows, synapse_weight, dendrite_bias, cable_weight, soma_bias,
            *ops.index_tensors(connectivity), slope, False,
        )  # fmt: skip
    return _unflatten(y, x)
