"""Signed weights; and what holds of any parametrized layer."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import dendrite_kernels as dk
from dendrite_kernels import Signed, autograd
from tests import oracle
from tests.marks import kernels, needs_cpp

N, S, D, K = 30, 10, 4, 6


def input_signs() -> Tensor:
    return torch.arange(N) % 3 % 2 * 2 - 1


def layer(seed: int = 0) -> Any:
    return dk.DendriticLayer(dk.connectivity.random(N, S, D, K, seed=seed))


def signed(seed: int = 0) -> Any:
    """Dale's law for inputs, excitatory cables."""
    made = layer(seed)
    signs = Signed.of_inputs(input_signs(), made.connectivity)
    parametrize.register_parametrization(made, "synapse_weight", signs)
    parametrize.register_parametrization(made, "cable_weight", Signed(torch.ones(S * D)))
    return made


def signs_hold(made: Any) -> bool:
    expected = input_signs()[made.connectivity.col_indices.long()]
    right = (made.synapse_weight.sign() == expected) | (made.synapse_weight == 0)
    return bool(right.all()) and bool((made.cable_weight >= 0).all())


def train(model: Any, steps: int = 5, lr: float = 1.0) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    x = oracle.drawn(64, N, seed=1)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()


def test_registering_keeps_sizes() -> None:
    made = layer()
    before = made.synapse_weight.detach().clone()
    signs = Signed.of_inputs(input_signs(), made.connectivity)
    parametrize.register_parametrization(made, "synapse_weight", signs)
    assert torch.equal(made.synapse_weight.abs(), before.abs())
    assert signs_hold_of_synapses(made)
    made.synapse_weight = before  # an assignment too
    assert torch.equal(made.synapse_weight.abs(), before.abs())
    assert signs_hold_of_synapses(made)


def signs_hold_of_synapses(made: Any) -> bool:
    expected = input_signs()[made.connectivity.col_indices.long()]
    return torch.equal(made.synapse_weight.sign().long(), expected)


def test_signs_hold_in_training(backend: str) -> None:
    """With a learning rate at which some weights would change theirs."""
    free, made = layer(), signed()
    with torch.no_grad():
        free.synapse_weight.copy_(made.synapse_weight)
        free.cable_weight.copy_(made.cable_weight)
    before = made.synapse_weight.detach().clone()
    train(free)
    train(made)
    assert not signs_hold(free)
    assert signs_hold(made)
    assert not torch.equal(made.synapse_weight, before)


def test_gradients(backend: str) -> None:
    """Of the raw values: sign(raw) * sign times those of the weights, and the sign at 0."""
    raw = torch.tensor([2.0, -3.0, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    weight = Signed(torch.tensor([1, -1, 1, -1]))(raw)
    assert weight.tolist() == [2.0, -3.0, 0.0, 0.0]
    (grad,) = torch.autograd.grad(weight.sum(), raw)
    assert grad.tolist() == [1.0, 1.0, 1.0, -1.0]


@needs_cpp
def test_the_fast_path_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = signed(), torch.randn(5, N)
    made(x)  # makes what the fast path needs
    monkeypatch.setattr(autograd, "layer", None)
    made(x).sum().backward()
    assert made.parametrizations.synapse_weight.original.grad is not None


@kernels
def test_compiled_training_equals_eager(backend: str, inductor: None) -> None:
    made = signed()
    twin = copy.deepcopy(made)
    torch._dynamo.reset()
    train(torch.compile(made, fullgraph=True), steps=2)
    train(twin, steps=2)
    assert max(oracle.errors(list(made.parameters()), list(twin.parameters()))) < 1e-5


@pytest.mark.parametrize("strict", [True, False])
def test_state_round_trip(strict: bool) -> None:
    a, b = nn.Sequential(signed()), nn.Sequential(signed())
    train(a)
    keys = a.state_dict().keys()
    assert "0.parametrizations.synapse_weight.original" in keys
    assert "0.parametrizations.synapse_weight.0.signs" in keys
    b.load_state_dict(a.state_dict(), strict=strict)
    x = torch.randn(3, N)
    assert torch.equal(a(x), b(x))


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_of_another_structure_changes_nothing(strict: bool) -> None:
    model, other = nn.Sequential(signed()), nn.Sequential(signed(seed=1))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="Expected a state of Connectivity") as caught:
        model.load_state_dict(other.state_dict(), strict=strict)
    assert "Missing key" not in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("strict", [True, False])
def test_parametrized_weights_without_their_connectivity_are_refused(strict: bool) -> None:
    c = dk.connectivity.random(N, S, D, K, seed=0)
    model = dk.SparseLinear(c, bias=False)  # no parameter but the parametrized one
    parametrize.register_parametrization(model, "weight", Signed(torch.ones(c.nnz)))
    state = model.state_dict()
    del state["_extra_state"]
    with pytest.raises(RuntimeError, match="Missing key '_extra_state', the connectivity"):
        model.load_state_dict(state, strict=strict)


def test_signs_follow_the_layer() -> None:
    made = signed().double()
    assert made.synapse_weight.dtype == torch.float64
    assert made.half().synapse_weight.dtype == torch.float16
    y = copy.deepcopy(made.float())(torch.ones(N))
    for name in ("synapse_weight", "cable_weight"):
        parametrize.remove_parametrizations(made, name)
    assert type(made) is dk.DendriticLayer
    assert oracle.relative_error(made(torch.ones(N)), y) < 1e-6


def test_parametrized_weights_are_not_drawn() -> None:
    with pytest.raises(RuntimeError, match="Expected parameters to draw, got a weight that is"):
        signed().reset_parameters()


def test_wrong_signs() -> None:
    made = layer()
    with pytest.raises(ValueError, match="Expected signs 1 and -1, got 0"):
        Signed(torch.tensor([1, 0, -1]))
    for signs in (torch.ones(N, device="meta"), torch.ones(N).to_sparse()):
        for make in (Signed, lambda signs: Signed.of_inputs(signs, made.connectivity)):
            with pytest.raises(ValueError, match="Expected signs to be a dense tensor with values"):
                make(signs)
    with pytest.raises(ValueError, match=r"Expected signs of shape \[30\], got \[10\]"):
        Signed.of_inputs(torch.ones(S), made.connectivity)
    with pytest.raises(ValueError, match=r"Expected a weight of shape \[10\], got \[40\]"):
        parametrize.register_parametrization(made, "cable_weight", Signed(torch.ones(S)))


@pytest.mark.parametrize("signs", [[1, -1], np.ones(N), 1, None])
def test_signs_that_are_no_tensor(signs: Any) -> None:
    for make in (Signed, lambda signs: Signed.of_inputs(signs, layer().connectivity)):
        with pytest.raises(TypeError, match="Expected signs to be a tensor, got"):
            make(signs)
