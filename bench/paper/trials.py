"""Several networks of one architecture as one network: the trials of a run, trained together.

Each has its own inputs, batches and weights; none sees another. Small networks take most of a
step in Python and Adam, which are then paid once.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import dendrite_kernels as dk
from dendrite_kernels.benchmark.masked_dense import masked_layers


class Heads(nn.Module):
    """T linear layers side by side: [B, T * in] -> [B, T * out]."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([layer.weight.detach().T for layer in layers]))
        self.bias = nn.Parameter(torch.stack([layer.bias.detach()[None] for layer in layers]))

    def forward(self, x: Tensor) -> Tensor:
        own = x.unflatten(1, (len(self.weight), -1)).transpose(0, 1)  # [T, B, in]
        return torch.baddbmm(self.bias, own, self.weight).transpose(0, 1).flatten(1)


def join(models: Sequence[nn.Sequential]) -> nn.Sequential:
    """One network that computes what `models` compute, [B, T * N] -> [B, T * C].

    It has copies of their parameters; of one model, it is that model.

    Raises:
        TypeError: a model has modules that cannot be joined: dropout, masked-dense layers.
    """
    if len(models) == 1:
        return models[0]
    return nn.Sequential(*(_join(modules) for modules in zip(*models, strict=True)))


def _join(modules: tuple[nn.Module, ...]) -> nn.Module:
    first = modules[0]
    if isinstance(first, nn.Linear):
        return Heads(modules)  # type: ignore[arg-type]
    if isinstance(first, dk.DendriticLayer | dk.SparseLinear):
        network = dk.Connectivity.block_diagonal([m.connectivity for m in modules])  # type: ignore[misc]
        joined = type(first)(network, negative_slope=first.negative_slope)
        with torch.no_grad():
            for name, parameter in joined.named_parameters():
                parameter.copy_(torch.cat([getattr(m, name) for m in modules]))
        return joined
    if isinstance(first, nn.LeakyReLU):
        return copy.deepcopy(first)
    raise TypeError(f"Expected layers that can be trained as one, got {type(first).__name__}")


@torch.no_grad()
def part(joined: nn.Sequential, models: Sequence[nn.Sequential]) -> None:
    """Write the parameters of the joined network into the models, which `join` was given."""
    if len(models) == 1:
        return
    for whole, *modules in zip(joined, *models, strict=True):
        if isinstance(whole, Heads):
            for weight, bias, module in zip(whole.weight, whole.bias, modules, strict=True):
                module.weight.copy_(weight.T)
                module.bias.copy_(bias[0])
            continue
        for name, parameter in whole.named_parameters():
            own = [getattr(module, name) for module in modules]
            for values, target in zip(parameter.split([len(p) for p in own]), own, strict=True):
                target.copy_(values)


def can_join(model: nn.Sequential) -> bool:
    """Whether `join` takes several of these; dropout would draw other masks than alone."""
    dropout = any(isinstance(module, nn.Dropout) for module in model)
    return not dropout and not masked_layers(model)
