"""`models.build(..., dropout=p)`: where dropout sits, and that nothing else changes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import dendrite_kernels as dk
from dendrite_kernels.models import build, count_dense_parameters, count_parameters
from tests import oracle
from tests.nn.test_models import KINDS, make

P = 0.4


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_follows_every_activation(kind: str) -> None:
    names = [type(m).__name__ for m in make(kind, 2, seed=0, dropout=P)]
    linear = names[::3]
    assert names[1::3] == ["LeakyReLU"] * 4
    assert names[2::3] == ["Dropout"] * 4
    assert len(linear) == 5
    assert set(linear) <= {"SparseLinear", "Linear"}
    assert {m.p for m in make(kind, dropout=P) if isinstance(m, nn.Dropout)} == {P}


@pytest.mark.parametrize("kind", KINDS)
def test_counts_do_not_change(kind: str) -> None:
    plain, model = make(kind, 2, seed=0), make(kind, 2, seed=0, dropout=P)
    assert count_parameters(model) == count_parameters(plain)
    assert count_dense_parameters(model) == count_dense_parameters(plain)


@pytest.mark.parametrize("kind", ["dANN-R", "dANN-LRF", "pdANN", "sANN", "vANN"])
@pytest.mark.parametrize("init", ["paper", "fan_in"])
def test_the_network_is_the_same_without_training(backend: str, kind: str, init: Any) -> None:
    """The same connectivity, and initial weights of the same scale."""
    models = []
    for dropout in (0.0, P):
        torch.manual_seed(0)
        models.append(make(kind, 2, seed=0, init=init, dropout=dropout).eval())
    plain, model = models
    ours, theirs = linear_weights(plain), linear_weights(model)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert 0.5 < a.abs().max() / b.abs().max() < 2
        with torch.no_grad():
            b.copy_(a)
    x = torch.randn(5, 56)
    assert oracle.relative_error(model(x), plain(x)) < 1e-6


def linear_weights(model: nn.Module) -> list[torch.Tensor]:
    """From the first synapses to the last output; synapses without their zeros."""
    return [
        p.flatten() for name, p in model.named_parameters() if name.endswith("weight")
    ]  # biases are 0


def test_training_drops_and_evaluation_does_not(backend: str) -> None:
    model, x = make("dANN-R", seed=0, dropout=P), torch.randn(5, 56)
    assert not torch.equal(model(x), model(x))
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    assert torch.equal(model(x), model(x))


def test_files_take_dropout(tmp_path: Any) -> None:
    model, x = make("dANN-R", seed=0, dropout=P).eval(), torch.randn(5, 56)
    dk.save(model, tmp_path / "model")
    assert torch.equal(dk.load(tmp_path / "model")(x), model(x))


def test_without_dropout_keys_are_as_ever() -> None:
    assert list(make("dANN-R", dropout=0.0).state_dict()) == [
        "0.synapse_weight", "0.dendrite_bias", "0.cable_weight", "0.soma_bias", "0._extra_state",
        "1.weight", "1.bias",
    ]  # fmt: skip
    assert list(make("vANN").state_dict())[::2] == ["0.weight", "2.weight", "4.weight"]


@pytest.mark.parametrize("dropout", [-0.1, 1.0, math.nan])
def test_wrong_dropout(dropout: float) -> None:
    with pytest.raises(ValueError, match="Expected dropout from 0 to less than 1, got"):
        build("dANN-R", (8, 7), 12, 3, 9, 5, dropout=dropout)
