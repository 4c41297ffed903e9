"""Rewiring against a masked dense twin: which synapses move, what moves along, what is refused."""

from __future__ import annotations

import copy
import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize, prune

import dendrite_kernels as dk
from dendrite_kernels import Connectivity, plasticity
from dendrite_kernels.plasticity import Rewirer, adopt, candidates, rewire
from tests import oracle
from tests.networks import ragged
from tests.nn.test_distributed import launch

KINDS = pytest.mark.parametrize("kind", [dk.DendriticLayer, dk.SparseLinear])
N, BATCH = 61, 24


def network(constant: bool = True, seed: int = 0) -> Connectivity:
    if not constant:
        return ragged(N, 40, [0, 0, 1, 7, 7, 36, 40], seed)
    return dk.connectivity.random(N, 6, 4, 8, constant_fan_in=True, seed=seed)


def made(kind: Any, constant: bool = True, **options: Any) -> Any:
    layer = kind(network(constant), dtype=torch.float64, **options)
    for p in layer.parameters():
        nn.init.normal_(p)
    return layer


def weight_of(layer: Any) -> torch.Tensor:
    weight: torch.Tensor = layer.get_parameter(layer.WEIGHT)
    return weight


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trained(layer: nn.Module, optimizer: Any, steps: int = 3, seed: int = 1) -> None:
    for i in range(steps):
        x = oracle.drawn(BATCH, N, seed=seed + i, dtype=torch.float64)
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()


def by_input(c: Connectivity, values: torch.Tensor) -> list[dict[int, float]]:
    """Of each dendrite: the value of every input that it sees."""
    pairs = list(zip(c.col_indices.tolist(), values.tolist(), strict=True))
    crow = c.crow_indices.tolist()
    return [dict(pairs[a:b]) for a, b in itertools.pairwise(crow)]


