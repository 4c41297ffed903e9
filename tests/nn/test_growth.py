"""Growth against float64 oracles: what a grown layer computes, and what moves along."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

import dendrite_kernels as dk
from dendrite_kernels import Connectivity, activations
from dendrite_kernels.plasticity import grow
from tests import oracle
from tests.networks import ragged, small

N, SOMAS, BATCH = 61, 6, 24
ACTIVATIONS = ["leaky_relu", "relu", "identity", "tanh", "sigmoid", "gelu", "silu", "elu"]
PIECEWISE = ACTIVATIONS[:3]


def network(constant: bool = True) -> Connectivity:
    if not constant:
        return ragged(N, 40, [0, 0, 1, 7, 7, 36, 40])
    return dk.connectivity.random(N, SOMAS, 4, 8, constant_fan_in=True, seed=0)


def dendrites(constant: bool = True) -> Connectivity:
    if not constant:
        return ragged(N, 9, [0, 2, 2, 3, 7, 7, 9], seed=1)
    return dk.connectivity.random(N, SOMAS, 1, 8, constant_fan_in=True, seed=1)


def made(constant: bool = True, **options: Any) -> dk.DendriticLayer:
    layer = dk.DendriticLayer(network(constant), **{"dtype": torch.float64, **options})
    for i, p in enumerate(layer.parameters()):
        with torch.no_grad():
            p.copy_(oracle.drawn(p.numel(), seed=i, dtype=torch.float64))
    return layer


def data(seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return oracle.drawn(BATCH, N, seed=seed, dtype=dtype)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trained(layer: nn.Module, optimizer: Any, steps: int = 3, seed: int = 1) -> None:
    for i in range(steps):
        optimizer.zero_grad()
        layer(data(seed + i)).square().mean().backward()
        optimizer.step()


def by_place(c: Connectivity, values: torch.Tensor) -> list[list[Any]]:
    """Of each dendrite of each soma: its number, or those of its synapses."""
    listed: list[Any] = values.tolist()
    if len(listed) == c.nnz != c.num_dendrites:
        listed = [listed[a:b] for a, b in itertools.pairwise(c.crow_indices.tolist())]
    return [listed[a:b] for a, b in itertools.pairwise(c.soma_ptr.tolist())]


def dense(layer: dk.DendriticLayer, x: torch.Tensor, activation: str) -> torch.Tensor:
    """Written from the equations: masked matrices in float64."""
    c, phi = layer.connectivity, activations.function_of(activation, 0.1)
    mask = c.to_mask()
    weight = torch.zeros(mask.shape, dtype=torch.float64)
    weight[mask] = layer.synapse_weight.detach().double()
    owner = torch.zeros(c.num_somas, c.num_dendrites, dtype=torch.float64)
    for s, (first, end) in enumerate(itertools.pairwise(c.soma_ptr.tolist())):
        owner[s, first:end] = layer.cable_weight.detach().double()[first:end]
    assert layer.dendrite_bias is not None
    assert layer.soma_bias is not None
    a = phi(x.double() @ weight.T + layer.dendrite_bias.detach().double())
    return phi(a @ owner.T + layer.soma_bias.detach().double())


# ---- what a grown layer computes ----


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_output_stays_and_then_is_that_of_the_grown_layer(
    backend: str, dtype: torch.dtype, constant: bool
) -> None:
    bound = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}[dtype]
    x = data(5, dtype)
    for name in ACTIVATIONS:
        activation: Any = name
        layer = made(constant, activation=activation, dtype=dtype)
        y = layer(x)
        rows = grow(layer, None, dendrites(constant), generator=generator())
        if name in PIECEWISE and backend != "reference":
            assert torch.equal(layer(x), y), name
        assert oracle.relative_error(layer(x), y) <= bound, name
        assert layer(x[:0]).shape == (0, SOMAS)
        with torch.no_grad():
            layer.cable_weight[rows] = oracle.drawn(len(rows), seed=9, dtype=dtype)
        assert not torch.equal(layer(x), y), name
        assert oracle.relative_error(layer(x), dense(layer, x, name)) <= 5 * bound, name


def test_growing_dense_layers() -> None:
    for new in (dk.connectivity.all_to_all(N, SOMAS, 1), dendrites()):
        layer = dk.DendriticLayer(dk.connectivity.all_to_all(N, SOMAS, 2), dtype=torch.float64)
        y = layer(data(0))
        grow(layer, None, new)
        assert layer.connectivity.is_dense == new.is_dense
        assert oracle.relative_error(layer(data(0)), y) < 1e-14


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation: Any) -> None:
    layer = dk.DendriticLayer(small(), dtype=torch.float64, activation=activation)
    new = Connectivity.from_csr([0, 2, 2, 3], [0, 3, 2], 4, soma_ptr=[0, 2, 3])
    grow(layer, None, new, cable=0.5)
    for p in layer.parameters():
        nn.init.normal_(p)  # with a bias of 0, a dendrite without synapses is at the kink
    x, options = oracle.drawn(5, 4, seed=0, dtype=torch.float64), {"activation": activation}
    assert gradcheck(
        lambda *t: dk.functional.dendritic_layer(*t, layer.connectivity, **options),
        (x.requires_grad_(), *layer.parameters()),
    )


def test_first_cables_learn_then_synapses() -> None:
    layer = made()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    rows = grow(layer, optimizer, dendrites(), generator=generator())
    for moved in (False, True):
        before = by_place(layer.connectivity, layer.synapse_weight)
        trained(layer, optimizer, 1)
        after = by_place(layer.connectivity, layer.synapse_weight)
        assert all((a[-1] != b[-1]) == moved for a, b in zip(after, before, strict=True))
        assert layer.cable_weight[rows].all()


# ---- what moves along ----

OPTIMIZERS: dict[str, Any] = {
    "SGD": {"momentum": 0.9, "nesterov": True},
    "Adam": {"amsgrad": True, "fused": False},
    "AdamW": {"weight_decay": 0.1, "foreach": False},
    "fused": {},
    **{name: {} for name in ("Adadelta", "Adafactor", "Adagrad", "Adamax", "ASGD", "NAdam")},
    **{name: {} for name in ("RAdam", "RMSprop", "Rprop")},
}


def optimizer_of(name: str, layer: nn.Module) -> Any:
    options = {"fused": True} if name == "fused" else OPTIMIZERS[name]
    kind = getattr(torch.optim, "Adam" if name == "fused" else name)
    return kind(layer.parameters(), lr=1e-2, **options)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("constant", [True, False])
def test_old_numbers_and_states_stay_and_new_ones_begin(name: str, constant: bool) -> None:
    layer = made(constant)
    optimizer = optimizer_of(name, layer)
    trained(layer, optimizer)
    c, parameters = layer.connectivity, dict(layer.named_parameters())
    soma_bias = copy.deepcopy([layer.soma_bias, optimizer.state[layer.soma_bias]])

    def numbers(p: nn.Parameter) -> dict[str, torch.Tensor]:
        assert p.grad is not None
        state = {k: t for k, t in optimizer.state[p].items() if torch.is_tensor(t) and t.dim()}
        return {"value": p.detach(), "grad": p.grad, **state}

    grown = ["synapse_weight", "dendrite_bias", "cable_weight"]
    before = {n: {k: by_place(c, t) for k, t in numbers(parameters[n]).items()} for n in grown}
    steps = [copy.deepcopy(optimizer.state[p].get("step")) for p in parameters.values()]
    new = dendrites(constant)
    rows = grow(layer, optimizer, new, cable=0.25, generator=generator())
    assert layer.connectivity == c.grow(new)
    assert all(layer.get_parameter(n) is p for n, p in parameters.items())
    assert [optimizer.state[p].get("step") for p in parameters.values()] == steps
    fresh = by_place(new, torch.zeros(new.num_dendrites))
    for name, values in before.items():
        now = numbers(layer.get_parameter(name))
        assert now.keys() == values.keys()
        for kind, old in values.items():
            for s, soma in enumerate(by_place(layer.connectivity, now[kind])):
                assert soma[: len(old[s])] == old[s]
                added = soma[len(old[s]) :]
                assert len(added) == len(fresh[s])
                if kind != "value":
                    each = itertools.chain(*added) if name == "synapse_weight" else added
                    assert not any(each)
    assert layer.dendrite_bias is not None
    assert not layer.dendrite_bias[rows].any()
    assert (layer.cable_weight[rows] == 0.25).all()
    assert torch.equal(layer.soma_bias, soma_bias[0])  # type: ignore[arg-type]
    assert str(optimizer.state[layer.soma_bias]) == str(soma_bias[1])
    trained(layer, optimizer)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "fused", "RMSprop"])
def test_training_equals_that_of_a_layer_that_had_the_dendrites(backend: str, name: str) -> None:
    """The twin never trained before: its state is written by hand, row by row."""
    layer = made(False)
    optimizer = optimizer_of(name, layer)
    trained(layer, optimizer)
    c, old = layer.connectivity, copy.deepcopy(optimizer.state_dict())
    rows = grow(layer, optimizer, dendrites(False), cable=0.5, generator=generator()).tolist()
    twin = dk.DendriticLayer(c.grow(dendrites(False)), dtype=torch.float64)
    twin.load_state_dict(layer.state_dict())
    kept = [r for r in range(twin.connectivity.num_dendrites) if r not in rows]
    synapses = torch.tensor([r in kept for r in range(len(kept) + len(rows))])
    synapses = synapses.repeat_interleave(twin.connectivity.crow_indices.diff())
    for index, p in enumerate(twin.parameters()):
        for key, value in old["state"][index].items():
            if torch.is_tensor(value) and value.dim() and value.shape != p.shape:
                wide = torch.zeros(p.shape, dtype=torch.float64)
                wide[synapses if p is twin.synapse_weight else kept] = value
                old["state"][index][key] = wide
    own = optimizer_of(name, twin)
    own.load_state_dict(old)
    trained(layer, optimizer, 4, seed=7)
    trained(twin, own, 4, seed=7)
    for a, b in zip(layer.parameters(), twin.parameters(), strict=True):
        assert oracle.same(a.detach(), b.detach(), backend)


def test_a_loss_from_before_growth_does_no_harm() -> None:
    """It holds the graph of the old sizes: the next one must not use that."""
    layer = made()
    for _ in range(2):  # the first call goes another way
        loss, other = layer(data(0)).sum(), layer(data(1)).sum()
        loss.backward()
        grow(layer, None, dendrites())
        layer(data(2)).sum().backward()
        assert layer.synapse_weight.grad is not None
        assert layer.synapse_weight.grad.shape == (layer.connectivity.nnz,)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            other.backward()
        assert loss.grad_fn is not None


def test_hooks_schedulers_and_groups_go_on() -> None:
    layer = made()
    optimizer = torch.optim.Adam(
        [{"params": [layer.synapse_weight]}, {"params": list(layer.parameters())[1:], "lr": 0.1}],
        lr=0.01,
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    seen: list[int] = []
    layer.cable_weight.register_hook(lambda grad: seen.append(grad.numel()))
    for step in range(4):
        if step == 1:
            grow(layer, optimizer, dendrites())
        trained(layer, optimizer, 1)
        scheduler.step()
    assert seen == [24, 30, 30, 30]
    assert [group["lr"] for group in optimizer.param_groups] == [0.0025, 0.025]
    norm = nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
    assert norm > 0


def test_steps_in_backward() -> None:
    """The same as with one optimizer that steps afterwards."""
    results = []
    for inside in (False, True):
        layer = made()
        ways: Any
        if inside:
            ways = dk.optim.StepInBackward(layer.parameters(), lambda p: torch.optim.Adam(p, 1e-2))
        else:
            ways = torch.optim.Adam(layer.parameters(), 1e-2)
        for i in range(6):
            if i == 3:
                grow(layer, ways, dendrites(), generator=generator())
            layer.zero_grad()
            layer(data(i)).square().mean().backward()
            if not inside:
                ways.step()
        results.append([p.detach() for p in layer.parameters()])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("init", ["fan_in", "paper"])
@pytest.mark.parametrize("activation", ["leaky_relu", "tanh"])
def test_new_weights_are_drawn_as_in_a_layer_of_their_own(init: Any, activation: Any) -> None:
    new = dendrites(False)
    for seed in (0, 1):
        layer = made(init=init, activation=activation, dtype=torch.float32)
        rows = grow(layer, None, new, generator=generator(seed))
        torch.manual_seed(seed)
        alone = dk.DendriticLayer(new, init=init, activation=activation)
        found = by_place(layer.connectivity, layer.synapse_weight)
        for s, soma in enumerate(by_place(new, alone.synapse_weight)):
            assert found[s][4:] == soma
        assert len(rows) == new.num_dendrites
        fan_in = new.crow_indices.diff()
        rectified = 1.01 if activation == "leaky_relu" else 1.0  # 1 + slope^2
        fans = torch.tensor(N + 9.0).expand(9) if init == "paper" else rectified * fan_in
        share = alone.synapse_weight.abs() / (6 / fans).sqrt().repeat_interleave(fan_in)
        assert 0.98 < share.max() <= 1
    layer = made(init=init)
    torch.manual_seed(5)
    grow(layer, None, new)
    again = made(init=init)
    grow(again, None, new, generator=generator(5))
    assert torch.equal(layer.synapse_weight, again.synapse_weight)


def test_layers_without_bias_and_frozen_ones() -> None:
    layer = made(bias=False)
    layer.synapse_weight.requires_grad_(False)
    optimizer = torch.optim.Adam([layer.cable_weight], 0.1)
    grow(layer, optimizer, dendrites())
    assert (layer.dendrite_bias, layer.soma_bias) == (None, None)
    assert [p.requires_grad for p in layer.parameters()] == [False, True]
    trained(layer, optimizer)


def test_somas_without_dendrites_get_some() -> None:
    layer = made(False)
    x = data(0)
    assert not layer.connectivity.soma_ptr.diff()[0]
    grow(layer, None, dendrites(False), cable=1.0)
    assert layer(x)[:, 0].std() > 0
    assert oracle.relative_error(layer(x), dense(layer, x, "leaky_relu")) < 1e-13


def test_copies_and_others_on_the_same_connectivity_are_left_alone() -> None:
    layer, x = made(), data(0)
    twin, other = copy.deepcopy(layer), dk.SparseLinear(layer.connectivity, dtype=torch.float64)
    y, z = twin(x), other(x)
    grow(layer, None, dendrites(), cable=1.0)
    assert torch.equal(twin(x), y)
    assert torch.equal(other(x), z)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert again.connectivity == layer.connectivity
        assert torch.equal(again(x), layer(x))
        grow(again, None, dendrites())
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), layer(x))


def test_growth_in_inference_mode_leaves_a_layer_that_trains() -> None:
    layer = dk.DendriticLayer(dk.connectivity.random(20, 4, 2, 5, seed=0))
    optimizer = torch.optim.Adam(layer.parameters())
    new = dk.connectivity.random(20, 4, 1, 5, seed=1)
    with torch.inference_mode():
        grow(layer, optimizer, new)
    layer(torch.randn(3, 20)).sum().backward()
    optimizer.step()
    assert layer.connectivity.num_dendrites == 12
