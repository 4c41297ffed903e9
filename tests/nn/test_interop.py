"""To and from two nn.Linear layers under masks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dendrite_kernels as dk
from dendrite_kernels import Connectivity
from dendrite_kernels.interop import from_masked_dense, to_masked_dense
from tests import oracle

N, R, S = 11, 9, 4
Dense = tuple[nn.Linear, Tensor, nn.Linear, Tensor]


def uneven() -> Connectivity:
    """Empty rows, a soma without dendrites, somas of unequal size."""
    rng = np.random.default_rng(1)
    mask = rng.random((R, N)) < 0.4
    mask[[0, 5]] = False
    return Connectivity.from_mask(mask, soma_ptr=[0, 3, 3, 4, R])


def dense(owner: list[int], bias: bool = True, dtype: torch.dtype = torch.float64) -> Dense:
    """Random linear layers; dendrite r feeds soma owner[r]. Weights are not masked."""
    dendrite = nn.Linear(N, len(owner), bias=bias, dtype=dtype)
    soma = nn.Linear(len(owner), S, bias=bias, dtype=dtype)
    for p in (*dendrite.parameters(), *soma.parameters()):
        nn.init.normal_(p)
    soma_mask = torch.zeros(S, len(owner), dtype=torch.bool)
    soma_mask[owner, range(len(owner))] = True
    return dendrite, torch.rand(len(owner), N) < 0.4, soma, soma_mask


def masked_forward(form: Dense, x: Tensor) -> Tensor:
    dendrite, dendrite_mask, soma, soma_mask = form
    a = F.leaky_relu(F.linear(x, dendrite.weight * dendrite_mask, dendrite.bias), 0.1)
    return F.leaky_relu(F.linear(a, soma.weight * soma_mask, soma.bias), 0.1)


NETWORKS: dict[str, Callable[[], Connectivity]] = {
    "variable fan-in": lambda: dk.connectivity.random(30, 10, 4, 6, seed=0),
    "colour": lambda: dk.connectivity.local_receptive_fields((4, 4), 3, 2, 5, channels=3, seed=0),
    "dense": lambda: dk.connectivity.all_to_all(7, 3, 2),
    "uneven": uneven,
    "one of each": lambda: Connectivity.from_csr([0, 1], [0], 1),
    "no synapse": lambda: Connectivity.from_csr([0, 0, 0], [], 3, soma_ptr=[0, 2]),
}


def random_layer(c: Connectivity, **options: Any) -> dk.DendriticLayer:
    layer = dk.DendriticLayer(c, **options)
    for p in layer.parameters():
        nn.init.normal_(p)
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NETWORKS)
def test_round_trip_of_a_layer_is_exact(name: str, dtype: torch.dtype, bias: bool) -> None:
    layer = random_layer(NETWORKS[name](), bias=bias, dtype=dtype)
    with torch.no_grad():
        layer.cable_weight[0] = 0  # a connection that exists, with weight zero
    again = from_masked_dense(*to_masked_dense(layer))
    assert again.connectivity == layer.connectivity
    ours, theirs = dict(layer.named_parameters()), dict(again.named_parameters())
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert theirs[key].dtype == dtype
        assert torch.equal(value, theirs[key]), key


@pytest.mark.parametrize("bias", [True, False])
def test_round_trip_of_masked_layers_is_exact(bias: bool) -> None:
    form = dense([0, 0, 1, 3, 3, 3], bias)
    dendrite, dendrite_mask, soma, soma_mask = to_masked_dense(from_masked_dense(*form))
    assert torch.equal(dendrite_mask, form[1])
    assert torch.equal(soma_mask, form[3])
    assert dendrite_mask.dtype == soma_mask.dtype == torch.bool
    assert torch.equal(dendrite.weight, form[0].weight * form[1])
    assert torch.equal(soma.weight, form[2].weight * form[3])
    for ours, theirs in ((dendrite, form[0]), (soma, form[2])):
        assert (ours.bias is None) == (not bias)
        assert not bias or torch.equal(ours.bias, theirs.bias)


@pytest.mark.parametrize("name", NETWORKS)
def test_masked_form_of_a_layer(backend: str, name: str) -> None:
    layer = random_layer(NETWORKS[name](), dtype=torch.float64)
    c = layer.connectivity
    form = to_masked_dense(layer)
    dendrite, dendrite_mask, soma, soma_mask = form
    assert dendrite.weight.shape == dendrite_mask.shape == (c.num_dendrites, c.in_features)
    assert soma.weight.shape == soma_mask.shape == (c.num_somas, c.num_dendrites)
    assert torch.equal(dendrite_mask, c.to_mask())
    assert soma_mask.sum(0).eq(1).all()
    assert soma_mask.sum(1).tolist() == c.soma_ptr.diff().tolist()
    assert not dendrite.weight[~dendrite_mask].any()
    assert not soma.weight[~soma_mask].any()
    x = torch.randn(5, c.in_features, dtype=torch.float64)
    assert oracle.relative_error(layer(x), masked_forward(form, x)) < 1e-13


@pytest.mark.parametrize(
    "owner",
    [
        [0, 0, 1, 1, 2, 2, 3, 3],
        [3, 2, 1, 0],
        [0, 1, 2, 3, 0, 1, 2, 3],
        [2, 0, 2, 0, 0, 3, 2],
        [1],
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [True, False])
def test_any_ownership_gives_the_same_function(backend: str, owner: list[int], bias: bool) -> None:
    """Dendrites that are not in the order of their somas are moved, with all that is theirs."""
    form = dense(owner, bias)
    layer = from_masked_dense(*form)
    x = torch.randn(7, N, dtype=torch.float64)
    assert oracle.relative_error(layer(x), masked_forward(form, x)) < 1e-13
    order = sorted(range(len(owner)), key=lambda r: owner[r])  # stable
    assert torch.equal(layer.connectivity.to_mask(), form[1][order])
    assert layer.connectivity.soma_ptr.diff().tolist() == [owner.count(s) for s in range(S)]
    if bias:
        assert layer.dendrite_bias is not None
        assert torch.equal(layer.dendrite_bias, form[0].bias[order])
        assert layer.soma_bias is not None
        assert torch.equal(layer.soma_bias, form[2].bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.uint8])
def test_masks_of_zeros_and_ones(dtype: torch.dtype) -> None:
    form = dense([2, 0, 2, 0, 0, 3, 2])
    layer = from_masked_dense(*form)
    again = from_masked_dense(form[0], form[1].to(dtype), form[2], form[3].to(dtype))
    assert again.connectivity == layer.connectivity
    assert all(map(torch.equal, layer.parameters(), again.parameters()))


@pytest.mark.parametrize(
    ("options", "function"),
    [
        ({"negative_slope": 0.3}, functools.partial(F.leaky_relu, negative_slope=0.3)),
        ({"activation": "relu"}, torch.relu),
        ({"activation": "tanh"}, torch.tanh),
    ],
    ids=str,
)
def test_activation_of_masked_layers(options: dict[str, Any], function: Any) -> None:
    dendrite, dendrite_mask, soma, soma_mask = form = dense([2, 0, 2, 0, 0, 3, 2])
    layer, x = from_masked_dense(*form, **options), torch.randn(7, N).double()
    a = function(F.linear(x, dendrite.weight * dendrite_mask, dendrite.bias))
    expected = function(F.linear(a, soma.weight * soma_mask, soma.bias))
    assert oracle.relative_error(layer(x), expected) < 1e-13
    with pytest.raises(ValueError, match="Expected an activation of"):
        from_masked_dense(*form, activation="step")


def test_gradients_are_those_of_the_masked_layers(backend: str) -> None:
    form = dense([2, 0, 2, 0, 0, 3, 2])
    layer = from_masked_dense(*form)
    x, grad = torch.randn(7, N).double(), torch.randn(7, S).double()
    masked_forward(form, x).backward(grad)
    layer(x).backward(grad)
    for linear in (form[0], form[2]):
        for p in linear.parameters():
            assert p.grad is not None
            p.data = p.grad
    expected = from_masked_dense(*form)  # their gradients, put where the layer has its own
    for ours, theirs in zip(layer.parameters(), expected.parameters(), strict=True):
        assert ours.grad is not None
        assert oracle.relative_error(ours.grad, theirs) < 1e-13


def test_nothing_is_shared() -> None:
    form = dense([0, 0, 1, 3])
    layer = from_masked_dense(*form)
    values = [p.detach().clone() for p in layer.parameters()]
    for linear in (form[0], form[2]):
        for p in linear.parameters():
            nn.init.zeros_(p)
    for p in to_masked_dense(layer)[0].parameters():
        nn.init.zeros_(p)
    assert all(torch.equal(p, v) for p, v in zip(layer.parameters(), values, strict=True))
    assert all(p.is_leaf and p.requires_grad for p in layer.parameters())


def test_two_layers_of_a_model_there_and_back(backend: str) -> None:
    model = dk.models.build("dANN-LRF", (6, 6), 9, 2, 5, 3, layers=2, seed=0).double()
    x = torch.rand(4, 36).double()
    layers = [
        from_masked_dense(*to_masked_dense(m)) for m in model if isinstance(m, dk.DendriticLayer)
    ]
    assert len(layers) == 2
    y = nn.Sequential(*layers, model[-1])(x)
    assert oracle.relative_error(y, model(x)) < 1e-14  # nn.Linear multiplies matrices


# Errors


def change(form: Dense, **parts: Any) -> Any:
    names = ("dendrite", "dendrite_mask", "soma", "soma_mask")
    return {**dict(zip(names, form, strict=True)), **parts}


def owners(*extra: tuple[int, int], without: int | None = None) -> Tensor:
    mask = dense([0, 0, 1, 3])[3]
    for s, r in extra:
        mask[s, r] = True
    if without is not None:
        mask[:, without] = False
    return mask


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ({"soma_mask": owners(without=2)}, ValueError, "one soma, got 0 for dendrite 2"),
        ({"soma_mask": owners((2, 1))}, ValueError, "one soma, got 2 for dendrite 1"),
        (
            {"dendrite_mask": torch.full((4, N), 0.5)},
            ValueError,
            "dendrite_mask .*0 and 1, got 0.5",
        ),
        ({"soma_mask": owners() * torch.nan}, ValueError, "soma_mask of values 0 and 1, got nan"),
        ({"soma_mask": owners() * -1}, ValueError, "soma_mask of values 0 and 1, got -1"),
        (
            {"soma_mask": owners().numpy()},
            TypeError,
            r"soma_mask to be a torch.Tensor, got ndarray",
        ),
        (
            {"dendrite_mask": torch.ones(N, 4, dtype=torch.bool)},
            ValueError,
            r"dendrite_mask .*shape \[4, 11\], got \[11, 4\]: give dendrite_mask\.T, for Keras",
        ),
        ({"soma_mask": owners().T}, ValueError, r"soma_mask .*shape \[4, 4\]|one soma"),
        ({"soma_mask": owners()[:, :3]}, ValueError, r"soma_mask .*shape \[4, 4\], got \[4, 3\]"),
        ({"soma_mask": owners()[0]}, ValueError, r"soma_mask .*shape \[4, 4\], got \[4\]"),
        (
            {"soma": nn.Linear(5, S).double(), "soma_mask": torch.ones(S, 5, dtype=torch.bool)},
            ValueError,
            "soma with 4 inputs, got 5",
        ),
        (
            {"soma": nn.Linear(4, S, bias=False).double()},
            ValueError,
            r"both layers or neither to have a bias, got \(True, False\)",
        ),
        ({"soma": nn.Linear(4, S)}, TypeError, "soma of dtype torch.float64, got torch.float32"),
        ({"soma": nn.Linear(4, S).half()}, TypeError, "soma of dtype torch.float64"),
        ({"dendrite": nn.Linear(N, 4)}, TypeError, "soma of dtype torch.float32, got"),
        ({"soma": nn.Linear(4, S).double().to("meta")}, ValueError, "weight .*, got a meta one"),
        ({"dendrite": nn.LazyLinear(4).double()}, ValueError, "weight .*, got a lazy one"),
        ({"soma_mask": owners().to("meta")}, ValueError, "soma_mask .*, got a meta one"),
        ({"soma_mask": owners().to_sparse()}, ValueError, "soma_mask .*, got a torch.sparse_coo"),
        (
            {"dendrite": nn.Linear(N, 4, bias=False).double()},
            ValueError,
            r"both layers or neither to have a bias, got \(False, True\)",
        ),
    ],
)
def test_errors(parts: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"Expected .*{message}"):
        from_masked_dense(**change(dense([0, 0, 1, 3]), **parts))


def test_only_dendritic_layers_have_a_masked_form() -> None:
    other: Any = dk.SparseLinear(uneven())
    with pytest.raises(TypeError, match="Expected a DendriticLayer, got SparseLinear"):
        to_masked_dense(other)


@pytest.mark.parametrize("change", ["forward", "hook", "state hook", "class"])
def test_masked_dense_refuses_layers_that_compute_something_else(change: str) -> None:
    class Twice(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    dendrite = (Twice if change == "class" else torch.nn.Linear)(6, 4)
    if change == "forward":
        dendrite.forward = lambda x: x  # type: ignore[method-assign]
    if change == "hook":
        dendrite.register_forward_hook(lambda _module, _x, y: 2 * y)
    if change == "state hook":
        dendrite.register_state_dict_post_hook(lambda *_: None)
    mask, soma_mask = torch.ones(4, 6, dtype=torch.bool), torch.eye(4, dtype=torch.bool)
    with pytest.raises(ValueError, match="Expected dendrite without hooks and forward of its own"):
        dk.interop.from_masked_dense(dendrite, mask, torch.nn.Linear(4, 4), soma_mask)
