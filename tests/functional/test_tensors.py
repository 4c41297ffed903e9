"""Tensors of other layouts and shapes, without gradients, with NaN; what backward keeps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import dendrite_kernels as dk
from tests import oracle
from tests.networks import draw, gradients


def views(x: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The values of x [B, N] under other strides."""
    yield "transposed", x.t().contiguous().t()
    wide = torch.full((2 * x.shape[0], 3 * x.shape[1]), torch.nan, dtype=x.dtype)
    wide[::2, 1::3] = x
    yield "strided", wide[::2, 1::3]
    offset = torch.full((x.numel() + 1,), torch.nan, dtype=x.dtype)
    offset[1:] = x.flatten()
    yield "offset", offset[1:].reshape(x.shape)


@pytest.mark.parametrize("somas", [True, False], ids=["dendritic", "sparse"])
def test_strided_inputs_and_gradients(backend: str, somas: bool) -> None:
    c = dk.connectivity.random(30, 10, 4, 6, seed=0)
    tensors = draw(c, 35, torch.float64, somas)
    outputs = c.num_somas if somas else c.num_dendrites
    grad = torch.randn(35, outputs, dtype=torch.float64)
    function = dk.functional.dendritic_layer if somas else dk.functional.sparse_linear

    def run(x: torch.Tensor, g: torch.Tensor) -> list[torch.Tensor]:
        leaves = [x.detach().requires_grad_(), *(t.clone().requires_grad_() for t in tensors[1:])]
        y = function(*leaves, c)
        return [y.detach(), *torch.autograd.grad(y, leaves, g)]

    expected = run(tensors[0], grad)
    for (name, x), (_, g) in zip(views(tensors[0]), views(grad), strict=True):
        assert not x.is_contiguous() or name == "offset"
        for found, wanted in zip(run(x, g), expected, strict=True):
            assert oracle.same(found, wanted, backend), name


@pytest.mark.parametrize("somas", [True, False], ids=["dendritic", "sparse"])
def test_expanded_inputs_and_gradients(backend: str, somas: bool) -> None:
    c = dk.connectivity.random(30, 10, 4, 6, seed=0)
    tensors = draw(c, 1, torch.float64, somas)
    function = dk.functional.dendritic_layer if somas else dk.functional.sparse_linear
    row = tensors[0].requires_grad_()
    y = function(row.expand(5, 30), *tensors[1:], c)
    y.sum().backward()  # the gradient of a sum is an expanded scalar
    assert oracle.same(y[0], y[4], backend)
    one = tensors[0].detach().clone().requires_grad_()
    (5 * function(one, *tensors[1:], c).sum()).backward()
    assert row.grad is not None
    assert one.grad is not None
    assert oracle.relative_error(row.grad, one.grad) < 1e-14


@pytest.mark.parametrize("kind", ["leaky_relu", "tanh", "sparse"])
def test_zeros_without_memory(backend: str, kind: str) -> None:
    """As derivatives of torch's own may be: their pointer is null."""
    c = dk.connectivity.random(30, 10, 4, 6, seed=0)
    layer: Any = dk.SparseLinear(c) if kind == "sparse" else dk.DendriticLayer(c, activation=kind)
    x = torch.randn(5, 30, requires_grad=True)
    y = layer(x)  # the first call, which makes the fast path
    layer(x).backward(torch._efficientzerotensor(y.shape))
    for tensor in (x, *layer.parameters()):
        assert tensor.grad is not None
        assert not tensor.grad.any()
    zero = torch._efficientzerotensor(x.shape)
    expected = layer(torch.zeros_like(x))
    assert oracle.same(layer(zero), expected, backend)
    with torch.no_grad():
        assert oracle.same(layer(zero), expected, backend)
    layer(zero).sum().backward()


