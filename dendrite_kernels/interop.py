"""To and from the masked-dense form: two nn.Linear layers under boolean masks."""

from __future__ import annotations

import copy

import torch
from torch import nn

from .nn import DendriticLayer, SparseLinear
from .reference import activation_function, cable_matrix, dense_weight
from .topology import Connectivity

Maybe = torch.Tensor | None


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


class _PaddedRows(nn.Module):
    """Rows of unequal length as a rectangle: index [rows, width], weight 0 where a row is short.

    A pad points past the end of the input, where forward appends a zero.
    """

    index: torch.Tensor

    def __init__(
        self, pointer: torch.Tensor, columns: torch.Tensor, weight: torch.Tensor, inputs: int
    ) -> None:
        super().__init__()
        counts = pointer.long().diff()  # [rows]
        rows, width = counts.numel(), max(1, int(counts.max()))
        taken = torch.arange(width) < counts[:, None]  # [rows, width]
        index = torch.full((rows, width), inputs)
        index[taken] = columns.long()
        padded = weight.new_zeros((rows, width))
        padded[taken.to(weight.device)] = weight.detach()
        self.padded = not bool(taken.all())
        self.register_buffer("index", index.flatten().to(weight.device))
        self.weight = nn.Parameter(padded)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [..., inputs] -> [..., rows]
        if self.padded:
            x = nn.functional.pad(x, (0, 1))
        gathered = x.index_select(-1, self.index).unflatten(-1, self.weight.shape)
        return (gathered * self.weight).sum(-1)


class _PortableSparseLinear(nn.Module):
    def __init__(self, connectivity: Connectivity, weight: torch.Tensor, bias: Maybe) -> None:
        super().__init__()
        c = connectivity
        self.rows = _PaddedRows(c.crow_indices, c.col_indices, weight, c.in_features)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        u: torch.Tensor = self.rows(x)
        return u if self.bias is None else u + self.bias


class _PortableDendriticLayer(nn.Module):
    def __init__(self, layer: DendriticLayer) -> None:
        super().__init__()
        c = layer.connectivity
        self.synapses = _PortableSparseLinear(c, layer.synapse_weight, layer.dendrite_bias)
        dendrites = torch.arange(c.num_dendrites)
        self.cable = _PaddedRows(c.soma_ptr, dendrites, layer.cable_weight, c.num_dendrites)
        self.bias = None if layer.soma_bias is None else nn.Parameter(layer.soma_bias.clone())
        self.activation, self.negative_slope = layer.activation, layer.negative_slope

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        phi = activation_function(self.activation, self.negative_slope)
        v = self.cable(phi(self.synapses(x)))
        return phi(v if self.bias is None else v + self.bias)


def portable(model: nn.Module) -> nn.Module:
    """A copy of a model for runtimes without this package: ONNX, AOTInductor from C++, ...

    Every DendriticLayer and SparseLinear becomes a gather, a product and a sum. That needs
    B * R * (synapses of the largest dendrite) numbers in memory: for inference, not for training.

    Example:
        torch.onnx.export(portable(model), (x,), "model.onnx", dynamic_shapes=...)
    """
    if isinstance(model, DendriticLayer):
        return _PortableDendriticLayer(model).train(model.training)
    if isinstance(model, SparseLinear):
        plain = _PortableSparseLinear(model.connectivity, model.weight, model.bias)
        return plain.train(model.training)
    model = copy.copy(model)  # shallow: what is replaced below belongs to the copy alone
    model._modules = {
        name: None if child is None else portable(child) for name, child in model._modules.items()
    }
    return model
