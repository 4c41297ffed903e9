"""Which synapse weights a backward pass may step by itself: those of optim.StepInBackward.

A backend that finishes the gradient of a weight can take the step of Adam there, so that the
gradient is neither written nor read. It is the same step, on the state of the same optimizer, and
wherever something else could see the gradient the optimizer takes it as usual.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from .backends.protocol import AdamStep

_EXACT = (torch.optim.Adam, torch.optim.AdamW)  # a subclass may do otherwise
_AS_HERE = {"amsgrad": False, "maximize": False, "differentiable": False, "fused": True}

# By the parameter that each steps alone. Weak references: an optimizer holds its parameter.
optimizers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_stepped: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # parameter -> the backward pass


def due(weight: torch.Tensor, accumulate: Any) -> AdamStep | None:
    """The step to take in the backward pass that runs, None where it is the optimizer's to take.

    Args:
        weight: the synapse weight of a layer, as autograd saved it.
        accumulate: the node that takes its gradient.
    """
    reference = optimizers.get(weight)
    optimizer = None if reference is None else reference()
    if optimizer is None or not _gradient_is_ours(weight, optimizer, accumulate):
        return None
    group = optimizer.param_groups[0]
    state = optimizer.state.get(weight)  # the optimizer makes it in its first step
    if not state or any(group[name] != value for name, value in _AS_HERE.items()):
        return None
    exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
    if isinstance(group["lr"], torch.Tensor) or any(
        t.dtype is not weight.dtype or not t.is_contiguous() for t in (weight, exp_avg, exp_avg_sq)
    ):
        return None
    beta1, beta2 = group["betas"]
    decay, decoupled = group["weight_decay"], group.get("decoupled_weight_decay", False)
    rest = group["lr"], beta1, beta2, group["eps"], decay, decoupled
    return AdamStep(exp_avg, exp_avg_sq, state["step"], *rest)


def _gradient_is_ours(weight: torch.Tensor, optimizer: Optimizer, accumulate: Any) -> bool:
    """Whether this pass takes a gradient to the optimizer and to no one else."""
    if type(optimizer) not in _EXACT or len(optimizer.param_groups) != 1:
        return False
    if torch.is_anomaly_enabled():  # looks for NaN in gradients
        return False
    if weight.grad is not None or weight.dtype not in (torch.float32, torch.float64):
        return False
    hooks = (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    )
    own = weight._backward_hooks, weight._post_accumulate_grad_hooks
    if any(hooks) or any(len(each or ()) != 1 for each in own):  # StepInBackward has one of each
        return False
    try:
        return torch._C._will_engine_execute_node(accumulate)
    except RuntimeError:  # autograd.grad asks for the gradient itself
        return False


def count(weight: torch.Tensor, step: AdamStep) -> None:
    """Note that the backward pass has taken a step.

    What else reads the weight in this pass is too late, and autograd will notice.
    """
    step.step.add_(1)
    torch.autograd.graph.increment_version(weight)
    _stepped[weight] = torch._C._current_graph_task_id()


def counted(weight: torch.Tensor) -> bool:
    """Whether the backward pass that runs has stepped it."""
    return bool(_stepped.get(weight) == torch._C._current_graph_task_id())
