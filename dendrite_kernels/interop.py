"""To and from the masked-dense form: two nn.Linear layers under boolean masks."""

from __future__ import annotations

import torch
from torch import nn

from .nn import DendriticLayer
from .reference import cable_matrix, dense_weight
from .topology import Connectivity


def _check_mask(name: str, mask: torch.Tensor, linear: nn.Linear) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"Expected {name} of dtype bool, got {mask.dtype}")
    if mask.shape != linear.weight.shape:
        raise ValueError(
            f"Expected {name} of its weight's shape {list(linear.weight.shape)},"
            f" got {list(mask.shape)}"
        )


def _paired(name: str, dendrite: nn.Linear, soma: nn.Linear) -> bool:
    """Whether the layers have biases: both or neither."""
    has = dendrite.bias is not None, soma.bias is not None
    if has[0] != has[1]:
        raise ValueError(f"Expected both layers or neither to have a {name}, got {has}")
    return has[0]


@torch.no_grad()
def from_masked_dense(
    dendrite: nn.Linear, dendrite_mask: torch.Tensor, soma: nn.Linear, soma_mask: torch.Tensor
) -> DendriticLayer:
    """The DendriticLayer (leaky ReLU 0.1) that computes what the two masked layers do.

    Args:
        dendrite: N -> R, with dendrite_mask bool [R, N]; weights outside the mask are dropped.
        soma: R -> S, with soma_mask bool [S, R]: one True in each column. Dendrites are reordered
            by soma, stably, where they are not contiguous.

    Raises:
        TypeError, ValueError: masks that do not fit, a dendrite that feeds no soma or several.
    """
    _check_mask("dendrite_mask", dendrite_mask, dendrite)
    _check_mask("soma_mask", soma_mask, soma)
    if soma.in_features != dendrite.out_features:
        raise ValueError(
            f"Expected soma with {dendrite.out_features} inputs, got {soma.in_features}"
        )
    feeds = soma_mask.sum(0)
    if not bool((feeds == 1).all()):
        r = int((feeds != 1).nonzero()[0])
        raise ValueError(
            f"Expected every dendrite to feed one soma, got {int(feeds[r])} for dendrite {r}"
        )
    owner = soma_mask.to(torch.uint8).argmax(0)  # [R]
    order = owner.argsort(stable=True)
    mask = dendrite_mask[order]
    ends = torch.bincount(owner, minlength=soma.out_features).cumsum(0)
    soma_ptr = torch.cat([ends.new_zeros(1), ends])
    weight = dendrite.weight
    layer = DendriticLayer(
        Connectivity.from_mask(mask.cpu(), soma_ptr=soma_ptr.cpu()),
        bias=_paired("bias", dendrite, soma),
        device=weight.device,
        dtype=weight.dtype,
    )
    values = {
        "synapse_weight": weight[order][mask],
        "cable_weight": soma.weight[owner, torch.arange(owner.numel(), device=owner.device)][order],
        "dendrite_bias": None if dendrite.bias is None else dendrite.bias[order],
        "soma_bias": soma.bias,
    }
    for name, value in values.items():
        if value is not None:
            getattr(layer, name).copy_(value)
    return layer


@torch.no_grad()
def to_masked_dense(
    layer: DendriticLayer,
) -> tuple[nn.Linear, torch.Tensor, nn.Linear, torch.Tensor]:
    """The masked-dense twin of a layer: (dendrite, dendrite_mask, soma, soma_mask).

    dendrite: N -> R with bool mask [R, N]; soma: R -> S with bool mask [S, R]; weights are zero
    outside the masks. The activation between and after them is not part of the result.
    """
    if not isinstance(layer, DendriticLayer):
        raise TypeError(f"Expected a DendriticLayer, got {type(layer).__name__}")
    c = layer.connectivity
    bias = layer.dendrite_bias is not None
    options = {"device": layer.synapse_weight.device, "dtype": layer.synapse_weight.dtype}
    dendrite = nn.Linear(c.in_features, c.num_dendrites, bias=bias, **options)
    soma = nn.Linear(c.num_dendrites, c.num_somas, bias=bias, **options)
    dendrite.weight.copy_(dense_weight(layer.synapse_weight, c))
    soma.weight.copy_(cable_matrix(layer.cable_weight, c))
    if bias:
        dendrite.bias.copy_(layer.dendrite_bias)  # type: ignore[arg-type]
        soma.bias.copy_(layer.soma_bias)  # type: ignore[arg-type]
    dendrite_mask = c.to_mask().to(dendrite.weight.device)
    soma_mask = cable_matrix(torch.ones_like(layer.cable_weight), c) != 0
    return dendrite, dendrite_mask, soma, soma_mask
