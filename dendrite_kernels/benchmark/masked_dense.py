"""The official way to train a dANN: dense matrices under 0/1 masks, masked gradients.

Speed, memory and accuracy are compared with this layer. Written from the description in the paper
(Chavlis & Poirazi 2025, Methods), not from its code.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dendrite_kernels as dk


class MaskedDendriticLayer(nn.Module):
    """Dense [R, N] under a mask -> LeakyReLU -> dense [S, R] under a mask -> LeakyReLU.

    Biases are not masked. Weights outside the masks are set to 0 here and stay 0 if
    `mask_gradients` is called between backward and the optimizer's step, so forward needs no mask.
    By default masks have the dtype of the weights: other dtypes must be converted when a gradient
    is multiplied by them (bool takes three times as long). Those of the official code are int64.
    """

    dendrite_mask: Tensor
    soma_mask: Tensor

    def __init__(
        self,
        dendrite: nn.Linear,
        dendrite_mask: Tensor,
        soma: nn.Linear,
        soma_mask: Tensor,
        negative_slope: float = 0.1,
        mask_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dendrite, self.soma, self.negative_slope = dendrite, soma, negative_slope
        stages = (("dendrite_mask", dendrite, dendrite_mask), ("soma_mask", soma, soma_mask))
        for name, linear, mask in stages:  # masks [R, N], [S, R]
            shape = linear.weight.shape
            if mask.shape != shape:
                raise ValueError(f"Expected {name} {list(shape)}, got {list(mask.shape)}")
            self.register_buffer(name, mask.to(mask_dtype or linear.weight.dtype))
            with torch.no_grad():
                linear.weight.mul_(mask)

    @classmethod
    def from_layer(
        cls, layer: dk.DendriticLayer, mask_dtype: torch.dtype | None = None
    ) -> MaskedDendriticLayer:
        """The dense twin of a sparse layer, with the same masks and weights."""
        dendrite, dendrite_mask, soma, soma_mask = dk.interop.to_masked_dense(layer)
        return cls(dendrite, dendrite_mask, soma, soma_mask, layer.negative_slope, mask_dtype)

    def forward(self, x: Tensor) -> Tensor:
        a = F.leaky_relu(self.dendrite(x), self.negative_slope)  # [..., R]
        return F.leaky_relu(self.soma(a), self.negative_slope)  # [..., S]

    def mask_gradients(self) -> None:
        """Keep weights outside the masks at exactly 0: call before the optimizer step."""
        for linear, mask in ((self.dendrite, self.dendrite_mask), (self.soma, self.soma_mask)):
            if linear.weight.grad is not None:
                linear.weight.grad.mul_(mask)


def masked_dense_twin(model: nn.Module) -> nn.Sequential:
    """The masked-dense copy of a dANN from `dk.models.build`: same masks and weights.

    Raises TypeError for a model with children other than dendritic layers, dense layers and modules
    without parameters.
    """
    return nn.Sequential(*(_twin_of(child) for child in model.children()))


def _twin_of(module: nn.Module) -> nn.Module:
    if isinstance(module, dk.DendriticLayer):
        return MaskedDendriticLayer.from_layer(module)
    if isinstance(module, nn.Linear) or next(module.parameters(), None) is None:
        return copy.deepcopy(module)
    expected = "dendritic layers, nn.Linear and modules without parameters"
    raise TypeError(f"Expected {expected}, got {type(module).__name__}")


def masked_layers(model: nn.Module) -> list[MaskedDendriticLayer]:
    return [module for module in model.modules() if isinstance(module, MaskedDendriticLayer)]


def dense_parameters(model: nn.Module) -> int:
    """How many numbers the model stores and its optimizer updates."""
    return sum(parameter.numel() for parameter in model.parameters())


def trainable_parameters(model: nn.Module) -> int:
    """How many numbers training can change: all except those that a mask keeps at 0."""
    masks = [
        mask for layer in masked_layers(model) for mask in (layer.dendrite_mask, layer.soma_mask)
    ]
    return dense_parameters(model) - sum(
        mask.numel() - int(mask.sum(dtype=torch.float64)) for mask in masks
    )
