"""To and from two nn.Linear layers under masks."""

from __future__ import annotations

import torch
from torch import nn

from ._modules import Maybe, computes_as, hooked, ordinary, value
from .activations import ActivationName
from .nn import DendriticLayer, SparseLinear
from .reference import owners
from .structure import Connectivity


def as_mask(name: str, mask: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The mask [out, in] of a weight as bool, on the weight's device.

    Raises:
        TypeError, ValueError: not a dense tensor of the weight's shape with values 0 and 1.
    """
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"Expected {name} to be a torch.Tensor, got {type(mask).__name__}")
    ordinary(name, mask)
    if mask.shape != weight.shape:
        transposed = list(mask.shape) == list(weight.shape[::-1])
        hint = f": give {name}.T, for Keras has [in, out] where torch has [out, in]"
        raise ValueError(
            f"Expected {name} of its weight's shape {list(weight.shape)},"
            f" got {list(mask.shape)}{hint if transposed else ''}"
        )
    others = mask[(mask != 0) & (mask != 1)]
    if others.numel():
        raise ValueError(f"Expected {name} of values 0 and 1, got {others[0].item()}")
    return mask.to(weight.device) != 0


def _paired(dendrite: nn.Linear, soma: nn.Linear) -> bool:
    """Whether the layers have biases: both or neither."""
    has = dendrite.bias is not None, soma.bias is not None
    if has[0] != has[1]:
        raise ValueError(f"Expected both layers or neither to have a bias, got {has}")
    return has[0]


def _parameters(name: str, linear: nn.Linear, like: Maybe = None) -> tuple[torch.Tensor, Maybe]:
    """Weight and bias; TypeError or ValueError if dtype or device is not that of `like`.

    Or if the layer computes something else: by a hook, or a forward of its own.
    """
    weight, bias = value(linear, "weight"), value(linear, "bias")
    assert weight is not None
    if not computes_as(linear, nn.Linear) or hooked(linear):
        kind = type(linear).__name__
        raise ValueError(f"Expected {name} without hooks and forward of its own, got {kind}")
    like = weight if like is None else like
    for tensor in (weight, bias):
        if tensor is not None and tensor.dtype != like.dtype:
            raise TypeError(f"Expected {name} of dtype {like.dtype}, got {tensor.dtype}")
        if tensor is not None and tensor.device != like.device:
            raise ValueError(f"Expected {name} on {like.device}, got {tensor.device}")
    return weight, bias


@torch.no_grad()
def from_masked_dense(
    dendrite: nn.Linear,
    dendrite_mask: torch.Tensor,
    soma: nn.Linear,
    soma_mask: torch.Tensor,
    *,
    activation: ActivationName = "leaky_relu",
    negative_slope: float = 0.1,
) -> DendriticLayer:
    """The DendriticLayer that computes what the two masked layers do.

    Masks have the shape of their weights, [outputs, inputs] as in torch, not [inputs, outputs] as
    in Keras. They are bool, or hold 0 and 1 in another dtype.

    Args:
        dendrite: N -> R, with dendrite_mask [R, N]; weights outside the mask are dropped.
        soma: R -> S, with soma_mask [S, R]: one 1 in each column. Dendrites are reordered by
            soma, stably, where they are not contiguous.
        activation, negative_slope: what follows both layers, see functional.dendritic_layer.

    A frozen parameter stays frozen.

    Raises:
        TypeError, ValueError: masks that do not fit, a dendrite that feeds no soma or several,
            parameters of several dtypes or devices, a layer with hooks or a forward of its own.
    """
    weight, bias = _parameters("dendrite", dendrite)
    cable, soma_bias = _parameters("soma", soma, like=weight)
    dendrite_mask = as_mask("dendrite_mask", dendrite_mask, weight)
    soma_mask = as_mask("soma_mask", soma_mask, cable)
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
    layer = DendriticLayer(
        Connectivity.from_mask(mask.cpu(), soma_ptr=soma_ptr.cpu()),
        bias=_paired(dendrite, soma),
        activation=activation,
        negative_slope=negative_slope,
        device=weight.device,
        dtype=weight.dtype,
    )
    cables = cable[owner, torch.arange(owner.numel(), device=owner.device)]
    values = {
        "synapse_weight": (weight[order][mask], weight),
        "cable_weight": (cables[order], cable),
    }
    if bias is not None and soma_bias is not None:
        values["dendrite_bias"] = bias[order], bias
        values["soma_bias"] = soma_bias, soma_bias
    for name, (drawn, source) in values.items():
        layer.get_parameter(name).copy_(drawn).requires_grad_(source.requires_grad)
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
    weight, bias, cable, soma_bias = (value(layer, name) for name in layer.PARAMETERS)
    assert weight is not None
    assert cable is not None
    options = {"device": weight.device, "dtype": weight.dtype}
    dendrite = nn.Linear(c.in_features, c.num_dendrites, bias=bias is not None, **options)
    soma = nn.Linear(c.num_dendrites, c.num_somas, bias=soma_bias is not None, **options)
    # Row by row, the True places of a mask are in the order of the weights.
    dendrite_mask = c.to_mask().to(weight.device)
    dendrite.weight.zero_()[dendrite_mask] = weight
    owner = owners(c.soma_ptr, weight.device)
    soma_mask = owner == torch.arange(c.num_somas, device=owner.device)[:, None]
    soma.weight.zero_()[soma_mask] = cable
    for linear, its_bias in ((dendrite, bias), (soma, soma_bias)):
        if its_bias is not None:
            linear.bias.copy_(its_bias)
    return dendrite, dendrite_mask, soma, soma_mask


@torch.no_grad()
def linear(weight: torch.Tensor, bias: Maybe) -> nn.Linear:
    """The nn.Linear of a weight [out, in] and a bias, copied."""
    rows, inputs = weight.shape
    plain = nn.Linear(inputs, rows, bias is not None, device=weight.device, dtype=weight.dtype)
    plain.weight.copy_(weight)
    if bias is not None:
        plain.bias.copy_(bias)
    return plain


@torch.no_grad()
def sparse_linear(c: Connectivity, weight: torch.Tensor, bias: Maybe) -> SparseLinear:
    """The SparseLinear of a weight [nnz] and a bias, copied."""
    layer = SparseLinear(c, bias=bias is not None, device=weight.device, dtype=weight.dtype)
    layer.weight.copy_(weight)
    if layer.bias is not None and bias is not None:
        if bias.shape != layer.bias.shape:
            raise ValueError(
                f"Expected a bias of shape {list(layer.bias.shape)}, got {list(bias.shape)}"
            )
        layer.bias.copy_(bias)
    return layer
