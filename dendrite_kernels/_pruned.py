"""From layers under torch.nn.utils.prune, which keep every weight and a mask."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import nn
from torch.nn.utils import parametrize

from ._masked import Maybe, from_masked_dense, linear, sparse_linear
from .activations import ActivationName
from .nn import DendriticLayer, SparseLinear
from .structure import Connectivity


def _value(module: nn.Module, name: str) -> Maybe:
    """A parameter as the next forward would see it; it says whether training changes it.

    Where torch.nn.utils.prune is at work, the attribute itself lags behind.
    """
    original: Maybe = getattr(module, f"{name}_orig", None)
    if original is None:
        whole: Maybe = getattr(module, name, None)
        return whole
    value: torch.Tensor = original.detach() * getattr(module, f"{name}_mask")
    return value.requires_grad_(original.requires_grad)


def _mask(module: nn.Module, name: str, weight: torch.Tensor) -> torch.Tensor:
    """Of a weight: bool, all True where it is not pruned."""
    mask = getattr(module, f"{name}_mask", None)
    return torch.ones_like(weight, dtype=torch.bool) if mask is None else mask != 0


def unpruned(module: nn.Module) -> tuple[nn.Linear, torch.Tensor]:
    """A module's weight [out, in] and bias as an nn.Linear, and the bool mask that prunes it."""
    weight, bias = _value(module, "weight"), _value(module, "bias")
    assert weight is not None
    plain = linear(weight, bias)
    _train_alike(plain, weight, bias)
    return plain, _mask(module, "weight", weight)


def _train_alike(layer: nn.Linear | SparseLinear, weight: torch.Tensor, bias: Maybe) -> None:
    layer.weight.requires_grad_(weight.requires_grad)
    if layer.bias is not None and bias is not None:
        layer.bias.requires_grad_(bias.requires_grad)


def _smaller(layer: DendriticLayer | SparseLinear) -> DendriticLayer | SparseLinear:
    if parametrize.is_parametrized(layer):
        raise ValueError(f"Expected a layer without parametrizations, got {type(layer).__name__}")
    values = {name: _value(layer, name) for name in layer.PARAMETERS}
    present = {name: value for name, value in values.items() if value is not None}
    return layer._without(_mask(layer, layer.WEIGHT, present[layer.WEIGHT]), present)


@overload
def from_pruned(module: DendriticLayer) -> DendriticLayer: ...
@overload
def from_pruned(module: nn.Linear | SparseLinear) -> SparseLinear: ...
def from_pruned(module: Any) -> Any:
    """What computes the same as a layer pruned by torch.nn.utils.prune, on the synapses left.

    An nn.Linear becomes a SparseLinear; one that is not pruned gives all-to-all synapses. A
    SparseLinear or DendriticLayer whose synapses are pruned becomes one with fewer; its other
    parameters keep their length, with zeros where they are pruned. Values are copied.
    """
    if isinstance(module, (DendriticLayer, SparseLinear)):
        return _smaller(module)
    return masked_linear(*unpruned(_linear(module))).train(module.training)


def _linear(module: nn.Module) -> nn.Linear:
    if not isinstance(module, nn.Linear):
        raise TypeError(f"Expected an nn.Linear, got {type(module).__name__}")
    return module


def masked_linear(plain: nn.Linear, mask: torch.Tensor) -> SparseLinear:
    """The SparseLinear of an nn.Linear under a bool mask."""
    weight = plain.weight.detach()[mask]
    layer = sparse_linear(Connectivity.from_mask(mask.cpu()), weight, plain.bias)
    _train_alike(layer, plain.weight, plain.bias)
    return layer


def from_pruned_pair(
    dendrite: nn.Linear,
    soma: nn.Linear,
    *,
    activation: ActivationName = "leaky_relu",
    negative_slope: float = 0.1,
) -> DendriticLayer:
    """from_masked_dense of two layers pruned by torch.nn.utils.prune, with their own masks."""
    first, first_mask = unpruned(_linear(dendrite))
    second, second_mask = unpruned(_linear(soma))
    options: Any = {"activation": activation, "negative_slope": negative_slope}
    return from_masked_dense(first, first_mask, second, second_mask, **options)
