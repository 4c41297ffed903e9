"""To and from other formats: masked dense layers, pruned ones, scipy, Keras, plain torch."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ._convert import Conversion, convert
from ._keras import read_dense
from ._masked import from_masked_dense, linear, sparse_linear, to_masked_dense
from ._pruned import from_pruned, from_pruned_pair
from .activations import function_of
from .nn import DendriticLayer, SparseLinear
from .structure import Connectivity

__all__ = [
    "Conversion",
    "convert",
    "from_keras",
    "from_masked_dense",
    "from_pruned",
    "from_pruned_pair",
    "from_scipy",
    "portable",
    "to_masked_dense",
    "to_scipy",
]

Maybe = torch.Tensor | None


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
    return sparse_linear(
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
            modules.append(
                from_masked_dense(dendrite, mask, soma, soma_mask, negative_slope=negative_slope)
            )
            continue
        for plain, its_mask in ((dendrite, mask), (soma, soma_mask)):
            c = None if its_mask.all() else Connectivity.from_mask(its_mask)
            modules.append(
                plain if c is None else sparse_linear(c, plain.weight[its_mask], plain.bias)
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
    return linear(weight * taken, None if bias is None else torch.from_numpy(bias)), taken


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
