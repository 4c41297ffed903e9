"""Training in little memory: step each parameter as soon as its gradient is there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer


class StepInBackward:
    """Any torch.optim optimizer, stepped during backward: no full set of gradients is ever alive.

    A parameter's gradient is used and freed before backward goes on to earlier layers, so a model
    needs memory for the gradients of one layer at a time. `backward()` then is the whole step:
    there is no `zero_grad` and no `step`. What needs all gradients at once does not work with it:
    clipping by the global norm, accumulating gradients over several backward calls, gradient
    scaling that may skip a step.

        trainer = StepInBackward(model.parameters(), lambda p: torch.optim.Adam(p, lr=1e-3))
        loss(model(x)).backward()

    Args:
        parameters: those to train; ones that need no gradient are passed over.
        make: called with [parameter] for each, returns its optimizer.

    Raises:
        ValueError: no parameter needs a gradient, or one already holds one.
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
        self.optimizers = [make([p]) for p in chosen]
        self._handles = [
            p.register_post_accumulate_grad_hook(_step(optimizer))
            for p, optimizer in zip(chosen, self.optimizers, strict=True)
        ]

    def remove(self) -> None:
        """Give the parameters back: later backward calls leave gradients as usual."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> list[dict[str, Any]]:
        """Of each optimizer, in the order of the parameters."""
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """What `state_dict` returned for the same parameters; else ValueError."""
        if len(states) != len(self.optimizers):
            raise ValueError(f"Expected {len(self.optimizers)} states, got {len(states)}")
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


def _step(optimizer: Optimizer) -> Callable[[torch.Tensor], None]:
    def hook(parameter: torch.Tensor) -> None:
        optimizer.step()
        parameter.grad = None

    return hook
