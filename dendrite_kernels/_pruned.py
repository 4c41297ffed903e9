"""From layers under torch.nn.utils.prune, which keep every weight and a mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ._masked import from_masked_dense, linear, sparse_linear
from .nn import DendriticLayer, SparseLinear
from .structure import Connectivity


def _unpruned(module: nn.Linear) -> tuple[nn.Linear, torch.Tensor]:
    """The nn.Linear behind one of torch.nn.utils.prune, and its bool mask (all True if none)."""
    if not isinstance(module, nn.Linear):
        raise TypeError(f"Expected an nn.Linear, got {type(module).__name__}")
    original = getattr(module, "weight_orig", module.weight).detach()
    mask = getattr(module, "weight_mask", torch.ones_like(original)) != 0
    bias: Any = module.bias
    if hasattr(module, "bias_orig"):
        pruned: Any = module
        bias = pruned.bias_orig * pruned.bias_mask
    return linear(original * mask, None if bias is None else bias.detach()), mask


def from_pruned(module: nn.Linear) -> SparseLinear:
    """The SparseLinear that computes what a layer pruned by torch.nn.utils.prune does.

    An nn.Linear that is not pruned gives all-to-all synapses. Weights are copied.
    """
    plain, mask = _unpruned(module)
    return sparse_linear(Connectivity.from_mask(mask.cpu()), plain.weight[mask], plain.bias)


def from_pruned_pair(
    dendrite: nn.Linear,
    soma: nn.Linear,
    *,
    activation: str = "leaky_relu",
    negative_slope: float = 0.1,
) -> DendriticLayer:
    """from_masked_dense of two layers pruned by torch.nn.utils.prune, with their own masks."""
    first, first_mask = _unpruned(dendrite)
    second, second_mask = _unpruned(soma)
    options: Any = {"activation": activation, "negative_slope": negative_slope}
    return from_masked_dense(first, first_mask, second, second_mask, **options)
