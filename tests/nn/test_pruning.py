"""Fewer synapses: `prune`, and layers of ours under torch.nn.utils.prune."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import dendrite_kernels as dk
from dendrite_kernels import Connectivity, interop
from tests import oracle
from tests.networks import ragged

KINDS = pytest.mark.parametrize("kind", [dk.DendriticLayer, dk.SparseLinear])


def layer(kind: Any, **options: Any) -> Any:
    made = kind(ragged(61, 40, [0, 0, 1, 7, 7, 36, 40]), **options)
    for p in made.parameters():
        nn.init.normal_(p)
    return made


def weights(made: Any) -> torch.Tensor:
    weight: torch.Tensor = getattr(made, made.WEIGHT)
    return weight


def rows(made: Any) -> list[dict[int, float]]:
    """Of each dendrite: the weight of every input that it sees."""
    c: Connectivity = made.connectivity
    pairs = list(zip(c.col_indices.tolist(), weights(made).tolist(), strict=True))
    crow = c.crow_indices.tolist()
    return [dict(pairs[a:b]) for a, b in itertools.pairwise(crow)]


@KINDS
@pytest.mark.parametrize("amount", [0, 1, 3, 1000, 0.0, 0.25, 0.5, 0.9, 1.0])
def test_each_dendrite_loses_its_smallest_weights(kind: Any, amount: float) -> None:
    before = layer(kind)
    after = before.prune(amount)
    assert after.connectivity.soma_ptr.equal(before.connectivity.soma_ptr)
    for old, new in zip(rows(before), rows(after), strict=True):
        going = min(amount, len(old)) if isinstance(amount, int) else round(amount * len(old))
        largest = sorted(old, key=lambda j: -abs(old[j]))[: len(old) - int(going)]
        assert new == {j: old[j] for j in largest}


@KINDS
def test_pruned_layer_is_the_layer_with_zeros(backend: str, kind: Any) -> None:
    before = layer(kind, dtype=torch.float64)
    after, x = before.prune(0.5), torch.randn(5, 61).double()
    kept = after.connectivity.to_mask()[before.connectivity.to_mask()]
    with torch.no_grad():
        weights(before)[~kept] = 0
    assert oracle.relative_error(after(x), before(x)) < 1e-13
    after(x).sum().backward()
    assert all(p.grad is not None for p in after.parameters())


@KINDS
def test_the_rest_of_the_layer_stays(kind: Any) -> None:
    c = dk.connectivity.local_receptive_fields((5, 6), 4, 3, 8, seed=0)
    special = {"activation": "tanh"} if kind is dk.DendriticLayer else {"negative_slope": 0.3}
    before = kind(c, bias=False, init="paper", precision="bf16", dtype=torch.float16, **special)
    weights(before).requires_grad_(False)
    after = before.eval().prune(2)
    assert all(getattr(after, name) == getattr(before, name) for name in kind.OPTIONS)
    assert after.connectivity.in_shape == (5, 6)
    assert not after.training
    assert {n: (p.dtype, p.requires_grad) for n, p in after.named_parameters()} == {
        n: (p.dtype, p.requires_grad) for n, p in before.named_parameters()
    }
    before_values = [p.clone() for p in after.parameters()]
    for p in before.parameters():
        nn.init.ones_(p)
    assert all(map(torch.equal, after.parameters(), before_values))


@KINDS
def test_labels_stay(kind: Any) -> None:
    labels = ["a", "b", "c"], ["left", "right"], ["out"]
    c = Connectivity([0, 2, 4], [0, 2, 1, 2], [0, 2], 3, labels=labels)
    assert kind(c).prune(1).connectivity.labels == c.labels
    pruned: Any = prune.l1_unstructured(kind(c), kind.WEIGHT, 2)
    assert interop.from_pruned(pruned).connectivity.labels == c.labels


def test_of_equal_weights_the_later_go_first() -> None:
    before = dk.SparseLinear(Connectivity.from_csr([0, 4], [0, 2, 5, 6], 8))
    nn.init.ones_(before.weight)
    assert before.prune(2).connectivity.col_indices.tolist() == [0, 2]


@KINDS
def test_torch_prune(backend: str, kind: Any) -> None:
    before: Any = layer(kind)
    prune.l1_unstructured(before, kind.WEIGHT, amount=0.7)
    prune.random_unstructured(before, kind.BIAS, amount=0.5)
    getattr(before, f"{kind.BIAS}_orig").requires_grad_(False)
    after, x = interop.from_pruned(before), torch.randn(5, 61)
    assert after.connectivity.nnz == int(before.get_buffer(f"{kind.WEIGHT}_mask").sum())
    assert oracle.relative_error(after(x), before(x)) < 1e-6
    assert {name: p.requires_grad for name, p in after.named_parameters()} == {
        name: name != kind.BIAS for name in kind.PARAMETERS
    }
    with torch.no_grad():
        before.get_parameter(f"{kind.WEIGHT}_orig").mul_(2)
        after = interop.from_pruned(before)  # the weight itself lags behind until its next forward
    assert oracle.relative_error(after(x), before(x)) < 1e-6
    assert weights(after).requires_grad
    whole = layer(kind)
    assert interop.from_pruned(whole).connectivity == whole.connectivity


def test_frozen_linear_layers_stay_frozen() -> None:
    linear: Any = nn.Linear(20, 12).eval()
    linear.weight.requires_grad_(False)
    prune.l1_unstructured(linear, "weight", amount=0.8)
    after = interop.from_pruned(linear)
    assert [p.requires_grad for p in after.parameters()] == [False, True]
    assert not after.training


@KINDS
@pytest.mark.parametrize(
    ("amount", "error", "message"),
    [
        (-1, ValueError, "an amount >= 0 of synapses, got -1"),
        (1.5, ValueError, "from 0 to 1 of the synapses, got 1.5"),
        (float("nan"), ValueError, "from 0 to 1 of the synapses, got nan"),
        (True, TypeError, "int or float, got bool"),
        ("half", TypeError, "int or float, got str"),
    ],
)
def test_amounts(kind: Any, amount: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"Expected .*{message}"):
        layer(kind).prune(amount)


@KINDS
def test_other_parameters_are_refused(kind: Any) -> None:
    torchs: Any = prune.identity(layer(kind), kind.WEIGHT)
    parametrized = layer(kind)
    parametrize.register_parametrization(parametrized, kind.WEIGHT, nn.Softplus(), unsafe=True)
    for other in (torchs, parametrized):
        with pytest.raises(ValueError, match="Expected a whole layer with parameters"):
            other.prune(0.5)
    with pytest.raises(ValueError, match="Expected a layer without parametrizations"):
        interop.from_pruned(parametrized)


@KINDS
def test_numbers_of_numpy(kind: Any) -> None:
    before = layer(kind)
    for amount, same in ((np.int64(3), 3), (np.uint8(3), 3), (np.float32(0.5), 0.5)):
        assert before.prune(amount).connectivity == before.prune(same).connectivity
    assert before.prune(2**70).connectivity.nnz == 0
    with pytest.raises(TypeError, match="Expected an amount of type int or float, got bool"):
        before.prune(np.bool_(True))


@KINDS
def test_nan_is_not_the_smallest_weight(kind: Any) -> None:
    before = layer(kind)
    with torch.no_grad():
        weights(before)[3] = torch.nan
    for amount in (0, 2, 0.5):
        with pytest.raises(ValueError, match="Expected weights that are numbers, got 1 NaN"):
            before.prune(amount)
    with torch.no_grad():
        weights(before)[3] = -torch.inf
    assert before.prune(0.5).get_parameter(kind.WEIGHT).isinf().sum() == 1


@KINDS
def test_layers_without_values_are_refused(kind: Any) -> None:
    for prune_it in (interop.from_pruned, lambda made: made.prune(0.5)):
        with pytest.raises(ValueError, match=r"Expected .*weight to be a dense tensor with values"):
            prune_it(layer(kind, device="meta"))
    linear = nn.Linear(3, 3, device="meta")
    with pytest.raises(ValueError, match=r"Expected weight to be a dense tensor .* got a meta one"):
        interop.from_pruned(linear)


def test_dendrites_of_a_pruned_layer_are_those_of_its_forward() -> None:
    before = layer(dk.DendriticLayer, soma_activation="identity")
    prune.l1_unstructured(before, "synapse_weight", 0.5)
    x = torch.randn(5, 61)
    before(x).sum().backward()
    torch.optim.SGD(before.parameters(), lr=0.1).step()
    stale = before.dendrites(x)
    stale.sum().backward()  # reaches the weights
    before(x)
    assert torch.equal(before.dendrites(x), stale)


def test_a_bias_of_another_dtype_is_refused() -> None:
    linear = torch.nn.Linear(6, 4)
    linear.bias = torch.nn.Parameter(linear.bias.detach().double())
    with pytest.raises(TypeError, match=r"Expected a bias of dtype torch\.float32 like weight"):
        dk.interop.from_pruned(linear)