class Dense(nn.Module):
    """Written from the equations: masked matrices, the mask and the weights of a layer."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        c = layer.connectivity
        self.mask = c.to_mask()
        weight = torch.zeros(self.mask.shape, dtype=torch.float64)
        weight[self.mask] = weight_of(layer).detach()
        self.weight = nn.Parameter(weight)
        rest = {n: p for n, p in layer.named_parameters() if n != layer.WEIGHT}
        self.rest = nn.ParameterDict({n: p.detach().clone() for n, p in rest.items()})
        self.owner = torch.zeros(c.num_somas, c.num_dendrites, dtype=torch.float64)
        for s in range(c.num_somas):
            self.owner[s, int(c.soma_ptr[s]) : int(c.soma_ptr[s + 1])] = 1

    def forward(self, x: torch.Tensor, everywhere: bool = False) -> torch.Tensor:
        """`everywhere`: the gradient of the matrix tells of missing synapses, too."""
        weight = self.weight if everywhere else self.weight * self.mask
        if "bias" in self.rest:
            return x @ weight.T + self.rest["bias"]
        a = oracle.leaky_relu(x @ weight.T + self.rest["dendrite_bias"], 0.1)
        v = a @ (self.owner * self.rest["cable_weight"]).T + self.rest["soma_bias"]
        return oracle.leaky_relu(v, 0.1)


@KINDS
@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("fraction", [0.01, 0.3, 1.0])
def test_weak_synapses_go_and_the_rest_stays(kind: Any, constant: bool, fraction: float) -> None:
    layer = made(kind, constant)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2, amsgrad=True)
    trained(layer, optimizer)
    c, weight, state = layer.connectivity, weight_of(layer), optimizer.state[weight_of(layer)]
    names = "exp_avg", "exp_avg_sq", "max_exp_avg_sq"
    assert weight.grad is not None
    before = [by_input(c, t) for t in (weight, weight.grad, *(state[n] for n in names))]
    others = {n: p.clone() for n, p in layer.named_parameters() if n != layer.WEIGHT}
    new = rewire(layer, optimizer, fraction=fraction, generator=generator())
    assert layer.connectivity is new
    assert layer.get_parameter(layer.WEIGHT) is weight
    assert new.crow_indices.equal(c.crow_indices)  # a Connectivity is sorted and without duplicates
    assert new.soma_ptr.equal(c.soma_ptr)
    after = [by_input(new, t) for t in (weight, weight.grad, *(state[n] for n in names))]
    assert state["step"] == 3
    for r, old in enumerate(before[0]):
        count = min(max(1, round(fraction * len(old))), len(old), N - len(old))
        dropped = set(sorted(old, key=lambda i: abs(old[i]))[:count])
        now = set(after[0][r])
        assert set(old) - now == dropped
        for values, was in zip(after, before, strict=True):
            assert all(values[r][i] == was[r][i] for i in now & set(old))
            assert all(values[r][i] == 0 for i in now - set(old))
    assert all(p.equal(others[n]) for n, p in layer.named_parameters() if n != layer.WEIGHT)


@KINDS
@pytest.mark.parametrize("constant", [True, False])
def test_candidates_change_no_output_and_have_the_dense_gradients(
    kind: Any, constant: bool
) -> None:
    layer = made(kind, constant)
    union, is_new = candidates(layer.connectivity, 9, generator=generator())
    mask, old = union.to_mask(), layer.connectivity.to_mask()
    assert torch.equal(mask[mask], torch.ones(union.nnz, dtype=torch.bool))
    assert torch.equal(old[mask], ~is_new)
    assert torch.equal((mask & ~old).sum(1), (N - old.sum(1)).clamp(max=9))
    wide = kind(union, dtype=torch.float64)
    with torch.no_grad():
        for name, p in wide.named_parameters():
            if name != layer.WEIGHT:
                p.copy_(layer.get_parameter(name))
        weight_of(wide)[is_new] = 0
        weight_of(wide)[~is_new] = weight_of(layer)
    x, twin = oracle.drawn(BATCH, N, seed=3, dtype=torch.float64), Dense(layer)
    target = oracle.drawn(*layer(x).shape, seed=4, dtype=torch.float64)
    assert oracle.relative_error(wide(x), layer(x)) < 1e-13
    (wide(x) * target).sum().backward()
    (twin(x, everywhere=True) * target).sum().backward()
    assert twin.weight.grad is not None
    assert oracle.relative_error(weight_of(wide).grad, twin.weight.grad[mask]) < 1e-12


@KINDS
@pytest.mark.parametrize("constant", [True, False])
def test_rigl_grows_where_the_dense_gradient_is_largest(kind: Any, constant: bool) -> None:
    """With all inputs as candidates, over two backward passes that make one step."""
    layer = made(kind, constant)
    optimizer = torch.optim.SGD(layer.parameters(), 0.01)
    rewirer = Rewirer(
        layer, optimizer, rule="rigl", every=2, fraction=0.5, end=10, candidates=N, seed=0
    )
    trained(layer, optimizer, 1)
    assert not rewirer.step()
    twin, old = Dense(layer), layer.connectivity.to_mask()
    optimizer.zero_grad()
    for i in range(2):
        x = oracle.drawn(BATCH, N, seed=5 + i, dtype=torch.float64)
        layer(x).square().mean().backward()
        twin(x, everywhere=True).square().mean().backward()
    optimizer.step()
    weight = weight_of(layer).detach().clone()
    assert rewirer.step()
    new = layer.connectivity.to_mask()
    assert twin.weight.grad is not None
    score = twin.weight.grad.abs().masked_fill(old, -1)
    assert score.max() > 0
    f = 0.25 * (1 + np.cos(np.pi * 2 / 10))
    for r in range(len(old)):
        k = int(old[r].sum())
        count = min(max(1, round(f * k)), k)
        grown = set((new[r] & ~old[r]).nonzero().flatten().tolist())
        assert len(grown) == count
        best = score[r].topk(count).values.min() if count else 0.0
        assert all(score[r, i] >= best * (1 - 1e-9) for i in grown)
    assert np.isin(weight_of(layer)[weight_of(layer) != 0].tolist(), weight.tolist()).all()


@KINDS
@pytest.mark.parametrize("rule", ["set", "rigl"])
def test_training_equals_a_fresh_twin_after_each_rewiring(
    backend: str, kind: Any, rule: Any
) -> None:
    layer = made(kind, False)
    optimizer = torch.optim.SGD(layer.parameters(), 0.02)
    rewirer = Rewirer(layer, optimizer, rule=rule, every=3, end=8, seed=0)
    twin = Dense(layer)
    plain = torch.optim.SGD(twin.parameters(), 0.02)
    structures = {layer.connectivity}
    for i in range(9):
        trained(layer, optimizer, 1, seed=i)
        trained(twin, plain, 1, seed=i)
        dense = Dense(layer)
        assert oracle.relative_error(twin.weight * twin.mask, dense.weight) < 1e-12
        if rewirer.step():
            structures.add(layer.connectivity)
            twin = Dense(layer)
            plain = torch.optim.SGD(twin.parameters(), 0.02)
    assert len(structures) == 3


@pytest.mark.parametrize(
    "optimizer",
    ["Adadelta", "Adagrad", "Adam", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"],
)
def test_state_of_every_optimizer_moves(optimizer: str) -> None:
    options = {"momentum": 0.9} if optimizer == "SGD" else {}
    layer = made(dk.SparseLinear)
    own = getattr(torch.optim, optimizer)(layer.parameters(), lr=1e-2, **options)
    trained(layer, own)
    state, c = own.state[layer.weight], layer.connectivity
    shaped = [n for n, t in state.items() if torch.is_tensor(t) and t.shape == layer.weight.shape]
    assert shaped
    before = {name: by_input(c, state[name]) for name in shaped}
    rewire(layer, own, fraction=0.3, generator=generator())
    for name in shaped:
        for now, was in zip(by_input(layer.connectivity, state[name]), before[name], strict=True):
            assert all(value == was.get(i, 0) for i, value in now.items())
    trained(layer, own)


def test_steps_in_backward() -> None:
    """The same as with one optimizer that steps afterwards."""
    results = []
    for inside in (False, True):
        torch.manual_seed(0)
        layer = made(dk.DendriticLayer)
        ways: Any
        if inside:
            ways = dk.optim.StepInBackward(layer.parameters(), lambda p: torch.optim.Adam(p, 1e-2))
        else:
            ways = torch.optim.Adam(layer.parameters(), 1e-2)
        rewirer = Rewirer(layer, ways, rule="rigl", every=3, end=10, seed=0)
        for i in range(7):
            x = oracle.drawn(BATCH, N, seed=i, dtype=torch.float64)
            layer.zero_grad()
            layer(x).square().mean().backward()
            if not inside:
                ways.step()
            rewirer.step()
        results.append((layer.connectivity, layer.synapse_weight.detach()))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_backward_through_what_was_rewired_is_refused() -> None:
    layer = made(dk.DendriticLayer)
    for _ in range(2):  # the first call goes another way
        y = layer(oracle.drawn(BATCH, N, seed=0, dtype=torch.float64))
        rewire(layer, fraction=0.3, generator=generator())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_fraction_zero_and_full_dendrites_change_nothing() -> None:
    layer = made(dk.SparseLinear)
    c = layer.connectivity
    assert rewire(layer, fraction=0) is c
    full = dk.SparseLinear(dk.connectivity.all_to_all(5, 2, 3))
    c = full.connectivity
    assert rewire(full, fraction=0.5) is c
    union, is_new = candidates(c, 3)
    assert union == c
    assert not is_new.any()


def test_growth_stays_in_its_region_and_is_uniform_there() -> None:
    fields = dk.connectivity.local_receptive_fields((9, 7), 3000, 1, 9, seed=0)
    region = dk.connectivity.local_receptive_fields((9, 7), 3000, 1, 25, seed=0)
    assert not (fields.to_mask() & ~region.to_mask()).any()  # the seed draws the centres first
    layer = dk.SparseLinear(fields)
    new = rewire(layer, fraction=0.34, region=region, generator=generator())
    assert not (new.to_mask() & ~region.to_mask()).any()
    assert (new.in_shape, new.fan_in) == ((9, 7), 9)
    union, _ = candidates(fields, 4, region=region, generator=generator())
    assert not (union.to_mask() & ~region.to_mask()).any()

    c = Connectivity.from_csr([0, 2], [1, 5], 8)
    seen = torch.zeros(8)
    for seed in range(3000):
        seen += candidates(c, 2, generator=generator(seed))[0].to_mask()[0]
    grown = torch.tensor([0, 2, 3, 4, 6, 7])
    assert ((seen[grown] - 1000).abs() < 120).all()  # 4.6 standard deviations


def test_zero_scores_are_drawn_not_taken_in_order() -> None:
    c = Connectivity.from_csr(range(301), [0] * 300, 50)
    layer = dk.SparseLinear(c)
    region, _ = candidates(c, 49)
    scores = torch.zeros(region.nnz)
    new = rewire(layer, fraction=1.0, grow=scores, region=region, generator=generator())
    assert 20 < new.col_indices.double().mean() < 30


def test_same_seed_same_result_and_labels_stay() -> None:
    c = dk.Connectivity.from_edges(
        ["a", "b", "c", "a"], ["d0", "d0", "d1", "d2"], ["s", "s", "s", "t"], inputs=list("abcdef")
    )
    results = []
    for seed in (0, 0, 1):
        layer = dk.DendriticLayer(c)
        with torch.no_grad():
            layer.synapse_weight.copy_(torch.arange(4))
        results.append(rewire(layer, fraction=1.0, generator=generator(seed)))
    assert results[0] == results[1] != results[2]
    assert results[0].labels == c.labels
    assert c.col_indices.tolist() == [0, 1, 2, 0]


def test_copies_and_layers_on_the_same_connectivity_are_left_alone() -> None:
    layer, x = made(dk.DendriticLayer), oracle.drawn(BATCH, N, seed=0, dtype=torch.float64)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    rewirer = Rewirer(layer, optimizer, rule="rigl", every=1, end=10, seed=0)
    twin, other = copy.deepcopy(layer), made(dk.SparseLinear)
    object.__setattr__(other, "connectivity", layer.connectivity)
    y, z = twin(x), other(x)
    trained(layer, optimizer, 1)
    assert rewirer.step()
    assert layer.connectivity != twin.connectivity
    assert torch.equal(twin(x), y)
    assert torch.equal(other(x), z)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert again.connectivity == layer.connectivity
    assert torch.equal(again(x), layer(x))


def test_frozen_weights_stay_frozen() -> None:
    layer = made(dk.SparseLinear)
    layer.weight.requires_grad_(False)
    c = layer.connectivity
    assert rewire(layer, fraction=0.3) != c
    assert not layer.weight.requires_grad


def test_a_run_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    def parts() -> Any:
        torch.manual_seed(0)
        layer = made(dk.DendriticLayer)
        optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
        return layer, optimizer, Rewirer(layer, optimizer, rule="rigl", every=3, end=20, seed=7)

    def run(layer: Any, optimizer: Any, rewirer: Any, steps: range) -> None:
        for i in steps:
            trained(layer, optimizer, 1, seed=i)
            rewirer.step()

    whole = parts()
    run(*whole, range(12))
    first = parts()
    run(*first, range(5))
    states = [copy.deepcopy(part.state_dict()) for part in first]
    second = parts()
    with pytest.raises(RuntimeError, match="Expected a state of"):
        second[0].load_state_dict(states[0])
    adopt(second[0], states[0])
    for part, state in zip(second[1:], states[1:], strict=True):
        part.load_state_dict(state)
    run(*second, range(5, 12))
    assert second[0].connectivity == whole[0].connectivity
    assert torch.equal(second[0].synapse_weight, whole[0].synapse_weight)
    dk.save(second[0], tmp_path / "layer")
    again: Any = dk.load(tmp_path / "layer")
    assert again.connectivity == whole[0].connectivity
    assert torch.equal(again.synapse_weight, whole[0].synapse_weight)


def test_adopt_takes_a_rewired_structure_and_no_other() -> None:
    model: Any = nn.Sequential(made(dk.DendriticLayer), nn.Linear(6, 2).double())
    state = copy.deepcopy(model.state_dict())
    old = model[0].connectivity
    rewire(model[0], fraction=0.3)
    new, weight = model[0].connectivity, model[0].synapse_weight.detach().clone()
    adopt(model[0], state, "0.")
    model.load_state_dict(state)
    assert model[0].connectivity == old != new

    def refused(state: Any, match: str) -> None:
        c, values = model[0].connectivity, copy.deepcopy(model[0].state_dict())
        with pytest.raises(ValueError, match=match):
            adopt(model[0], state)
        assert model[0].connectivity is c
        assert all(torch.equal(v, values[k]) for k, v in model[0].state_dict().items())

    refused(state, "in the state")
    own = dict(model[0].state_dict())
    refused({k: v for k, v in own.items() if k != "_extra_state"}, "in the state")
    refused(own | {"synapse_weight": weight[:-1]}, "in the state")
    refused(own | {"_extra_state": own["_extra_state"][:-9]}, "Expected")
    rows = dk.connectivity.random(N, 6, 4, 8, seed=0)
    refused(made_on(rows).state_dict(), "Expected a state of this layer rewired. Expected dendrite")
    somas = Connectivity(old.crow_indices, old.col_indices, range(0, 25, 4), N)
    assert somas == old
    other = Connectivity(old.crow_indices, old.col_indices, [0, 1, *range(8, 25, 4)], N)
    refused(made_on(other).state_dict(), "Expected soma 0")


def made_on(c: Connectivity) -> Any:
    return dk.DendriticLayer(c, dtype=torch.float64)


def test_other_layers_and_optimizers_are_refused_unchanged() -> None:
    def refused(match: str, layer: Any, optimizer: Any = None, **options: Any) -> None:
        before = getattr(layer, "connectivity", None)
        values = [p.detach().clone() for p in layer.parameters()]
        with pytest.raises((TypeError, ValueError), match=match):
            rewire(layer, optimizer, **{"fraction": 0.3, **options})
        assert getattr(layer, "connectivity", None) is before
        for a, b in zip(values, layer.parameters(), strict=True):
            assert a.is_meta or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)

    layer, other = made(dk.DendriticLayer), made(dk.DendriticLayer)
    adam = torch.optim.Adam(other.parameters())
    step = dk.optim.StepInBackward(other.parameters(), torch.optim.Adam)
    refused("Expected a DendriticLayer or SparseLinear, got Linear", nn.Linear(2, 2))
    refused("got one of others", layer, adam)
    refused("got one of others", layer, step)
    refused("got LBFGS", layer, torch.optim.LBFGS(layer.parameters()))
    refused("Expected an optimizer of torch.optim or StepInBackward, got list", layer, [])
    for fraction in (-0.1, 1.1, float("nan")):
        refused("Expected a fraction from 0 to 1", layer, fraction=fraction)
    region, _ = candidates(layer.connectivity, 5)
    refused("Expected grow='random' or scores, got 'set'", layer, grow="set")
    refused("Expected scores to be a tensor, got float", layer, grow=0.5)
    refused("Expected a region beside scores", layer, grow=torch.ones(3))
    refused("Expected scores of shape", layer, grow=torch.ones(3), region=region)
    wrong = torch.full((region.nnz,), float("nan"))
    refused("Expected scores >= 0", layer, grow=wrong, region=region)
    refused("Expected scores >= 0", layer, grow=-torch.ones(region.nnz), region=region)
    refused("Expected a Connectivity as region, got Tensor", layer, region=torch.ones(3))
    small = dk.connectivity.random(N, 5, 4, 8, seed=0)
    refused("Expected a region of 24 dendrites on 61 inputs, got 20 on 61", layer, region=small)
    refused("got a meta one", dk.SparseLinear(layer.connectivity, device="meta"))
    signed = made(dk.SparseLinear)
    parametrize.register_parametrization(
        signed, "weight", dk.Signed(torch.ones(signed.weight.numel()))
    )
    refused("Expected a whole layer with parameters", signed)
    pruned = prune.random_unstructured(made(dk.SparseLinear), "weight", 0.5)
    refused("Expected a whole layer with parameters", pruned)
    with torch.no_grad():
        layer.synapse_weight[5] = float("nan")
    refused("Expected weights that are numbers, got 1 NaN", layer)
    with pytest.raises(ValueError, match="Expected count from 1"):
        candidates(layer.connectivity, 0)


def test_rewirers_refuse_what_they_cannot_do() -> None:
    layer = made(dk.SparseLinear)
    sgd = torch.optim.SGD(layer.parameters(), 0.1)
    wrong = {"rule": "deep", "every": 0, "fraction": 2.0, "end": 0, "candidates": 0}
    for name, value in wrong.items():
        options: Any = {"end": 10, "seed": 0, name: value}
        with pytest.raises(ValueError, match=f"Expected.* {name}"):
            Rewirer(layer, sgd, **options)
    assert not layer._forward_hooks
    rewirer = Rewirer(layer, sgd, rule="rigl", every=1, end=10, seed=0)
    c = layer.connectivity
    layer(torch.ones(2, N).double())  # forward alone
    with pytest.raises(RuntimeError, match="Expected a backward pass through the layer"):
        rewirer.step()
    x = torch.full((2, N), float("inf")).double()
    layer(x).sum().backward()
    assert not rewirer.step()
    assert layer.connectivity is c


def test_a_rewirer_is_not_copied_and_can_be_removed() -> None:
    layer = made(dk.SparseLinear)
    sgd = torch.optim.SGD(layer.parameters(), 0.1)
    with pytest.raises(TypeError, match="NoneType"):
        Rewirer(layer, sgd, end=9, seed=None)  # type: ignore[arg-type]
    rewirer = Rewirer(layer, sgd, rule="rigl", every=1, end=10, seed=0)
    with pytest.raises(TypeError, match="Expected no copy of a Rewirer"):
        copy.deepcopy(rewirer)
    rewirer.remove()
    layer(torch.ones(2, N).double()).sum().backward()
    assert not layer._forward_hooks
    assert not rewirer.step()


@pytest.mark.parametrize("gated", [False, True])
@KINDS
def test_candidates_in_mixed_precision(kind: Any, gated: bool) -> None:
    """Backward runs outside of autocast, and x of a later layer has the lower precision."""
    if gated and kind is dk.SparseLinear:
        pytest.skip("has no gates")
    layer = kind(network())
    rewirer = Rewirer(
        layer, torch.optim.SGD(layer.parameters(), 0.1), rule="rigl", end=10, every=1, seed=0
    )
    x = torch.randn(BATCH, N)
    named = {"gate": torch.rand(layer.connectivity.num_dendrites).bfloat16()} if gated else {}
    with torch.autocast("cpu", torch.bfloat16):
        loss = layer(x.bfloat16(), **named).float().square().mean()
    loss.backward()
    found, weight = rewirer._scores, layer.get_parameter(layer.WEIGHT)
    assert found is not None
    assert rewirer._union is not None
    is_new = rewirer._union[2]
    torch.testing.assert_close(found[~is_new], weight.grad, rtol=1e-2, atol=1e-4)
    assert rewirer.step()


def test_candidates_of_a_call_with_other_weights() -> None:
    layer = made(dk.SparseLinear)
    rewirer = Rewirer(layer, None, rule="rigl", end=10, every=1, seed=0)
    x = oracle.drawn(BATCH, N, seed=0, dtype=torch.float64)
    others = {name: torch.randn_like(p).requires_grad_() for name, p in layer.named_parameters()}
    y = torch.func.functional_call(layer, others, (x,))
    y.square().sum().backward()
    assert rewirer._scores is not None
    assert rewirer._union is not None
    torch.testing.assert_close(rewirer._scores[~rewirer._union[2]], others["weight"].grad)

    def loss(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(layer, weights, (x,)).square().sum()

    with pytest.raises(RuntimeError, match=r"Expected no transform of torch\.func in a step"):
        torch.func.grad(loss)({name: p.detach() for name, p in others.items()})


def test_the_schedule() -> None:
    layer = made(dk.SparseLinear)
    rewirer = Rewirer(layer, None, every=4, fraction=1.0, end=16, seed=0)
    moved = []
    for t in range(1, 21):
        old = layer.connectivity.to_mask()
        assert rewirer.step() == (t in (4, 8, 12))
        moved.append(int((old & ~layer.connectivity.to_mask()).sum(1).max()))
    k = [round(8 * 0.5 * (1 + np.cos(np.pi * t / 16))) for t in (4, 8, 12)]
    assert [n for n in moved if n] == k


@pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rule", ["set", "rigl"])
def test_compiled_models_use_the_new_connectivity(compiler: str, rule: Any) -> None:
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model: Any = nn.Sequential(made(dk.DendriticLayer), nn.Linear(6, 3).double())
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        rewirer = Rewirer(model[0], optimizer, rule=rule, every=2, end=20, seed=0)
        run = torch.compile(model, backend=compiler) if compiled else model
        for i in range(8):
            trained(run, optimizer, 1, seed=i)
            rewirer.step()
        x = oracle.drawn(BATCH, N, seed=9, dtype=torch.float64)
        results.append((model[0].connectivity, run(x).detach(), model(x).detach()))
    assert results[0][0] == results[1][0]
    for y in results[1][1:]:
        assert oracle.relative_error(y, results[0][1]) < 1e-12
    torch.compiler.reset()


def _data_parallel() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    for rule in ("set", "rigl"):
        results = []
        for distributed in (False, True):
            torch.manual_seed(0)
            layer = made(dk.DendriticLayer)
            model = DistributedDataParallel(layer) if distributed else layer
            optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
            options: Any = {"rule": rule, "every": 2, "end": 20, "seed": 0}
            rewirer = Rewirer(layer, optimizer, **options)
            for i in range(6):
                x = oracle.drawn(BATCH, N, seed=i, dtype=torch.float64)
                optimizer.zero_grad()
                model(x.chunk(world)[rank] if distributed else x).square().mean().backward()
                optimizer.step()
                rewirer.step()
            results.append((layer.connectivity, layer.synapse_weight.detach()))
        assert results[0][0] == results[1][0]
        assert oracle.relative_error(results[1][1], results[0][1]) < 1e-10


def test_data_parallel_processes_rewire_alike(tmp_path: Path) -> None:
    launch(2, tmp_path, _data_parallel)


def test_public_names() -> None:
    assert dk.plasticity is plasticity
    assert "plasticity" in dk.__all__


def test_every_step_draws_anew() -> None:
    found = []
    for steps in (0, 1):
        torch.manual_seed(0)
        layer = dk.DendriticLayer(dk.connectivity.random(50, 4, 4, 10, seed=0))
        rewirer = plasticity.Rewirer(layer, None, every=1, end=1000, seed=0)
        rewirer.load_state_dict({"steps": steps})
        assert rewirer.step()
        found.append(layer.connectivity)
    assert found[0] != found[1]
