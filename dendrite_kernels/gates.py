"""Context gates: which neurons answer in which context."""

from __future__ import annotations

import torch
from torch import nn

from . import functional, operators
from .functional import Reduce
from .nn import _Sparse, _uniform
from .structure import Connectivity

_CONTEXT_DENSITY = 0.1  # of a context in Iyer et al. (2022): what part of it is not 0


class ContextGate(_Sparse):
    """Segments that see a context open or close the neuron that they belong to.

        d[r] = sum_k weight[r, k] ctx[col[r, k]] + bias[r]        segments, in blocks of a neuron
        gate[s] = sigmoid(d[r*]),   r* = the segment of soma s with the largest |d|

    The gradient goes to the winning segment alone. Give the gate to a DendriticLayer, whose
    dendrites it gates, or multiply the outputs of any layer by it.

    Parameters:
        weight [nnz], bias [R].

    Args:
        connectivity: Nc numbers of a context, R segments, S gated neurons.
        reduce: "absmax", as above; "max"; or "sum" of all segments. See functional.soma_reduce.
        bias: whether segments have one.
        device, dtype: of the parameters.

    Weights start uniform within 1 / sqrt(0.1 fan_in) of 0, biases at 0: a context is taken to have
    a tenth of its numbers apart from 0. A neuron without segments has the gate 1/2.

    Shape: [..., Nc] -> [..., S].

    Raises:
        TypeError, ValueError: an argument or an input does not fit.

    Source: Iyer et al. (2022), Front. Neurorobot. 16:846219; docs/gates.md.
    """

    WEIGHT, BIAS = "weight", "bias"
    PARAMETERS = "weight", "bias"
    OPTIONS = ("reduce",)

    def __init__(
        self,
        connectivity: Connectivity,
        *,
        reduce: Reduce = "absmax",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(connectivity, "fan_in")
        functional.check_reduce("reduce", reduce)
        functional.check_dtype("parameters", dtype or torch.get_default_dtype())
        self.reduce = reduce
        rows = connectivity.num_dendrites
        self.weight = nn.Parameter(torch.empty(connectivity.nnz, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(rows, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew from torch's generator."""
        c = self.connectivity
        counts = operators.beside(self.weight, c.crow_indices).long().diff()
        bound = (_CONTEXT_DENSITY * counts.clamp(min=1)).rsqrt()
        _uniform(self.weight, bound.repeat_interleave(counts, output_size=c.nnz))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, ctx: torch.Tensor) -> torch.Tensor:
        """[..., Nc] -> [..., S], from 0 to 1."""
        d = functional.sparse_linear(ctx, self.weight, self.bias, self.connectivity)
        values, _ = functional.soma_reduce(d, self.connectivity, self.reduce)
        return values.sigmoid()

    def extra_repr(self) -> str:
        return f"{self.connectivity}, reduce={self.reduce}, bias={self.bias is not None}"
