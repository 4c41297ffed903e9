"""To and from other formats: masked dense layers, pruned ones, scipy, Keras, plain torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ._convert import Conversion, convert
from ._keras import read_dense
from ._masked import as_mask, from_masked_dense, linear, sparse_linear, to_masked_dense
from ._modules import value
from ._portable import portable
from ._pruned import from_pruned, from_pruned_pair
from ._validate import Duplicates
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


def from_scipy(matrix: Any, bias: Any = None, *, duplicates: Duplicates = "refuse") -> SparseLinear:
    """The SparseLinear x -> matrix @ x + bias of a scipy.sparse matrix [R, N].

    Every stored entry becomes a synapse, a stored zero too (but scipy drops those of DIA matrices);
    indices may be unsorted.

    Args:
        matrix: of dtype float32 or float64 (any format).
        bias: [R] or None, rounded to the dtype of the matrix.
        duplicates: an entry that is stored twice is refused; "sum" adds the values.

    Raises:
        TypeError, ValueError: as Connectivity.from_scipy; another dtype; a bias of another shape.
    """
    connectivity = Connectivity.from_scipy(matrix, duplicates=duplicates)
    if matrix.dtype not in (np.float32, np.float64):
        raise TypeError(f"Expected a matrix of dtype float32 or float64, got {matrix.dtype}")
    csr = matrix.tocsr().copy()
    csr.sum_duplicates()  # and sorts: the order of the connectivity
    weight = torch.from_numpy(csr.data)
    return sparse_linear(
        connectivity, weight, None if bias is None else torch.as_tensor(bias, dtype=weight.dtype)
    )


def to_scipy(layer: SparseLinear | DendriticLayer) -> Any:
    """The synapses of a layer as a scipy.sparse.csr_array [R, N] with their weights.

    Raises:
        ImportError: scipy is missing.
    """
    return layer.connectivity.to_scipy(value(layer, layer.WEIGHT))


def from_keras(
    path: str | os.PathLike[str],
    masks: Sequence[Any] | None = None,
    *,
    negative_slope: float = 0.1,
) -> nn.Sequential:
    """A dendritic network trained in Keras, from its file (HDF5 or .keras), read with h5py.

    The file must hold dense layers in the order of the paper's models: pairs of dendrites and
    somas, then an output layer. Where it describes the model (.keras, whole models in HDF5), there
    may also be Flatten, Dropout, a softmax at the end, which is left out, and must be the leaky
    ReLU. Files of weights only tell no activations: it is up to you that the model has these.

    Args:
        path: a whole model or weights only.
        masks: of the kernels [inputs, outputs] in their order, bool or 0 and 1, None where a kernel
            is dense; default: a synapse is where a kernel is not zero.
        negative_slope: of the leaky ReLU after dendrites and somas; 0 for ReLU.

    Returns:
        For each pair a DendriticLayer where every dendrite feeds one soma, else sparse or dense
        linear layers with their activations; then the output layer, giving logits.

    Raises:
        ImportError: h5py is missing.
        ValueError: not such a file, other layers or activations, an even number of dense layers,
            masks that do not fit.
    """
    dense = read_dense(path, negative_slope)
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
        taken = as_mask(f"mask of {name}", torch.as_tensor(mask), weight.t()).t()
    return linear(weight * taken, None if bias is None else torch.from_numpy(bias)), taken
