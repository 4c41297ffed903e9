"""DendriticLayer.dendrites: what the dendrites send to the somas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import dendrite_kernels as dk
from tests import oracle
from tests.networks import NETWORKS, draw_grad, gradients

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "leaky_relu": lambda u: F.leaky_relu(u, 0.3),
    "relu": F.relu,
    "tanh": torch.tanh,
}


def layer_on(c: dk.Connectivity, **options: Any) -> dk.DendriticLayer:
    layer = dk.DendriticLayer(c, negative_slope=0.3, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


@pytest.mark.parametrize("network", ["constant fan-in", "ragged", "no synapse", "N=1"])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact(backend: str, network: str, activation: str, dtype: torch.dtype) -> None:
    c = NETWORKS[network]()
    layer = layer_on(c, activation=activation, soma_activation="sigmoid", dtype=dtype)
    x, grad = torch.randn(17, c.in_features).to(dtype), draw_grad(17, c.num_dendrites, dtype)
    mask = c.to_mask()

    def plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        dense = torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, weight)
        return ACTIVATIONS[activation](F.linear(x, dense, bias))

    assert layer.dendrite_bias is not None
    leaves = [x.requires_grad_(), layer.synapse_weight, layer.dendrite_bias]
    a = layer.dendrites(x)
    ours = [a, *torch.autograd.grad(a, leaves, grad)]
    exact = gradients(plain, [t.double() for t in leaves], grad)
    assert a.shape == (17, c.num_dendrites)
    assert max(oracle.errors(ours, exact)) <= (1e-6 if dtype == torch.float32 else 1e-14)


def test_somas_sum_what_dendrites_sends() -> None:
    c = NETWORKS["ragged"]()
    layer = layer_on(c, soma_activation="identity", dtype=torch.float64)
    x = torch.randn(5, c.in_features, dtype=torch.float64)
    sums = oracle.segment_sum(layer.dendrites(x) * layer.cable_weight, c.soma_ptr)
    torch.testing.assert_close(layer(x), sums + layer.soma_bias)


def test_shapes_and_options() -> None:
    c = dk.connectivity.local_receptive_fields((4, 6), 5, 3, 4, channels=2, seed=0)
    layer = layer_on(c)
    x = torch.randn(2, 7, 4, 6, 2)
    assert layer.dendrites(x).shape == (2, 7, 15)
    torch.testing.assert_close(layer.dendrites(x), layer.dendrites(x.flatten(2)))
    assert layer.dendrites(x[0, 0]).shape == (15,)
    no_bias = layer_on(c, bias=False)
    assert not no_bias.dendrites(torch.zeros(3, 48)).any()
    with pytest.raises(ValueError, match=r"Expected x of shape \[..., 48\], got \[3, 47\]"):
        layer.dendrites(torch.zeros(3, 47))


def test_precision_is_that_of_forward() -> None:
    c = NETWORKS["constant fan-in"]()
    layer, x = layer_on(c, precision="bf16"), torch.randn(9, c.in_features)
    rounded = x.bfloat16().float()
    exact = oracle.sparse_linear(rounded, layer.synapse_weight, layer.dendrite_bias, c)
    torch.testing.assert_close(layer.dendrites(x), F.leaky_relu(exact, 0.3))
    low = layer_on(c, dtype=torch.bfloat16)
    assert low.dendrites(x.bfloat16()).dtype == torch.bfloat16
