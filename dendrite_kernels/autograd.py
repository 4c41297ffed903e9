"""How a layer differentiates: the derivative of the fused kernels, written once.

Two ways lead to `_differentiate`: the fast path, which records a call of the C++ kernels itself,
and the operator `forward`, eager or compiled. What the fused kernels cannot serve goes through
`transforms`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import is_grad_enabled
from torch._C import _get_tracing_state

from . import _adam, backends, fast_path, operators, transforms
from .backends.protocol import AdamStep, Maybe, Slopes
from .structure import Connectivity


def _needs_grad(*tensors: Maybe) -> bool:
    if is_grad_enabled():
        for tensor in tensors:  # any() would be a generator's start and end slower
            if tensor is not None and tensor.requires_grad:
                return True
    return False


# ---- the derivative ----


def _save(
    ctx: Any,
    x: torch.Tensor,
    y: Maybe,
    signs: Maybe,
    synapse_weight: torch.Tensor,
    dendrite_bias: Maybe,
    cable_weight: Maybe,
    indices: tuple[Any, ...],
    slopes: Slopes,
) -> None:
    """What backward reads: with a cable x, y, parameters and one sign bit per dendrite and sample;
    without one x and the weights.
    """
    if cable_weight is None:
        y = signs = None
    ctx.save_for_backward(x, y, signs, synapse_weight, dendrite_bias, cable_weight)
    ctx.rest = indices, slopes, backends.chosen.get()  # one attribute: each costs 0.1 us


def _differentiate(ctx: Any, grad: torch.Tensor) -> tuple[Maybe, ...]:
    """The gradients of forward's arguments: x, the four parameters, None for what follows.

    On forward's backend: autograd may call from a thread of its own, where none is chosen.
    """
    indices, slopes, backend = ctx.rest
    if backend != backends.chosen.get():
        with backends.use_backend(backend):
            return _differentiate(ctx, grad)
    x, y, signs, synapse_weight, dendrite_bias, cable_weight = ctx.saved_tensors
    needed, step = ctx.needs_input_grad, None
    gradients: tuple[Maybe, ...]
    if is_grad_enabled() or transforms.active():  # create_graph=True: this pass is recorded in turn
        crow, col, soma_ptr = indices
        connectivity = operators.connectivity_of(crow, col, soma_ptr, x)
        if cable_weight is None:
            gradients = transforms.LinearBackward.apply(
                grad, x, synapse_weight, connectivity, needed[0]
            )
        else:
            gradients = transforms.layer_backward(
                grad, x, y, synapse_weight, dendrite_bias, cable_weight, connectivity, slopes,
                needed[0],
            )  # fmt: skip
    else:
        tensors = grad, x, y, signs, synapse_weight, dendrite_bias, cable_weight
        if _adam.optimizers and needed[1]:  # of no layer, for most
            step = _step_of(ctx, tensors)
        gradients = operators.backward(*tensors, *indices, *slopes, needed[0], step=step)
        if step is not None:
            _adam.count(synapse_weight, step)
    wanted = [g if need else None for g, need in zip(gradients, needed, strict=False)]
    if step is not None:
        wanted[1] = None
    return *wanted, *(None,) * (len(needed) - len(wanted))


def _step_of(ctx: Any, tensors: tuple[Maybe, ...]) -> AdamStep | None:
    """The step of Adam that this backward pass takes in place of a gradient."""
    grad, weight = tensors[0], tensors[4]
    assert grad is not None
    assert weight is not None
    if not grad.shape[0] or operators.needs_dispatch(*tensors):
        return None
    if not backends.select(grad.device).STEPS:
        return None
    return _adam.due(weight, ctx.next_functions[1][0])


# ---- the operator, eager and compiled ----


class _Operator(torch.autograd.Function):
    """Arguments and results of the operator `forward`."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> operators.Two:
        y, signs = operators.forward(*args)
        x, synapse_weight, dendrite_bias, cable_weight = args[:4]
        _save(ctx, x, y, signs, synapse_weight, dendrite_bias, cable_weight, args[5:8], args[8:10])
        return y, signs

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[Maybe, ...]:
        return _differentiate(ctx, grad)


def _operator(*args: Any) -> operators.Two:
    if _needs_grad(*args[:5]):
        save_signs = args[3] is not None  # whatever a program says that was traced without grad
        recorded: operators.Two = _Operator.apply(*args[:10], save_signs, *args[11:])
        return recorded
    fast = fast_path.operator(*args)  # a compiled program calls the operator, and records nothing
    return operators.forward(*args) if fast is None else fast


operators.library.impl("forward", _operator, "Autograd")


# ---- the fast path ----


class _Fast(torch.autograd.Function):
    """A call of the C++ kernels, which have accepted the operands."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,  # [B, N]
        synapse_weight: torch.Tensor,
        dendrite_bias: Maybe,
        cable_weight: Maybe,
        soma_bias: Maybe,
        rest: tuple[Connectivity, Slopes, Any],  # one argument costs less than three
    ) -> torch.Tensor:
        connectivity, slopes, topology = rest
        parameters = synapse_weight, dendrite_bias, cable_weight
        y: torch.Tensor
        if cable_weight is None:
            signs, y = None, topology.forward(x, *parameters, None, *slopes, False)
        else:
            y, signs = topology.forward(x, *parameters, soma_bias, *slopes, True)
        c = connectivity
        indices = c.crow_indices, c.col_indices, c.soma_ptr
        _save(ctx, x, y, signs, *parameters, indices, slopes)
        return y

    backward = staticmethod(_differentiate)


# What torch.autograd.Function.apply ends in where no functorch transform is active: 4 us sooner.
_record = super(torch.autograd.Function, _Fast).apply


def fast_layer(
    x: Any,
    synapse_weight: Any,
    dendrite_bias: Any,
    cable_weight: Any,
    soma_bias: Any,
    connectivity: Any,
    slopes: Slopes,
) -> Maybe:
    """x [B, N] -> y [B, S], or [B, R] without a cable; None where the fast path does not serve.

    Objects of any type are welcome, but for the slopes, which must be >= 0.
    """
    topology = fast_path.topology_of(connectivity, cable_weight is not None)
    if topology is None:
        return None
    requires_grad = topology.accepts(x, synapse_weight, dendrite_bias, cable_weight, soma_bias)
    if requires_grad is None:
        return None
    y: torch.Tensor
    if requires_grad and is_grad_enabled():
        y = _record(
            x, synapse_weight, dendrite_bias, cable_weight, soma_bias,
            (connectivity, slopes, topology),
        )  # fmt: skip
    else:
        y = topology.forward(
            x, synapse_weight, dendrite_bias, cable_weight, soma_bias, *slopes, False
        )
    return y


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
    """x [B, N] -> y [B, S] with leaky ReLUs of slopes >= 0, or [B, R] without a cable.

    Arguments fit.
    """
    parameters = synapse_weight, dendrite_bias, cable_weight, soma_bias
    if transforms.active():
        return transforms.layer(x, *parameters, connectivity, slopes, round_x)
    if _get_tracing_state() is not None:
        operators.refuse_onnx()
        operators.refuse_onnx_later()
    y: torch.Tensor
    y, _ = torch.ops.dendrite_kernels.forward.default(
        x, *parameters, *operators.index_tensors(connectivity, x), *slopes, False, round_x
    )
    return y
