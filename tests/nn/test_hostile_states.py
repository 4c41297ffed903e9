"""Hostile states: refused by an error that is documented, and the layer stays as it was."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dendrite_kernels as dk
from dendrite_kernels import Connectivity, plasticity
from tests.networks import small
from tests.nn.test_nn import assert_same

# What may stand in the place of a tensor [n] of float32.
VALUES: dict[str, Callable[[Tensor], Any]] = {
    "nothing": lambda t: None,
    "a list": lambda t: t.tolist(),
    "an array": lambda t: t.numpy(),
    "on meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "one too few": lambda t: t[1:],
    "of two dimensions": lambda t: t[None],
}


def layer() -> dk.DendriticLayer:
    return dk.DendriticLayer(small())


def rewired() -> dk.DendriticLayer:
    """The same counts of synapses, on other inputs."""
    return dk.DendriticLayer(Connectivity.from_csr([0, 2, 2, 5], [0, 3, 0, 1, 3], 4, [0, 1, 3]))


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name", dk.DendriticLayer.PARAMETERS)
def test_nothing_is_half_adopted(name: str, value: str) -> None:
    target, state = layer(), dict(rewired().state_dict())
    before = copy.deepcopy(target)
    state[name] = VALUES[value](state[name])
    with pytest.raises(ValueError, match="Expected"):
        plasticity.adopt(target, state)
    assert target.connectivity == before.connectivity
    assert_same(target, before)


@pytest.mark.parametrize("value", VALUES)
def test_no_layer_of_weights_without_numbers(value: str) -> None:
    state = dict(layer().state_dict())
    state["synapse_weight"] = VALUES[value](state["synapse_weight"])
    if value == "on meta":  # a layer on meta then
        return
    with pytest.raises(ValueError, match="Expected"):
        dk.DendriticLayer.from_state_dict(state)


INDICES = {name: getattr(small(), name) for name in ("crow_indices", "col_indices", "soma_ptr")} | {
    "in_features": torch.tensor(4)
}
EXTRA: dict[str, Any] = {
    "inputs without end": INDICES | {"in_features": torch.tensor(float("inf"))},
    "many inputs": INDICES | {"in_features": 2**70},
    "two numbers of inputs": INDICES | {"in_features": torch.tensor([4, 4])},
    "inputs as a float": INDICES | {"in_features": 4.0},
    "falling pointers": INDICES | {"crow_indices": torch.tensor([0, 3, 2, 5])},
    "columns outside": INDICES | {"col_indices": torch.tensor([1, 3, 0, 1, 4])},
    "columns missing": {k: v for k, v in INDICES.items() if k != "col_indices"},
    "a sparse tensor": layer().get_extra_state().to_sparse(),
    "a text": "text",
    "no bytes": torch.empty(0, dtype=torch.uint8),
}


@pytest.mark.parametrize("extra", EXTRA.values(), ids=EXTRA)
def test_hostile_connectivities(extra: Any) -> None:
    target = layer()
    before = copy.deepcopy(target)
    state = {**rewired().state_dict(), "_extra_state": extra}
    with pytest.raises(RuntimeError, match=r"Error\(s\) in loading"):
        target.load_state_dict(state)
    with pytest.raises((TypeError, ValueError), match="Expected"):
        plasticity.adopt(target, state)
    assert target.connectivity == before.connectivity
    assert_same(target, before)
    for made in (dk.DendriticLayer, dk.DendriticTree):
        hostile = {"cable.0": torch.zeros(3), **state}
        with pytest.raises(ValueError, match="Expected"):
            made.from_state_dict(hostile)


def test_states_of_other_keys() -> None:
    for made in (dk.DendriticLayer, dk.SparseLinear, dk.DendriticTree):
        with pytest.raises(ValueError, match="Expected a state with"):
            made.from_state_dict({1: torch.zeros(2), "a": 3})  # type: ignore[dict-item]


@pytest.mark.parametrize("shape", [[2**31 - 1], [2**15, 2**15]])
def test_a_small_file_makes_no_large_layer(shape: list[int]) -> None:
    """Files of torch hold strides: one number may stand for 2**31."""
    dense = dk.connectivity.all_to_all(1, 1, 1)
    weight = torch.zeros(1).expand(shape)
    packed = dk.packing.pack(dense)
    fields = packed.view(torch.int64)
    fields[3], fields[4], fields[5], fields[6] = 1, weight.numel(), weight.numel(), weight.numel()
    fields[7], fields[8] = 1, 1
    dk.packing._seal(packed.numpy())
    file = io.BytesIO()
    torch.save({"weight": weight, "_extra_state": packed}, file)
    assert len(file.getvalue()) < 5000
    file.seek(0)
    state = torch.load(file, weights_only=True)
    with pytest.raises(ValueError, match="a number for each synapse"):
        dk.SparseLinear.from_state_dict(state)
    tree = {"synapse_weight": weight, "cable.0": torch.zeros(1), "_extra_state": packed}
    with pytest.raises(ValueError, match="a number for each synapse"):
        dk.DendriticTree.from_state_dict(tree)
    assert np.prod(shape) == weight.numel()