@pytest.mark.parametrize("shape", [(30,), (4, 30), (2, 3, 30), (2, 0, 30), (1, 1, 1, 30)])
def test_leading_dimensions(backend: str, shape: tuple[int, ...]) -> None:
    c = dk.connectivity.random(30, 10, 4, 6, seed=0)
    layer, linear = dk.DendriticLayer(c), dk.SparseLinear(c)
    x = torch.randn(shape)
    flat = x.reshape(-1, 30)
    assert layer(x).shape == (*shape[:-1], 10)
    assert oracle.same(layer(x).reshape(-1, 10), layer(flat), backend)
    assert linear(x).shape == (*shape[:-1], 40)
    assert oracle.same(linear(x).reshape(-1, 40), linear(flat), backend)


@pytest.mark.parametrize("frozen", range(5))
def test_frozen_parameters_and_inputs_get_no_gradient(backend: str, frozen: int) -> None:
    c = dk.connectivity.random(30, 10, 4, 6, seed=0)
    tensors = draw(c, 35, torch.float64, somas=True)
    grad = torch.randn(35, 10, dtype=torch.float64)
    expected = gradients(lambda *t: dk.functional.dendritic_layer(*t, c), tensors, grad)[1:]
    leaves = [t.clone().requires_grad_(i != frozen) for i, t in enumerate(tensors)]
    dk.functional.dendritic_layer(*leaves, c).backward(grad)
    for i, (leaf, e) in enumerate(zip(leaves, expected, strict=True)):
        assert (leaf.grad is None) == (i == frozen)
        assert leaf.grad is None or oracle.relative_error(leaf.grad, e) < 1e-14


def test_no_grad_gives_the_same_values(backend: str) -> None:
    c = dk.connectivity.random(30, 10, 4, 6, seed=0)
    layer, linear, x = dk.DendriticLayer(c), dk.SparseLinear(c), torch.randn(40, 30)
    with torch.no_grad():
        quiet = layer(x), linear(x)
    assert oracle.same(quiet[0], layer(x), backend)
    assert oracle.same(quiet[1], linear(x), backend)
    assert not quiet[0].requires_grad


def test_nan_and_infinity_pass_through(backend: str) -> None:
    c = dk.connectivity.random(30, 10, 4, 6, constant_fan_in=True, seed=0)
    layer = dk.DendriticLayer(c)
    x = torch.randn(40, 30)
    x[7, 3], x[9, 5] = torch.nan, torch.inf
    y = layer(x)
    sees = c.to_mask().reshape(10, 4, 30).any(1)  # [S, N]
    assert torch.equal(y[7].isnan(), sees[:, 3])
    assert not y[9].isfinite()[sees[:, 5]].any()
    clean = torch.ones(40, dtype=torch.bool)
    clean[[7, 9]] = False
    assert y[clean].isfinite().all()


def test_nan_gradients_reach_connected_inputs_only(backend: str) -> None:
    c = dk.connectivity.random(30, 10, 4, 6, constant_fan_in=True, seed=0)
    layer, x = dk.DendriticLayer(c), torch.randn(40, 30, requires_grad=True)
    grad = torch.ones(40, 10)
    grad[7, 2] = torch.nan
    layer(x).backward(grad)
    sees = c.to_mask().reshape(10, 4, 30).any(1)[2]  # [N]
    assert x.grad is not None
    assert torch.equal(x.grad[7].isnan(), sees)
    assert x.grad[8].isfinite().all()
    assert layer.cable_weight.grad is not None
    assert torch.equal(layer.cable_weight.grad.isnan().nonzero()[:, 0], torch.arange(8, 12))


def test_backward_keeps_no_activations(backend: str) -> None:
    """x, y, the parameters and one bit per dendrite and sample: nothing of [B, R] floats."""
    c = dk.connectivity.random(50, 8, 16, 6, seed=0)
    layer = dk.DendriticLayer(c)
    x = torch.randn(96, 50, requires_grad=True)
    saved: list[torch.Tensor] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    known = {t.data_ptr() for t in (x, y, *layer.parameters())}
    others = [t for t in saved if t.data_ptr() not in known]
    assert [(t.dtype, t.numel()) for t in others] == [(torch.int32, 96 // 32 * 128)]
    bits = sum(8 * t.numel() * t.element_size() for t in others)
    assert bits == 96 * 128
    y.sum().backward()
