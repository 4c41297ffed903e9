"""Somas may have an activation of their own: "identity" gives the sums at the somas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import dendrite_kernels as dk
from tests import oracle
from tests.networks import NETWORKS, draw, draw_grad, gradients

PIECEWISE = {"leaky_relu": 0.1, "relu": 0.0, "identity": 1.0}
OTHERS = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "elu": F.elu}


@pytest.mark.parametrize("network", ["constant fan-in", "ragged", "receptive fields", "wide"])
@pytest.mark.parametrize("batch", [1, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact(backend: str, network: str, batch: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    c = NETWORKS[network]()
    tensors, grad = draw(c, batch, dtype, True), draw_grad(batch, c.num_somas, dtype)
    wide = [t.double() for t in tensors]
    bound = 1e-6 if dtype == torch.float32 else 1e-14
    for name, slope in PIECEWISE.items():
        for soma, soma_slope in PIECEWISE.items():
            options: Any = {"activation": name, "soma_activation": soma}
            exact = gradients(
                lambda *t: oracle.dendritic_layer(*t, c, slope, soma_slope),  # noqa: B023
                wide,
                grad,
            )
            ours = gradients(
                lambda *t: dk.functional.dendritic_layer(*t, c, **options),  # noqa: B023
                tensors,
                grad,
            )
            assert max(oracle.errors(ours, exact)) <= bound, (name, soma)


@pytest.mark.parametrize("activation", ["leaky_relu", *OTHERS])
@pytest.mark.parametrize("soma_activation", ["identity", *OTHERS])
def test_other_activations(backend: str, activation: str, soma_activation: str) -> None:
    c = NETWORKS["ragged"]()
    tensors, grad = draw(c, 40, torch.float64, True), torch.randn(40, c.num_somas).double()
    functions: dict[str, Any] = {**OTHERS, "leaky_relu": lambda u: F.leaky_relu(u, 0.1)}

    def plain(x: Any, weight: Any, bias: Any, cable: Any, soma_bias: Any) -> torch.Tensor:
        a = functions[activation](oracle.sparse_linear(x, weight, bias, c))
        v = oracle.segment_sum(a * cable, c.soma_ptr) + soma_bias
        y: torch.Tensor = functions.get(soma_activation, lambda u: u)(v)
        return y

    options: Any = {"activation": activation, "soma_activation": soma_activation}
    ours = gradients(lambda *t: dk.functional.dendritic_layer(*t, c, **options), tensors, grad)
    reference = gradients(lambda *t: dk.reference.dendritic_layer(*t, c, **options), tensors, grad)
    expected = gradients(plain, tensors, grad)
    assert max(oracle.errors(ours, expected)) < 1e-13
    assert max(oracle.errors(reference, expected)) < 1e-13


def test_none_is_that_of_the_dendrites(backend: str) -> None:
    c = NETWORKS["constant fan-in"]()
    tensors = draw(c, 33, torch.float32, True)
    for activation in (*PIECEWISE, "tanh"):
        options: Any = {"activation": activation}
        alone = dk.functional.dendritic_layer(*tensors, c, **options)
        named = dk.functional.dendritic_layer(*tensors, c, soma_activation=activation, **options)
        assert torch.equal(alone, named)


def test_derivatives_of_any_order(backend: str) -> None:
    c = dk.connectivity.random(7, 3, 2, 4, constant_fan_in=True, seed=3)
    leaves = draw(c, 5, torch.float64, True)
    leaves[2] += 0.3  # away from the kink at u == 0
    for leaf in leaves:
        leaf.requires_grad_()

    def layer(*t: torch.Tensor) -> torch.Tensor:
        return dk.functional.dendritic_layer(*t, c, soma_activation="identity")

    assert gradcheck(layer, leaves)
    assert gradgradcheck(layer, leaves)
    x = leaves[0].detach()
    _, tangent = torch.func.jvp(lambda x: layer(x, *leaves[1:]), (x,), (x,))
    _, pull = torch.func.vjp(lambda x: layer(x, *leaves[1:]), x)
    (cotangent,) = pull(torch.ones_like(tangent))
    torch.testing.assert_close((cotangent * x).sum(), tangent.sum())


def test_layer(backend: str, tmp_path: Path) -> None:
    layer = dk.DendriticLayer(NETWORKS["ragged"](), soma_activation="identity")
    x = torch.randn(9, 61)
    assert (layer(x) < -1e-3).any()
    assert "soma_activation=identity" in repr(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    torch.testing.assert_close(dk.interop.portable(layer)(x), layer(x))
    dk.save(layer, tmp_path / "layer")
    assert torch.equal(dk.load(tmp_path / "layer")(x), layer(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = layer(x)
    assert low.dtype == torch.bfloat16
    assert oracle.relative_error(low, layer(x)) < 0.01


def test_dense_synapses() -> None:
    layer = dk.DendriticLayer(dk.connectivity.all_to_all(6, 3, 2), soma_activation="identity")
    x, options = torch.randn(4, 6), {"soma_activation": "identity"}
    tensors = layer.synapse_weight, layer.dendrite_bias, layer.cable_weight, layer.soma_bias
    expected = dk.reference.dendritic_layer(x, *tensors, layer.connectivity, **options)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"soma_activation": "cube"}, ValueError, r"Expected an activation of .*, got 'cube'"),
        ({"activation": ["relu"]}, ValueError, r"Expected an activation of .*, got \['relu'\]"),
        ({"negative_slope": torch.tensor(0.1)}, TypeError, "to be a number, got Tensor"),
        ({"negative_slope": "0.1"}, TypeError, "to be a number, got str"),
        ({"negative_slope": None}, TypeError, "to be a number, got NoneType"),
        ({"negative_slope": True}, TypeError, "to be a number, got bool"),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    c = NETWORKS["constant fan-in"]()
    with pytest.raises(error, match=message):
        dk.DendriticLayer(c, **options)
    with pytest.raises(error, match=message):
        dk.functional.dendritic_layer(*draw(c, 2, torch.float32, True), c, **options)
