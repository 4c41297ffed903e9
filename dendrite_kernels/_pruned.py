"""From layers under torch.nn.utils.prune, which keep every weight and a mask."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import nn
from torch.nn.utils import parametrize

from ._masked import as_mask, from_masked_dense, linear, sparse_linear
from ._modules import Maybe, computes_as, hooked, value
from ._trial import check_linear
from .activations import ActivationName
from .nn import DendriticLayer, SparseLinear
from .structure import Connectivity


def _mask(module: nn.Module, name: str, weight: torch.Tensor) -> torch.Tensor:
    """Of a weight: bool, all True where it is not pruned."""
    mask = getattr(module, f"{name}_mask", None)
    return torch.ones_like(weight, dtype=torch.bool) if mask is None else mask != 0


def masked(module: nn.Module) -> bool:
    """Whether a module looks like a masked linear layer."""
    weight = getattr(module, "weight", None)
    is_matrix = isinstance(weight, torch.Tensor) and weight.dim() == 2
    return is_matrix and "mask" in dict(module.named_buffers(recurse=False))


@torch.no_grad()
def under_mask(module: nn.Module) -> tuple[nn.Linear, torch.Tensor]:
    """A module's weight [out, in] and bias as an nn.Linear, and the bool mask on it.

    Raises:
        TypeError, ValueError: it is not a linear layer under a mask.
    """
    names = (name.removesuffix("_orig") for name, _ in module.named_parameters())
    trained = {name for name in names if not name.startswith("parametrizations.")}
    if not trained <= {"weight", "bias"}:
        raise ValueError(f"Expected parameters weight and bias, got {sorted(trained)}")
    weight, bias = value(module, "weight"), value(module, "bias")
    assert weight is not None
    if bias is not None and bias.dtype != weight.dtype:
        raise TypeError(f"Expected a bias of dtype {weight.dtype} like weight, got {bias.dtype}")
    plain, mask = linear(weight, bias), _mask(module, "weight", weight)
    _train_alike(plain, weight, bias)
    if masked(module):
        mask = mask & as_mask("mask", module.get_buffer("mask"), weight)
    if not computes_as(module, nn.Linear):
        check_linear(module, plain, mask)
    elif weight[~mask].any():  # its forward reads no buffer `mask`
        raise ValueError(
            f"Expected weights of 0 where the mask is 0, got {type(module).__name__} with others, "
            "whose forward does not use the mask"
        )
    return plain, mask


def _train_alike(layer: nn.Linear | SparseLinear, weight: torch.Tensor, bias: Maybe) -> None:
    layer.weight.requires_grad_(weight.requires_grad)
    if layer.bias is not None and bias is not None:
        layer.bias.requires_grad_(bias.requires_grad)


def _smaller(layer: DendriticLayer | SparseLinear) -> DendriticLayer | SparseLinear:
    if parametrize.is_parametrized(layer):
        raise ValueError(f"Expected a layer without parametrizations, got {type(layer).__name__}")
    values = {name: value(layer, name) for name in layer.PARAMETERS}
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

    A class with a forward of its own, say a linear layer under a buffer `mask`, is tried: in both
    modes a copy of it must compute x @ (weight * mask).T + bias for zeros and for random inputs of
    scales 1 and 1,000, of shapes [1, in], [2, in], [2, 3, in] and [64, in]. That is no proof. Where
    the forward is nn.Linear's, which uses no buffer `mask`, weights outside the mask must be 0.

    Raises:
        TypeError, ValueError: not such a layer, a mask that does not fit, a failed trial, or hooks
            that are not of torch.nn.utils.prune.
    """
    if isinstance(module, (DendriticLayer, SparseLinear)):
        _refuse_hooks(module)
        return _smaller(module)
    return masked_linear(*under_mask(_linear(module))).train(module.training)


def _linear(module: nn.Module) -> nn.Module:
    if not isinstance(module, nn.Linear) and not masked(module):
        raise TypeError(f"Expected an nn.Linear, got {type(module).__name__}")
    _refuse_hooks(module)
    return module


def _refuse_hooks(module: nn.Module) -> None:
    if hooked(module):  # they may change what the layer computes, or its state
        raise ValueError(f"Expected a layer without hooks, got {type(module).__name__} with some")


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
    """from_masked_dense of two layers with their own masks, which from_pruned would take."""
    first, first_mask = under_mask(_linear(dendrite))
    second, second_mask = under_mask(_linear(soma))
    options: Any = {"activation": activation, "negative_slope": negative_slope}
    return from_masked_dense(first, first_mask, second, second_mask, **options)
