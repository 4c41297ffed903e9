"""One step of training, as in the paper: what benchmarks time and weigh."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .masked_dense import masked_layers

BETAS = (0.9, 0.999)
KERAS_EPS = 1e-7


class TrainingStep:
    """zero_grad, forward, loss, backward, gradient masks where the model has any, Adam.

    Keras adds eps outside the bias correction; PyTorch's Adam does so given
    eps / sqrt(1 - beta2^t) at step t.
    """

    def __init__(self, model: nn.Module, lr: float) -> None:
        self.model = model
        self.optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=BETAS, fused=True)
        self._masked = masked_layers(model)
        self._steps = 0

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, N], y [B] -> mean loss [], logits [B, C] (both detached)."""
        self._steps += 1
        self.optimizer.param_groups[0]["eps"] = KERAS_EPS / math.sqrt(1 - BETAS[1] ** self._steps)
        self.optimizer.zero_grad()
        logits = self.model(x)
        loss = F.cross_entropy(logits, y)
        loss.backward()
        for layer in self._masked:
            layer.mask_gradients()
        self.optimizer.step()
        return loss.detach(), logits.detach()
