"""Training: groups of parameters, and steps taken during backward, in little memory."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from . import _adam
from ._modules import check_shapes
from .nn import _Sparse
from .shunting import Conductance

_NORMS = (
    nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase,
)  # fmt: skip


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for any torch.optim optimizer: parameters that decay, then those that do not.

    Recipes often tell weights from biases by their dimensions: what has two or more decays. The
    weights of our layers have one, a number for each synapse or cable, and would not decay. Here
    they do, like matrices, convolutions and embeddings; biases, parameters of norms and logarithms
    of conductances (models.shunting) do not. A
    parameter that several modules share is in one group once, and decays if it is a weight of one.

        torch.optim.AdamW(parameter_groups(model, weight_decay=0.01), lr=1e-3)

    Rules for matrices, such as torch.optim.Muon, do not take our weights: choose matrices for them
    by `p.ndim == 2`, and leave what remains to AdamW.

    Args:
        model: all its parameters are in the groups, frozen ones too.
        weight_decay: of the first group; the second has 0. A group may be empty.

    Raises:
        ValueError: a weight_decay that is negative or not finite, or a lazy parameter.
    """
    check_shapes(model)
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"Expected a finite weight_decay >= 0, got {weight_decay}")
    weights = {id(p) for module in model.modules() for p in _weights(module)}
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = [], []
    for p in model.parameters():
        groups[id(p) not in weights].append(p)
    return [
        {"params": groups[0], "weight_decay": weight_decay},
        {"params": groups[1], "weight_decay": 0.0},
    ]


def _weights(module: nn.Module) -> list[nn.Parameter]:
    """Those of a module's parameters that decay, without those of its children."""
    if isinstance(module, _Sparse):
        named = [(_stem(name), p) for name, p in module.named_parameters()]
        return [
            p
            for name, p in named
            if name.endswith(("weight", "cable")) and not _is_logarithm(module, name)
        ]
    if isinstance(module, _NORMS):
        return []
    return [p for p in module.parameters(recurse=False) if p.dim() >= 2]


def _stem(name: str) -> str:
    """Of which parameter this is, where it is parametrized or under torch.nn.utils.prune."""
    return name.removeprefix("parametrizations.").partition(".")[0].removesuffix("_orig")


def _is_logarithm(module: nn.Module, name: str) -> bool:
    """Whether what trains is the logarithm of a weight, which decay would pull to 1."""
    parts: Any = getattr(module, "parametrizations", {})
    return name in parts and any(isinstance(part, Conductance) for part in parts[name])


