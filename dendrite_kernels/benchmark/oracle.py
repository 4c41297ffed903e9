"""What is right: a layer and its gradients in float64, in memory for some of the somas.

The equations as they stand (docs/equations.md); tests hold this to `dk.reference` and autograd.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .._validate import Array

if TYPE_CHECKING:
    from .problem import Problem

PARAMETERS = ("synapse_weight", "dendrite_bias", "cable_weight", "soma_bias")
_CHUNK = 1 << 23  # numbers in the largest array of some somas
_SYNAPSES = 1 << 12  # whose inputs are gathered at a time


class _Csr(NamedTuple):
    """A sparse matrix [R, N]."""

    weight: Array  # [nnz]
    columns: Array  # [nnz]
    pointer: Array  # [R + 1]

    def rows(self) -> Array:
        return np.repeat(np.arange(len(self.pointer) - 1), np.diff(self.pointer))  # [nnz]

    def transposed(self, width: int) -> _Csr:
        """[width, R]."""
        order = np.argsort(self.columns, kind="stable")
        ends = np.cumsum(np.bincount(self.columns, minlength=width))
        return _Csr(self.weight[order], self.rows()[order], np.concatenate([[0], ends]))

    def __matmul__(self, x: Array) -> Array:
        """x [N, B] -> [R, B]."""
        product: Array = F.embedding_bag(
            torch.from_numpy(self.columns).long(),
            torch.from_numpy(x),
            torch.from_numpy(self.pointer).long(),
            mode="sum",
            per_sample_weights=torch.from_numpy(self.weight),
            include_last_offset=True,
        ).numpy()
        return product


class _Somas(NamedTuple):
    """Consecutive somas with the weights of their synapses [rows, N] and cables [somas, rows]."""

    somas: slice
    synapses: _Csr
    cables: _Csr
    dendrite_bias: Array  # [rows, 1]
    soma_bias: Array  # [somas, 1]


def oracle(problem: Problem, gradients: bool = False) -> dict[str, Tensor]:
    """float64 y and, on demand, the gradients of x and the parameters."""
    x, grad = (_float64(t).T.copy() for t in (problem.x, problem.grad))  # [N, B], [S, B]
    slope = problem.negative_slope
    y, dx = np.empty_like(grad), np.zeros_like(x) if gradients else None
    found: dict[str, list[Array]] = {name: [] for name in PARAMETERS}
    for part in _parts(problem):
        u = part.synapses @ x + part.dendrite_bias  # [rows, B]
        a = np.where(u > 0, u, slope * u)
        v = part.cables @ a + part.soma_bias  # [somas, B]
        y[part.somas] = np.where(v > 0, v, slope * v)
        if dx is None:
            continue
        at_v = grad[part.somas] * np.where(v > 0, 1, slope)
        at_u = (part.cables.transposed(len(u)) @ at_v) * np.where(u > 0, 1, slope)
        dx += part.synapses.transposed(len(x)) @ at_u
        found["synapse_weight"].append(_along(part.synapses, at_u, x))
        found["cable_weight"].append(_along(part.cables, at_v, a))
        found["dendrite_bias"].append(at_u.sum(1))
        found["soma_bias"].append(at_v.sum(1))
    results = {"y": y.T}
    if dx is not None:
        results |= {"x": dx.T, **{name: np.concatenate(parts) for name, parts in found.items()}}
    return {name: torch.from_numpy(result) for name, result in results.items()}


def _float64(tensor: Tensor) -> Array:
    array: Array = tensor.double().numpy()
    return array


def _along(weights: _Csr, rows: Array, columns: Array) -> Array:
    """The gradient of a sparse matrix's weights: rows [R, B] times columns [N, B] at each."""
    row = weights.rows()
    gradient = np.empty(len(row))
    for first in range(0, len(row), _SYNAPSES):
        some = slice(first, first + _SYNAPSES)
        gathered = rows[row[some]], columns[weights.columns[some]]
        gradient[some] = np.einsum("kb,kb->k", *gathered)
    return gradient


def _parts(problem: Problem) -> Iterator[_Somas]:
    c = problem.connectivity
    crow, col, soma_ptr = (t.numpy() for t in (c.crow_indices, c.col_indices, c.soma_ptr))
    weight, dendrite_bias, cable, soma_bias = (
        _float64(problem.parameters[name]) for name in PARAMETERS
    )
    step = max(1, _CHUNK * c.num_somas // (c.num_dendrites * len(problem.x)))
    for s0 in range(0, c.num_somas, step):
        s1 = min(c.num_somas, s0 + step)
        r0, r1 = soma_ptr[s0], soma_ptr[s1]
        k = slice(crow[r0], crow[r1])
        yield _Somas(
            slice(s0, s1),
            _Csr(weight[k], col[k], crow[r0 : r1 + 1] - crow[r0]),
            _Csr(cable[r0:r1], np.arange(r1 - r0), soma_ptr[s0 : s1 + 1] - r0),
            dendrite_bias[r0:r1, None],
            soma_bias[s0:s1, None],
        )
