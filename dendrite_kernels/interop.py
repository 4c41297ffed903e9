"""To and from other formats: masked dense layers, pruned ones, scipy, Keras, plain torch."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ._keras import read_dense
from .activations import function_of
from .nn import DendriticLayer, SparseLinear
from .reference import owners
from .structure import Connectivity

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
    # Row by row, the True places of a mask are in the order of the weights.
    dendrite_mask = c.to_mask().to(dendrite.weight.device)
    dendrite.weight.zero_()[dendrite_mask] = layer.synapse_weight
    owner = owners(c.soma_ptr, soma.weight.device)
    soma_mask = owner == torch.arange(c.num_somas, device=owner.device)[:, None]
    soma.weight.zero_()[soma_mask] = layer.cable_weight
    if bias:
        dendrite.bias.copy_(layer.dendrite_bias)  # type: ignore[arg-type]
        soma.bias.copy_(layer.soma_bias)  # type: ignore[arg-type]
    return dendrite, dendrite_mask, soma, soma_mask


def _unpruned(linear: nn.Linear) -> tuple[nn.Linear, torch.Tensor]:
    """The nn.Linear behind one of torch.nn.utils.prune, and its bool mask (all True if none)."""
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"Expected an nn.Linear, got {type(linear).__name__}")
    original = getattr(linear, "weight_orig", linear.weight).detach()
    mask = getattr(linear, "weight_mask", torch.ones_like(original)) != 0
    bias: Any = linear.bias
    if hasattr(linear, "bias_orig"):
        pruned: Any = linear
        bias = pruned.bias_orig * pruned.bias_mask
    return _linear(original * mask, None if bias is None else bias.detach()), mask


def _linear(weight: torch.Tensor, bias: Maybe) -> nn.Linear:
    rows, inputs = weight.shape
    plain = nn.Linear(inputs, rows, bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        plain.weight.copy_(weight)
        if bias is not None:
            plain.bias.copy_(bias)
    return plain


def from_pruned(linear: nn.Linear) -> SparseLinear:
    """The SparseLinear that computes what a layer pruned by torch.nn.utils.prune does.

    An nn.Linear that is not pruned gives all-to-all synapses. Weights are copied.
    """
    plain, mask = _unpruned(linear)
    return _sparse_linear(Connectivity.from_mask(mask.cpu()), plain.weight[mask], plain.bias)


def from_pruned_pair(dendrite: nn.Linear, soma: nn.Linear) -> DendriticLayer:
    """from_masked_dense of two layers pruned by torch.nn.utils.prune, with their own masks."""
    first, first_mask = _unpruned(dendrite)
    second, second_mask = _unpruned(soma)
    return from_masked_dense(first, first_mask, second, second_mask)


@torch.no_grad()
def _sparse_linear(c: Connectivity, weight: torch.Tensor, bias: Maybe) -> SparseLinear:
    layer = SparseLinear(c, bias=bias is not None, device=weight.device, dtype=weight.dtype)
    layer.weight.copy_(weight)
    if layer.bias is not None:
        layer.bias.copy_(bias)  # type: ignore[arg-type]
    return layer


def from_scipy(matrix: Any, bias: Any = None) -> SparseLinear:
    """The SparseLinear x -> matrix @ x + bias of a scipy.sparse matrix [R, N].

    Every stored entry becomes a synapse, a stored zero too; indices may be unsorted.

    Args:
        matrix: of dtype float32 or float64 (any format).
        bias: [R] or None.

    Raises:
        TypeError, ValueError: as Connectivity.from_scipy.
    """
    connectivity = Connectivity.from_scipy(matrix)
    csr = matrix.tocsr()
    if not csr.has_sorted_indices:
        csr = csr.sorted_indices()  # a copy, in the order of the connectivity
    weight = torch.from_numpy(csr.data.copy())
    return _sparse_linear(
        connectivity, weight, None if bias is None else torch.as_tensor(bias, dtype=weight.dtype)
    )


def to_scipy(layer: SparseLinear | DendriticLayer) -> Any:
    """The synapses of a layer as a scipy.sparse.csr_array [R, N] with their weights."""
    weight = layer.weight if isinstance(layer, SparseLinear) else layer.synapse_weight
    return layer.connectivity.to_scipy(weight)


def from_keras(
    path: str | os.PathLike[str],
    masks: Sequence[Any] | None = None,
    *,
    negative_slope: float = 0.1,
) -> nn.Sequential:
    """A dendritic network trained in Keras, from its file (HDF5 or .keras), read with h5py.

    The file must hold dense layers in the order of the paper's models: pairs of dendrites and
    somas, then an output layer.

    Args:
        path: a whole model or weights only.
        masks: of the kernels [inputs, outputs] in their order, None where a kernel is dense;
            default: a synapse is where a kernel is not zero.
        negative_slope: of the leaky ReLU after dendrites and somas.

    Returns:
        For each pair a DendriticLayer where every dendrite feeds one soma, else sparse or dense
        linear layers with their activations; then the output layer, giving logits.

    Raises:
        ImportError: h5py is missing.
        ValueError: not such a file, an even number of dense layers, masks that do not fit.
    """
    dense = read_dense(path)
    if len(dense) % 2 == 0:
        raise ValueError(f"Expected pairs of dense layers and an output layer, got {len(dense)}")
    given: list[Any] = [None if masks is None else False] * len(dense)
    for i, mask in enumerate(() if masks is None else masks):
        if i >= len(dense):
            raise ValueError(f"Expected at most {len(dense)} masks, got {len(masks or ())}")
        given[i] = False if mask is None else mask
    linears = [_from_kernel(*layer, mask) for layer, mask in zip(dense, given, strict=True)]
    modules: list[nn.Module] = []
    for i in range(0, len(linears) - 1, 2):
        (dendrite, mask), (soma, soma_mask) = linears[i : i + 2]
        if bool((soma_mask.sum(0) == 1).all()) and (dendrite.bias is None) == (soma.bias is None):
            layer = from_masked_dense(dendrite, mask, soma, soma_mask)
            layer.negative_slope = float(negative_slope)
            modules.append(layer)
            continue
        for linear, its_mask in ((dendrite, mask), (soma, soma_mask)):
            c = None if its_mask.all() else Connectivity.from_mask(its_mask)
            modules.append(
                linear if c is None else _sparse_linear(c, linear.weight[its_mask], linear.bias)
            )
            modules.append(nn.LeakyReLU(negative_slope))
    return nn.Sequential(*modules, linears[-1][0])


def _from_kernel(name: str, kernel: Any, bias: Any, mask: Any) -> tuple[nn.Linear, torch.Tensor]:
    """nn.Linear and bool mask [outputs, inputs]; mask None: where not zero; False: dense."""
    weight = torch.from_numpy(kernel).t()
    if mask is None:
        taken = weight != 0
    elif mask is False:
        taken = torch.ones_like(weight, dtype=torch.bool)
    else:
        taken = torch.as_tensor(mask).t() != 0
        if taken.shape != weight.shape:
            raise ValueError(
                f"Expected a mask {list(kernel.shape)} for {name}, got {list(taken.t().shape)}"
            )
    return _linear(weight * taken, None if bias is None else torch.from_numpy(bias)), taken


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
        taken = torch.arange(width, device="cpu") < counts[:, None]  # [rows, width]
        index = torch.full((rows, width), inputs, device="cpu")
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
        return torch.sum(gathered * self.weight, -1)


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
        dendrites = torch.arange(c.num_dendrites, device="cpu")
        self.cable = _PaddedRows(c.soma_ptr, dendrites, layer.cable_weight, c.num_dendrites)
        self.bias = None if layer.soma_bias is None else nn.Parameter(layer.soma_bias.clone())
        self.activation, self.negative_slope = layer.activation, layer.negative_slope
        self.soma_activation = layer.soma_activation or layer.activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        phi = function_of(self.activation, self.negative_slope)
        v = self.cable(phi(self.synapses(x)))
        psi = function_of(self.soma_activation, self.negative_slope)
        return psi(v if self.bias is None else v + self.bias)


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
