"""The operators' own derivatives: for compiled and exported programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import autograd, operators
from .fast_path import FORWARD, FORWARD_ROWS, topology_of

Maybe = torch.Tensor | None


def _setup_dendritic(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, synapse_weight, dendrite_bias, cable_weight, _, *indices = inputs[:8]
    ctx.slope, ctx.saved_signs = inputs[8:10]
    y, signs = output
    ctx.save_for_backward(x, y, signs, synapse_weight, dendrite_bias, cable_weight, *indices)


def _differentiate_dendritic(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[Maybe, ...]:
    if not ctx.saved_signs:
        raise RuntimeError(
            "Expected a program traced with gradients enabled, got one that saves no signs"
        )
    x, y, signs, synapse_weight, dendrite_bias, cable_weight = ctx.saved_tensors[:6]
    crow, col, soma_ptr = ctx.saved_tensors[6:]
    parameters, indices = (synapse_weight, dendrite_bias, cable_weight), (crow, col, soma_ptr)
    options = ctx.slope, ctx.needs_input_grad[0]
    if torch.is_grad_enabled():
        connectivity = operators.connectivity_of(*indices, x)
        gradients = autograd.composed_backward(grad, x, y, *parameters, connectivity, *options)
    else:
        gradients = operators.dendritic_backward(grad, x, y, signs, *parameters, *indices, *options)
    return autograd.wanted(ctx, gradients)


def _setup_sparse(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, _ = inputs[:3]
    ctx.save_for_backward(x, weight, *inputs[3:6])


def _differentiate_sparse(ctx: Any, grad: torch.Tensor) -> tuple[Maybe, ...]:
    x, weight, crow, col, soma_ptr = ctx.saved_tensors
    indices = crow, col, soma_ptr
    need_x = ctx.needs_input_grad[0]
    if torch.is_grad_enabled():
        connectivity = operators.connectivity_of(*indices, x)
        dx, dw, db = autograd.SparseLinearBackward.apply(grad, x, weight, connectivity, need_x)
    else:
        dx, dw, db = operators.sparse_backward(grad, x, weight, *indices, need_x)
    return dx if need_x else None, dw, db if ctx.needs_input_grad[2] else None


def _dendritic_forward_at_once(
    x: torch.Tensor,
    synapse_weight: torch.Tensor,
    dendrite_bias: Maybe,
    cable_weight: torch.Tensor,
    soma_bias: Maybe,
    crow: torch.Tensor,
    col: torch.Tensor,
    soma_ptr: torch.Tensor,
    slope: float,
    save_signs: bool,
    round_x: bool = False,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    connectivity = operators.known_connectivity(crow, col, soma_ptr)
    topology = None if round_x else topology_of(connectivity, FORWARD)
    parameters = synapse_weight, dendrite_bias, cable_weight, soma_bias
    if topology is None or topology.accepts(x, *parameters) is None:
        return None
    if not save_signs:
        return topology.forward(x, *parameters, slope, False), torch.empty(0, dtype=torch.int32)
    y, signs = topology.forward(x, *parameters, slope, True)
    return y, signs.flatten()


def _sparse_forward_at_once(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Maybe,
    crow: torch.Tensor,
    col: torch.Tensor,
    soma_ptr: torch.Tensor,
    round_x: bool = False,
) -> Maybe:
    connectivity = operators.known_connectivity(crow, col, soma_ptr)
    topology = None if round_x else topology_of(connectivity, FORWARD_ROWS)
    if topology is None or topology.accepts(x, weight, bias, None, None) is None:
        return None
    u: torch.Tensor = topology.forward(x, weight, bias, None, None, 1.0, False)
    return u


def _register(
    op: torch._ops.OpOverload,
    at_once: Callable[..., Any],  # what the operator returns, or None
    differentiable: int,  # so many of its first arguments
    setup: Callable[[Any, tuple[Any, ...], Any], None],
    differentiate: Callable[..., tuple[Maybe, ...]],
) -> None:
    """As by `register_autograd`, but a call that records nothing is done at once if it can be.

    That is how compiled programs call operators, and a second trip from the dispatcher into Python
    costs more than a small kernel.
    """

    def below_autograd(keys: Any, args: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keys & torch._C._after_autograd_keyset, *args)

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            *inputs, keys = args
            output = below_autograd(keys, tuple(inputs))
            setup(ctx, tuple(inputs), output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Maybe, ...]:
            gradients = differentiate(ctx, *grads)
            return *gradients, *(None,) * (len(ctx.needs_input_grad) - len(gradients))

    def autograd_kernel(keys: Any, *args: Any) -> Any:
        if autograd.needs_grad(*args[:differentiable]):
            return Recorded.apply(*args, keys)
        output = at_once(*args)
        return below_autograd(keys, args) if output is None else output

    operators.library.impl(op, autograd_kernel, "Autograd", with_keyset=True)


_register(
    operators.dendritic_forward,
    _dendritic_forward_at_once,
    5,
    _setup_dendritic,
    _differentiate_dendritic,
)
_register(
    operators.sparse_forward, _sparse_forward_at_once, 3, _setup_sparse, _differentiate_sparse
)
