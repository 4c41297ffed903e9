"""Shunting neurons, beside the same neurons synapse by synapse in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.parametrize import register_parametrization

import dendrite_kernels as dk
from bench.questions.shunting import DenseShunting
from dendrite_kernels.shunting import Conductance, ShuntingLayer, build
from tests import oracle
from tests.networks import ragged
from tests.nn.test_nn import through_file

N, S, D = 30, 6, 4


def drawn(synapses: int, seed: int, inputs: int = N) -> dk.Connectivity:
    return dk.connectivity.random(inputs, S, D, synapses, constant_fan_in=True, seed=seed)


def plain(**options: Any) -> ShuntingLayer:
    return ShuntingLayer(drawn(5, 0), drawn(3, 1), **options)


def uneven(**options: Any) -> ShuntingLayer:
    """Dendrites without synapses, of each kind or both; a soma without dendrites."""
    excitation = ragged(N, 20, [0, 13, 13, 20], seed=1)
    return ShuntingLayer(excitation, ragged(N, 20, [0, 20], seed=2), **options)


def apart(**options: Any) -> ShuntingLayer:
    """Inhibition from inputs of its own."""
    return ShuntingLayer(drawn(5, 0), drawn(7, 1, inputs=11), **options)


def dense(**options: Any) -> ShuntingLayer:
    everything = dk.connectivity.all_to_all(N, 2, 3)
    return ShuntingLayer(everything, everything, activation="tanh", **options)


Make = Callable[..., ShuntingLayer]
LAYERS: dict[str, Make] = {"plain": plain, "uneven": uneven, "apart": apart, "dense": dense}
EVERY = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def inputs(layer: ShuntingLayer, *batch: int, dtype: torch.dtype | None = None) -> list[Tensor]:
    """x, and x_i where inhibition has inputs of its own."""
    sizes = [layer.excitation.connectivity.in_features, layer.inhibition.connectivity.in_features]
    return [torch.rand(*batch, n, dtype=dtype) for n in sizes[: 1 + (sizes[0] != sizes[1])]]


def shuffled(make: Make, **options: Any) -> ShuntingLayer:
    """A layer whose cables differ."""
    layer = make(**options)
    layer.cable.weight = torch.rand_like(layer.cable.weight) + 0.1
    return layer


def thetas(layer: ShuntingLayer) -> list[Tensor]:
    found = {name.partition(".")[0]: p for name, p in layer.named_parameters()}
    return [found[name] for name in ("excitation", "inhibition", "cable")]


def exact(layer: ShuntingLayer, values: list[Tensor], x: Tensor, x_i: Tensor) -> Tensor:
    """y [B, S], one synapse and one dendrite after the other."""
    g, h, c = (torch.exp(theta) for theta in values)
    phi = torch.tanh if layer.activation == "tanh" else lambda v: v
    columns = []
    for rows in zip(*_spans(layer.excitation.connectivity.soma_ptr), strict=True):
        current, total = torch.zeros(len(x), dtype=x.dtype), torch.ones((), dtype=x.dtype)
        for r in range(*rows):
            drive = []
            for part, weight, source in (
                (layer.excitation.connectivity, g, x),
                (layer.inhibition.connectivity, h, x_i),
            ):
                begin, end = part.crow_indices[r : r + 2].tolist()
                sums = torch.zeros(len(x), dtype=x.dtype)
                for k in range(begin, end):
                    sums = sums + weight[k] * source[:, int(part.col_indices[k])]
                drive.append(sums)
            potential = phi(drive[0] / (1 + drive[0] + drive[1]))
            current, total = current + c[r] * potential, total + c[r]
        columns.append(phi(current / total))
    return torch.stack(columns, 1)


def _spans(pointer: Tensor) -> tuple[list[int], list[int]]:
    return pointer[:-1].tolist(), pointer[1:].tolist()


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_equations(backend: str, make: Make, dtype: torch.dtype) -> None:
    layer = shuffled(make, dtype=dtype)
    x = [value.requires_grad_() for value in inputs(layer, 5, dtype=dtype)]
    y = layer(*x)
    grad = torch.linspace(-1, 2, y.numel(), dtype=dtype).view_as(y)
    ours = [y, *torch.autograd.grad(y, [*x, *thetas(layer)], grad)]
    wide = [v.detach().double().requires_grad_() for v in (*x, *thetas(layer))]
    expected = exact(layer, wide[-3:], wide[0], wide[len(x) - 1])
    theirs = [expected, *torch.autograd.grad(expected, wide, grad.double())]
    assert max(oracle.errors(ours, theirs)) < (1e-5 if dtype == torch.float32 else 1e-13)


@EVERY
def test_derivatives(make: Make) -> None:
    layer = shuffled(make, dtype=torch.float64)
    x = [value.requires_grad_() for value in inputs(layer, 2, dtype=torch.float64)]
    names, values = zip(*layer.named_parameters(), strict=True)

    def run(*tensors: Tensor) -> Tensor:
        named = dict(zip(names, tensors[len(x) :], strict=True))
        return torch.func.functional_call(layer, named, tensors[: len(x)])

    assert torch.autograd.gradcheck(run, (*x, *values), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (*x, *values), fast_mode=True)


def test_inhibition_divides() -> None:
    """One dendrite with E = 3: 3 / 4 without inhibition, 3 / (4 + I) with it; then the soma."""
    one = dk.connectivity.all_to_all(1, 1, 1)
    layer = ShuntingLayer(one, one)
    layer.excitation.weight, layer.inhibition.weight = torch.tensor([3.0]), torch.tensor([1.0])
    layer.cable.weight = torch.tensor([4.0])
    found = layer(torch.ones(3, 1), torch.tensor([[0.0], [1.0], [2.0]]))
    expected = torch.tensor([[3 / 4], [3 / 5], [3 / 6]]) * 4 / 5
    torch.testing.assert_close(found, expected)


def test_only_synapses_have_parameters() -> None:
    layer = uneven()
    counts = [part.connectivity.nnz for part in (layer.excitation, layer.inhibition)]
    assert [p.numel() for p in layer.parameters()] == [*counts, 20]
    model = build(N, S, D, 5, 3, 10, seed=0)
    assert dk.models.count_parameters(model) == S * D * (5 + 3 + 1) + 10 * (S + 1)
    assert model(torch.rand(2, N)).shape == (2, 10)


def test_a_seed_draws_the_same_synapses() -> None:
    def synapses(seed: int) -> list[dk.Connectivity]:
        layer: Any = build(N, S, D, 5, 5, 10, seed=seed)[0]
        return [layer.excitation.connectivity, layer.inhibition.connectivity]

    assert synapses(0) == synapses(0)
    assert synapses(0) != synapses(1)
    assert synapses(0)[0] != synapses(0)[1]


@pytest.mark.parametrize("mean", [0.5, 0.1])
def test_a_fresh_layer_is_neither_silent_nor_saturated(mean: float) -> None:
    """E is 2 and I is 1 on average: V about 1/2, at the soma times D / (D + 1)."""
    torch.manual_seed(0)
    excitation = dk.connectivity.random(784, 32, 16, 40, seed=0)
    layer = ShuntingLayer(
        excitation, dk.connectivity.random(784, 32, 16, 10, seed=1), input_mean=mean
    )
    x = 2 * mean * torch.rand(200, 784)
    e, i = layer.excitation(x), layer.inhibition(x)
    v = e / (1 + e + i)
    assert e.mean().item() == pytest.approx(2, rel=0.02)
    assert i.mean().item() == pytest.approx(1, rel=0.02)
    assert v.mean().item() == pytest.approx(0.5, abs=0.02)
    y = layer(x)
    assert y.mean().item() == pytest.approx(v.mean().item() * 16 / 17, rel=1e-4)
    assert 0.3 < y.min().item() < y.max().item() < 0.6
    assert bool((layer.cable.weight == 1).all())
    for part, counts in ((layer.excitation, 40), (layer.inhibition, 10)):
        theta = part.weight.log()[: int(part.connectivity.crow_indices[1])]  # of dendrite 0
        assert 1 < theta.max() - theta.min() < 2, counts


def test_potentials_stay_between_0_and_1_in_training() -> None:
    torch.manual_seed(0)
    layer, x = plain(), 100 * torch.rand(64, N)
    optimizer = torch.optim.SGD(layer.parameters(), lr=100.0)
    before = layer(x)
    for _ in range(20):
        optimizer.zero_grad()
        layer(x).mean().backward()
        optimizer.step()
    y = layer(x)
    assert y.mean() < 0.5 * before.mean()
    assert all(bool((part.weight > 0).all()) for part in layer.children())
    assert y.min() >= 0
    assert y.max() < 1


def test_trains_as_matrices_do() -> None:
    torch.manual_seed(0)
    ours = plain(dtype=torch.float64)
    twin = DenseShunting(ours)
    x, target = torch.rand(32, N, dtype=torch.float64), torch.rand(32, S, dtype=torch.float64)
    losses = []
    for model in (ours, twin):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for _ in range(12):
            optimizer.zero_grad()
            loss = (model(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[11] < 0.9 * losses[0]
    assert losses[:12] == pytest.approx(losses[12:], rel=1e-9)


@EVERY
def test_shapes(make: Make) -> None:
    layer = make()
    somas = layer.excitation.connectivity.num_somas
    assert layer(*inputs(layer, 0)).shape == (0, somas)
    x = inputs(layer, 2, 3)
    flat = layer(*(value.flatten(0, 1) for value in x))
    assert oracle.relative_error(layer(*x).flatten(0, 1), flat) < 1e-6
    one = layer(*(value[0, 0] for value in x))
    assert one.shape == (somas,)
    assert oracle.relative_error(one, layer(*x)[0, 0]) < 1e-6


def test_images() -> None:
    fields = [
        dk.connectivity.local_receptive_fields((8, 6), S, D, 9, seed=seed) for seed in range(2)
    ]
    layer, x = ShuntingLayer(fields[0], fields[1]), torch.rand(5, 8, 6)
    assert torch.equal(layer(x), layer(x.flatten(1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    layer, x = shuffled(plain), torch.rand(9, N)
    expected = layer(x)
    with oracle.autocast(dtype):
        mixed = layer(x)
    low = copy.deepcopy(layer).to(dtype)(x.to(dtype))
    low.sum().backward()
    for y in (mixed, low):
        assert y.dtype == dtype
        assert oracle.relative_error(y, expected) < 0.02


@EVERY
def test_compiled(make: Make) -> None:
    layer = shuffled(make)
    x = inputs(layer, 8)
    torch._dynamo.reset()
    y, expected = torch.compile(layer, backend="aot_eager", fullgraph=True)(*x), layer(*x)
    assert oracle.relative_error(y, expected) < 1e-6
    ours, theirs = (torch.autograd.grad(v.square().sum(), thetas(layer)) for v in (y, expected))
    assert max(oracle.errors(ours, theirs)) < 1e-5


def test_portable_and_exported() -> None:
    layer, x = shuffled(plain), torch.rand(8, N)
    program = torch.export.export(layer, (x,))
    for other in (dk.interop.portable(nn.Sequential(layer)), program.module()):
        assert oracle.relative_error(other(x), layer(x)) < 1e-6


def test_fake_tensors_and_meta_device() -> None:
    with FakeTensorMode():
        assert uneven()(torch.rand(4, N)).shape == (4, 3)
    layer = plain(device="meta")
    assert all(p.is_meta for p in layer.parameters())
    real = layer.to_empty(device="cpu")
    real.reset_parameters()
    assert 0.3 < real(torch.rand(50, N)).mean() < 0.5


# ---- its state ----


@EVERY
def test_state_and_copies(make: Make) -> None:
    layer, other = shuffled(make), make()
    x = inputs(layer, 3)
    layer(*x).sum().backward()
    state = through_file(layer.state_dict(), weights_only=True)
    other.load_state_dict(state)
    for same in (other, copy.deepcopy(layer)):
        assert torch.equal(same(*x), layer(*x))
        assert repr(same) == repr(layer)


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_of_other_synapses_is_refused(strict: bool) -> None:
    layer = plain()
    before = layer.excitation.weight.clone()
    other = ShuntingLayer(drawn(5, 9), drawn(3, 1))
    with pytest.raises(RuntimeError, match="Expected a state of Connectivity"):
        layer.load_state_dict(other.state_dict(), strict=strict)
    assert torch.equal(layer.excitation.weight, before)


def test_logarithms_do_not_decay() -> None:
    model = build(N, S, D, 5, 3, 10, seed=0)
    decay, rest = dk.optim.parameter_groups(model, 0.1)
    assert [p.shape for p in decay["params"]] == [(10, S)]
    assert {id(p) for p in rest["params"]} > {id(p) for p in model[0].parameters()}


def test_pruning_and_rewiring_need_weights_of_their_own() -> None:
    layer = plain()
    with pytest.raises(ValueError, match="Expected a whole layer with parameters"):
        layer.excitation.prune(0.5)
    with pytest.raises(ValueError, match="Expected"):
        dk.plasticity.Rewirer(layer.excitation, None, end=10, seed=0)


# ---- conductances of any layer ----


def test_conductances() -> None:
    made: Any = dk.DendriticLayer(drawn(5, 0))
    nn.init.uniform_(made.cable_weight, 0.5, 2)
    before = made.cable_weight.detach().clone()
    register_parametrization(made, "cable_weight", Conductance())
    torch.testing.assert_close(made.cable_weight, before)
    made.cable_weight.sum().backward()
    theta = made.parametrizations.cable_weight.original
    torch.testing.assert_close(theta.grad, before)  # dg/dtheta = g
    with pytest.raises(ValueError, match=r"Expected positive conductances, got 0\.0"):
        made.cable_weight = torch.zeros(S * D)
    with pytest.raises(ValueError, match="Expected positive conductances, got -"):
        register_parametrization(made, "synapse_weight", Conductance())


# ---- what it refuses ----


def test_arguments_are_checked() -> None:
    c = drawn(5, 0)
    for options, message in [
        ({"inhibition": dk.connectivity.random(N, S, 3, 5, seed=0)}, "of 24 dendrites, .* got 18"),
        ({"inhibition": 3}, "Expected a Connectivity, got int"),
        ({"input_mean": 0.0}, "Expected a finite input_mean > 0, got 0.0"),
        ({"input_mean": float("nan")}, "Expected a finite input_mean > 0, got nan"),
        ({"activation": "relu"}, "Expected an activation of identity and tanh, got 'relu'"),
        ({"dtype": torch.int32}, "of dtype"),
    ]:
        arguments: Any = {"excitation": c, "inhibition": c, **options}
        with pytest.raises((TypeError, ValueError), match=message):
            ShuntingLayer(**arguments)
    with pytest.raises(ValueError, match="Expected classes from 1"):
        build(N, S, D, 5, 3, 0)


def test_inputs_are_checked() -> None:
    layer, x = apart(), torch.rand(2, N)
    with pytest.raises(ValueError, match=r"Expected x of shape \[..., 11\], got \[2, 30\]"):
        layer(x)
    with pytest.raises(ValueError, match=r"Expected x of shape \[..., 30\], got \[2, 11\]"):
        layer(x[:, :11], x[:, :11])