class StepInBackward:
    """Any torch.optim optimizer, stepped during backward: no full set of gradients is ever alive.

    A parameter's gradient is used and freed before backward goes on to earlier layers, so a model
    needs memory for the gradients of one layer at a time. `backward()` then is the whole step:
    there is no `zero_grad` and no `step`.

        trainer = StepInBackward(model.parameters(), lambda p: torch.optim.Adam(p, lr=1e-3))
        loss(model(x)).backward()

    Every parameter has an optimizer of its own, in `trainer.optimizers`. A schedule of learning
    rates is one scheduler for each:

        schedulers = [torch.optim.lr_scheduler.StepLR(o, 10) for o in trainer.optimizers]
        ...
        for scheduler in schedulers:
            scheduler.step()

    On a GPU, synapse weights whose optimizer is torch.optim.Adam or AdamW with fused=True are
    stepped by the kernel that finishes their gradient, which is then never stored. Who could see
    the gradient still does: a hook of the parameter or the optimizer, a profiler, torch.compile.

    What needs all gradients at once does not work:

    - Gradients accumulated over several backward calls: each call is a step. Call backward once, on
      the mean of the losses.
    - `clip_grad_norm_`: after backward it finds no gradient, returns 0 and clips nothing. Clipping
      each gradient alone works, by parameter.register_hook.
    - `torch.amp.GradScaler`: gradients would be used before they are unscaled and checked.
      Its `step` raises; nothing can tell before. bfloat16 needs no scaler.
    - `DistributedDataParallel`: each process would step by its own gradients, before they are
      averaged, and nothing here can tell.

    Where backward is interrupted, or fails, some parameters have been stepped and others not.

    Parameters that take the place of those given, as after `load_state_dict(assign=True)`, are not
    stepped: they keep their gradients, and nothing here can tell. Load without `assign`, or call
    `remove` and make another StepInBackward.

    Args:
        parameters: those to train; ones that need no gradient are passed over.
        make: called with [parameter] for each, returns its optimizer, of this parameter alone.

    Raises:
        ValueError: no parameter needs a gradient, one already holds one, is given twice or is
            trained by another StepInBackward (`remove` that first), or an optimizer has other
            parameters.
        RuntimeError: in backward: a parameter already holds a gradient, so that they would be
            accumulated; a group was added to an optimizer, which no backward would step; or a
            weight that a kernel has stepped has a gradient from elsewhere than its layer too, such
            as a penalty: give it another optimizer, say fused=False, or AdamW's weight_decay.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        make: Callable[[list[torch.nn.Parameter]], Optimizer],
    ) -> None:
        chosen = [p for p in parameters if p.requires_grad]
        if not chosen:
            raise ValueError("Expected parameters that need gradients, got none")
        if any(p.grad is not None for p in chosen):
            raise ValueError("Expected parameters without gradients, got some that hold one")
        if len({id(p) for p in chosen}) < len(chosen):
            raise ValueError("Expected each parameter once, got some twice")
        if any(p in _adam.optimizers for p in chosen):
            raise ValueError(
                "Expected parameters of no other StepInBackward, got some of one: call its remove()"
            )
        self.optimizers = [make([p]) for p in chosen]
        for p, optimizer in zip(chosen, self.optimizers, strict=True):
            if not _steps_only(optimizer, p):
                raise ValueError("Expected an optimizer of the given parameter, got other ones")
        self._handles = []
        for p, optimizer in zip(chosen, self.optimizers, strict=True):
            self._handles += [
                p.register_hook(_refuse_accumulation(p, optimizer)),
                p.register_post_accumulate_grad_hook(_step(weakref.ref(optimizer))),
            ]
        self._parameters = chosen
        _adam.optimizers.update(zip(chosen, map(weakref.ref, self.optimizers), strict=True))

    def remove(self) -> None:
        """Give the parameters back: later backward calls leave gradients as usual."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for p in self._parameters:
            del _adam.optimizers[p]

    def state_dict(self) -> list[dict[str, Any]]:
        """Of each optimizer, in the order of the parameters, with the parameter's shape."""
        return [
            {**optimizer.state_dict(), "shape": list(p.shape)}
            for p, optimizer in zip(self._parameters, self.optimizers, strict=True)
        ]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """What `state_dict` returned for the same parameters in the same order.

        Raises:
            ValueError: it was for another number of parameters, or for parameters of other shapes.
        """
        shapes = [list(p.shape) for p in self._parameters]
        if len(states) != len(shapes):
            raise ValueError(f"Expected {len(shapes)} states, got {len(states)}")
        found = [state.get("shape") for state in states]  # None: an older version wrote it
        if any(f not in (None, shape) for f, shape in zip(found, shapes, strict=True)):
            raise ValueError(f"Expected states of parameters of shapes {shapes}, got {found}")
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


def _steps_only(optimizer: Optimizer, parameter: torch.Tensor) -> bool:
    """Whether this is the one parameter of an optimizer."""
    groups = optimizer.param_groups
    return len(groups) == 1 and [id(p) for p in groups[0]["params"]] == [id(parameter)]


def _refuse_accumulation(
    parameter: torch.nn.Parameter, kept: Optimizer
) -> Callable[[torch.Tensor], None]:
    """A hook that also keeps the optimizer, as long as there is a parameter: the garbage collector
    does not see what hooks of the other kind hold.
    """

    def hook(_: torch.Tensor, kept: Optimizer = kept) -> None:
        if parameter.grad is not None:
            raise RuntimeError(
                "Expected a parameter without a gradient, got one that holds one: each backward "
                "is a step, so gradients do not accumulate. Set parameter.grad = None"
            )

    return hook


def _step(reference: weakref.ref[Optimizer]) -> Callable[[torch.Tensor], None]:
    def hook(parameter: torch.Tensor) -> None:
        optimizer = reference()
        assert optimizer is not None
        if not _steps_only(optimizer, parameter):
            raise RuntimeError(
                "Expected an optimizer of one parameter, got a group added to it: make another "
                "StepInBackward for the new parameters"
            )
        if parameter.grad is not None and _adam.counted(parameter):
            raise RuntimeError(
                "Expected the gradient of a weight from its layer alone, got more from elsewhere "
                "after the kernel's step: make its optimizer with fused=False"
            )
        try:
            optimizer.step()
        finally:  # even where there was no memory: the next backward is another step
            parameter.grad = None

    return hook
