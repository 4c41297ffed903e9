"""Modules: their parameters, how these start, and how they are copied and moved."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dendrite_kernels as dk
from dendrite_kernels import Connectivity
from tests import oracle

Layer = dk.DendriticLayer | dk.SparseLinear
Make = Callable[..., Layer]
LAYERS = pytest.mark.parametrize("make", [dk.DendriticLayer, dk.SparseLinear])


def network(seed: int = 0) -> Connectivity:
    """30 inputs, 40 dendrites of varying fan-in, 10 somas."""
    return dk.connectivity.random(30, 10, 4, 6, seed=seed)


def uneven() -> Connectivity:
    """Fan-in 0 to 60 and somas of 0 to 300 dendrites; empty rows among them."""
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 61, 400)
    counts[::7] = 0
    columns = [np.sort(rng.choice(100, k, replace=False)) for k in counts]
    return Connectivity.from_csr(
        np.cumsum([0, *counts]), np.concatenate(columns), 100, soma_ptr=[0, 0, 1, 31, 100, 400, 400]
    )


def through_file(value: object, **options: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


def assert_same(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        assert torch.equal(value, theirs[name]), name


# Parameters


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64])
def test_parameters_of_a_dendritic_layer(dtype: torch.dtype | None) -> None:
    c = network()
    layer = dk.DendriticLayer(c, dtype=dtype)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "synapse_weight": (c.nnz,),
        "dendrite_bias": (40,),
        "cable_weight": (40,),
        "soma_bias": (10,),
    }
    for p in layer.parameters():
        assert p.dtype == (dtype or torch.float32)
        assert p.device.type == "cpu"
        assert p.requires_grad
    assert list(layer.buffers()) == []
    assert layer.connectivity is c


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64])
def test_parameters_of_a_sparse_linear(dtype: torch.dtype | None) -> None:
    c = network()
    layer = dk.SparseLinear(c, dtype=dtype)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "weight": (c.nnz,),
        "bias": (40,),
    }
    assert {p.dtype for p in layer.parameters()} == {dtype or torch.float32}
    assert list(layer.buffers()) == []
    assert layer.connectivity is c


def test_without_bias(backend: str) -> None:
    c = network()
    layer, linear = dk.DendriticLayer(c, bias=False), dk.SparseLinear(c, bias=False)
    assert layer.dendrite_bias is None
    assert layer.soma_bias is None
    assert linear.bias is None
    assert [name for name, _ in layer.named_parameters()] == ["synapse_weight", "cable_weight"]
    assert [name for name, _ in linear.named_parameters()] == ["weight"]
    x = torch.zeros(3, 30)
    assert not layer(x).any()
    assert not linear(x).any()


def test_default_dtype_is_followed() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert dk.DendriticLayer(network()).cable_weight.dtype == torch.float64
    finally:
        torch.set_default_dtype(before)


def test_options_reach_the_function(backend: str) -> None:
    c, x = network(), torch.randn(5, 30)
    leaky = dk.DendriticLayer(c, negative_slope=0.5)
    tanh = dk.DendriticLayer(c, activation="tanh")
    reference: Any = dk.reference.dendritic_layer
    expected = reference(x, *leaky.parameters(), c, negative_slope=0.5)
    torch.testing.assert_close(leaky(x), expected)
    expected = reference(x, *tanh.parameters(), c, activation="tanh")
    torch.testing.assert_close(tanh(x), expected)


def test_forward_is_the_function_of_the_parameters(backend: str) -> None:
    c, x = uneven(), torch.randn(7, 100, dtype=torch.float64)
    layer, linear = dk.DendriticLayer(c).double(), dk.SparseLinear(c).double()
    for p in (*layer.parameters(), *linear.parameters()):
        nn.init.normal_(p)
    w, bd, cable, bs = (p.detach() for p in layer.parameters())
    assert (
        oracle.relative_error(layer(x), oracle.dendritic_layer(x, w, bd, cable, bs, c, 0.1)) < 1e-14
    )
    assert (
        oracle.relative_error(
            linear(x), oracle.sparse_linear(x, linear.weight.detach(), linear.bias, c)
        )
        < 1e-14
    )


# How parameters start


def assert_uniform(values: Tensor, bound: Tensor | float) -> None:
    """Values are a sample of the uniform distribution on [-bound, bound], each in its own."""
    from scipy import stats  # tests/gpu imports this file on machines without it

    scaled = (values.detach().double() / bound).numpy()
    assert abs(scaled).max() <= 1 + 1e-6
    assert stats.kstest(scaled, stats.uniform(-1, 2).cdf).pvalue > 1e-3
    assert scaled.std() == pytest.approx(1 / math.sqrt(3), rel=0.05)


def fan_in_bounds(pointer: Tensor, slope: float) -> Tensor:
    """He et al. (2015): variance 2 / ((1 + slope^2) fan_in), written for every weight of a row."""
    counts = pointer.diff().tolist()
    return torch.tensor(
        [math.sqrt(3 * 2 / ((1 + slope**2) * k)) for k in counts for _ in range(k)],
        dtype=torch.float64,
    )


@pytest.mark.parametrize("slope", [0.1, 0.0, 1.0])
def test_fan_in_start(slope: float) -> None:
    c = uneven()
    layer = dk.DendriticLayer(c, negative_slope=slope)
    assert layer.init == "fan_in"  # the default
    assert_uniform(layer.synapse_weight, fan_in_bounds(c.crow_indices, slope))
    assert_uniform(layer.cable_weight, fan_in_bounds(c.soma_ptr, slope))
    linear = dk.SparseLinear(c, negative_slope=slope)
    assert linear.init == "fan_in"
    assert_uniform(linear.weight, fan_in_bounds(c.crow_indices, slope))


@pytest.mark.parametrize(("activation", "slope"), [("relu", 0.0), ("identity", 1.0), ("tanh", 0.0)])
def test_fan_in_start_takes_the_slope_of_the_activation(activation: str, slope: float) -> None:
    c = uneven()
    layer = dk.DendriticLayer(c, activation=activation, negative_slope=0.5)
    assert_uniform(layer.synapse_weight, fan_in_bounds(c.crow_indices, slope))


def test_paper_start_is_glorot_of_the_dense_matrices() -> None:
    c = uneven()  # N = 100, R = 400, S = 6
    layer, linear = dk.DendriticLayer(c, init="paper"), dk.SparseLinear(c, init="paper")
    assert_uniform(layer.synapse_weight, math.sqrt(6 / (100 + 400)))
    assert_uniform(layer.cable_weight, math.sqrt(6 / (400 + 6)))
    assert_uniform(linear.weight, math.sqrt(6 / (100 + 400)))


@pytest.mark.parametrize("init", ["fan_in", "paper"])
def test_biases_start_at_zero(init: dk.nn.Init) -> None:
    layer, linear = dk.DendriticLayer(uneven(), init=init), dk.SparseLinear(uneven(), init=init)
    for bias in (layer.dendrite_bias, layer.soma_bias, linear.bias):
        assert bias is not None
        assert not bias.any()


def test_fan_in_start_keeps_the_scale_and_that_of_the_paper_does_not(backend: str) -> None:
    """Mean square of the output, inputs of mean square 1."""
    c = dk.connectivity.random(500, 64, 16, 16, constant_fan_in=True, seed=0)
    x = torch.randn(200, 500)
    scale = {
        init: np.mean([dk.DendriticLayer(c, init=init)(x).square().mean().item() for _ in range(8)])
        for init in ("fan_in", "paper")
    }
    assert 0.8 < scale["fan_in"] < 1.25
    assert scale["paper"] < 0.05


@pytest.mark.parametrize("init", ["fan_in", "paper"])
def test_start_of_networks_without_synapses(init: dk.nn.Init) -> None:
    c = Connectivity.from_csr([0, 0, 0], [], 4, soma_ptr=[0, 0, 2])
    layer, linear = dk.DendriticLayer(c, init=init), dk.SparseLinear(c, init=init)
    assert layer.synapse_weight.shape == linear.weight.shape == (0,)
    assert all(p.isfinite().all() for p in (*layer.parameters(), *linear.parameters()))


@LAYERS
@pytest.mark.parametrize("init", ["fan_in", "paper"])
def test_reset_draws_anew_from_torch_s_generator(make: Make, init: str) -> None:
    torch.manual_seed(3)
    layer = make(network(), init=init)
    first = copy.deepcopy(layer)
    layer.reset_parameters()
    for (name, old), new in zip(first.named_parameters(), layer.parameters(), strict=True):
        assert torch.equal(old, new) == name.endswith("bias")
    for p in layer.parameters():
        nn.init.constant_(p, 7)
    torch.manual_seed(3)
    layer.reset_parameters()
    assert_same(layer, first)


def test_reset_keeps_the_parameters_and_needs_no_grad() -> None:
    layer = dk.DendriticLayer(network())
    before = list(layer.parameters())
    layer.reset_parameters()
    assert all(a is b for a, b in zip(before, layer.parameters(), strict=True))
    assert all(p.is_leaf and p.requires_grad for p in layer.parameters())


# What they say of themselves


def test_repr() -> None:
    c = network()
    assert dk.DendriticLayer(c).extra_repr() == (
        f"{c!r}, bias=True, activation=leaky_relu(0.1), init=fan_in"
    )
    plain = dk.DendriticLayer(c, bias=False, activation="tanh", init="paper")
    assert plain.extra_repr() == f"{c!r}, bias=False, activation=tanh, init=paper"
    assert dk.SparseLinear(c, bias=False).extra_repr() == f"{c!r}, bias=False, init=fan_in"
    assert repr(c) in repr(nn.Sequential(dk.DendriticLayer(c)))


# Copies


@LAYERS
def test_deepcopy_shares_the_connectivity_only(backend: str, make: Make) -> None:
    layer, x = make(network()), torch.randn(3, 30)
    layer(x)
    twin = copy.deepcopy(layer)
    assert twin.connectivity is layer.connectivity
    assert_same(layer, twin)
    assert oracle.same(twin(x), layer(x), backend)
    before = copy.deepcopy(layer)
    for p in twin.parameters():
        nn.init.constant_(p, 7)
    assert_same(layer, before)


@LAYERS
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_pickle(backend: str, make: Make, used: bool) -> None:
    layer, x = make(network(), bias=False, dtype=torch.float64), torch.randn(3, 30).double()
    if used:
        layer(x).sum().backward()
    layer.zero_grad()
    for twin in (pickle.loads(pickle.dumps(layer)), through_file(layer, weights_only=False)):
        assert twin.connectivity == layer.connectivity
        assert repr(twin) == repr(layer)
        assert_same(layer, twin)
        assert oracle.same(twin(x), layer(x), backend)


# Moves


@LAYERS
def test_double_and_float(backend: str, make: Make) -> None:
    layer = make(network())
    c, x = layer.connectivity, torch.randn(3, 30)
    y = layer(x)
    assert layer.double() is layer
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    exact = layer(x.double())
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact.float(), y)
    with pytest.raises(TypeError, match=r"Expected .*weight of dtype torch.float32 like x"):
        layer(x)
    assert oracle.same(layer.float()(x), y, backend)
    assert layer.connectivity is c


@LAYERS
@pytest.mark.parametrize("shape", [(5,), (2, 3), (0,), ()])
def test_meta_device_has_shapes_only(backend: str, make: Make, shape: tuple[int, ...]) -> None:
    layer = make(network(), device="meta", dtype=torch.float64)
    assert all(p.is_meta and p.dtype == torch.float64 for p in layer.parameters())
    outputs = 10 if isinstance(layer, dk.DendriticLayer) else 40
    x = torch.empty((*shape, 30), device="meta", dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert y.is_meta
    assert (y.shape, y.dtype) == ((*shape, outputs), torch.float64)
    y.sum().backward()
    for leaf in (x, *layer.parameters()):
        assert leaf.grad is not None
        assert leaf.grad.is_meta
        assert leaf.grad.shape == leaf.shape
    with torch.no_grad():
        assert layer(x).shape == (*shape, outputs)


@LAYERS
def test_from_meta_to_memory(backend: str, make: Make) -> None:
    layer = make(network(), device="meta")
    layer.to_empty(device=torch.get_default_device())
    torch.manual_seed(5)
    layer.reset_parameters()
    torch.manual_seed(5)
    assert_same(layer, make(network()))
    assert layer(torch.randn(3, 30)).isfinite().all()


@LAYERS
def test_frozen(backend: str, make: Make) -> None:
    layer = make(network()).requires_grad_(False)
    assert not layer(torch.randn(3, 30)).requires_grad
    x = torch.randn(3, 30, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in layer.parameters())
    layer.requires_grad_(True)(torch.randn(3, 30)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
