"""One step of training, as in the paper: what benchmarks time and weigh."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .masked_dense import masked_layers

BETAS = (0.9, 0.999)
KERAS_EPS = 1e-7


class KerasAdam(torch.optim.Adam):
    """Adam as Keras computes it, which adds eps outside the bias correction.

    PyTorch's Adam does so given eps / sqrt(1 - beta2^t) at step t.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, lr=lr, betas=BETAS, fused=True)

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1  # in the group: a state dict keeps it
            group["eps"] = KERAS_EPS / math.sqrt(1 - BETAS[1] ** group["steps"])
        return super().step(closure)


class TrainingStep:
    """zero_grad, forward, loss, backward, gradient masks where the model has any, Adam."""

    def __init__(
        self, model: nn.Module, lr: float, loss: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> None:
        """loss: of logits and y, [] or one for each of several networks; None: cross-entropy."""
        self.model, self.loss = model, loss or F.cross_entropy
        self.optimizer = KerasAdam(model.parameters(), lr)
        self._masked = masked_layers(model)

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, N], y [B] -> mean loss [], logits [B, C] (both detached)."""
        self.optimizer.zero_grad()
        logits = self.model(x)
        loss = self.loss(logits, y)
        loss.sum().backward()
        for layer in self._masked:
            layer.mask_gradients()
        self.optimizer.step()
        return loss.detach(), logits.detach()
