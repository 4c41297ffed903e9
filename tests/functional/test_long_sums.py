"""Long sums round off no more than sums of short chains do.

Added up one by one, thousands of float32 products have five times the error. The judge adds in
chains of 128 by elementwise additions, which every machine rounds alike.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

import dendrite_kernels as dk
from dendrite_kernels import Connectivity
from tests import oracle
from tests.functional.test_functional import NAMES, exact_gradients
from tests.marks import kernels
from tests.networks import draw, draw_grad, gradients

CHAIN = 128
ROUNDOFF = 2.0**-24
SLOPE = 0.1
NETWORKS = {
    "rows of 5000": lambda: dk.connectivity.random(8000, 16, 4, 5000, seed=0),
    "rows of 400": lambda: dk.connectivity.random(784, 256, 4, 392, seed=0),
    "columns of 4096": lambda: dk.connectivity.random(16, 1024, 16, 4, seed=0),
}
Tensors = list[torch.Tensor]


def in_order(values: torch.Tensor) -> torch.Tensor:
    """The sum over the last dimension, one addition after the other."""
    total = torch.zeros_like(values[..., 0])
    for part in values.unbind(-1):
        total = total + part
    return total


def chained(values: torch.Tensor, pointer: torch.Tensor) -> torch.Tensor:
    """values [B, n] -> [B, segments]: each segment a sum of sums of at most CHAIN numbers."""
    counts = pointer.long().diff()
    width = int(counts.max())
    chain = min(CHAIN, width)
    padded = values.new_zeros(len(values), len(counts), -(-width // chain) * chain)
    padded[:, torch.arange(padded.shape[2]) < counts[:, None]] = values
    return in_order(in_order(padded.unflatten(2, (-1, chain))))


def over_batch(values: torch.Tensor) -> torch.Tensor:  # [B, n] -> [n]
    return in_order(values.T)


def slope_at(u: torch.Tensor) -> torch.Tensor:
    return torch.where(u > 0, 1.0, SLOPE)


def judged_linear(
    x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, c: Connectivity
) -> torch.Tensor:
    return chained(x[:, c.col_indices.long()] * w, c.crow_indices) + b


def judged_linear_backward(
    q: torch.Tensor, x: torch.Tensor, w: torch.Tensor, c: Connectivity
) -> Tensors:
    """Gradients of x, weight and bias from q [B, R], that of the sums."""
    row = torch.repeat_interleave(torch.arange(c.num_dendrites), c.crow_indices.long().diff())
    column = c.col_indices.long()
    by_column = column.argsort(stable=True)
    ends = torch.bincount(column, minlength=c.in_features).cumsum(0)
    products = q[:, row[by_column]] * w[by_column]
    dx = chained(products, torch.cat([ends.new_zeros(1), ends]))
    return [dx, over_batch(q[:, row] * x[:, column]), over_batch(q)]


def judged(tensors: Tensors, grad: torch.Tensor, c: Connectivity) -> Tensors:
    """Output and gradients in float32, every sum in chains."""
    x, w, b, *somas = tensors
    u = judged_linear(x, w, b, c)
    if not somas:
        return [u, *judged_linear_backward(grad, x, w, c)]
    cable, soma_bias = somas
    a = u * slope_at(u)
    v = chained(a * cable, c.soma_ptr) + soma_bias
    g = grad * slope_at(v)
    soma = torch.repeat_interleave(torch.arange(c.num_somas), c.soma_ptr.long().diff())
    q = g[:, soma] * cable * slope_at(u)
    below = judged_linear_backward(q, x, w, c)
    return [v * slope_at(v), *below, over_batch(g[:, soma] * a), over_batch(g)]


@cache
def case(
    network: str, batch: int, somas: bool
) -> tuple[Connectivity, Tensors, torch.Tensor, Tensors, list[float]]:
    """Operands, float64 results, and the errors of float32 sums in chains."""
    torch.manual_seed(0)
    c = NETWORKS[network]()
    if somas:
        tensors, grad = (
            draw(c, batch, torch.float32, somas),
            draw_grad(batch, c.num_somas, torch.float32),
        )
    else:
        sizes = (batch, c.in_features), (c.nnz,), (c.num_dendrites,)
        tensors = [torch.randn(size) for size in sizes]
        grad = torch.randn(batch, c.num_dendrites)
    exact = exact_gradients(c, tensors, grad)
    return c, tensors, grad, exact, oracle.errors(judged(tensors, grad, c), exact)


def assert_no_worse(ours: Tensors, exact: Tensors, allowed: list[float]) -> None:
    """At most twice the judge's error, or what rounding the exact result to float32 may cost."""
    names = NAMES[: len(ours)]
    for name, error, chains in zip(names, oracle.errors(ours, exact), allowed, strict=True):
        assert error <= max(2 * chains, ROUNDOFF), (name, error, chains)


@kernels  # "reference" is plain torch
@pytest.mark.parametrize("batch", [1, 4, 64])
@pytest.mark.parametrize("network", NETWORKS)
def test_long_rows_and_columns(backend: str, network: str, batch: int) -> None:
    c, tensors, grad, exact, allowed = case(network, batch, False)
    ours = gradients(lambda *t: dk.functional.sparse_linear(*t, c), tensors, grad)
    assert_no_worse(ours, exact, allowed)


@kernels
@pytest.mark.parametrize("batch", [1, 4, 64])
def test_cable_gradients_of_long_rows(backend: str, batch: int) -> None:
    c, tensors, grad, exact, allowed = case("rows of 5000", batch, True)
    ours = gradients(lambda *t: dk.functional.dendritic_layer(*t, c), tensors, grad)
    assert_no_worse(ours, exact, allowed)
