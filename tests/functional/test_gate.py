"""Gates of dendrites, beside plain PyTorch in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks

import dendrite_kernels as dk
from dendrite_kernels import DendriticLayer, _gated, operators
from tests import oracle
from tests.networks import NETWORKS, draw, draw_grad, gradients

NAMES = ["constant fan-in", "variable fan-in", "ragged", "no synapse", "S=1"]
PIECEWISE: dict[str, float] = {"leaky_relu": 0.1, "relu": 0.0, "identity": 1.0}
LAYER: Any = dk.functional.dendritic_layer


def plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cable: Tensor,
    soma_bias: Tensor | None,
    gate: Tensor,
    c: dk.Connectivity,
    phi: Callable[[Tensor], Tensor],
    psi: Callable[[Tensor], Tensor],
) -> Tensor:
    """Of dense matrices: x [B, N], gate [R] or [B, R]."""
    rows = torch.zeros(c.num_dendrites, c.in_features, dtype=x.dtype)
    u = x @ rows.masked_scatter(c.to_mask(), weight).T + (0 if bias is None else bias)
    owner = torch.repeat_interleave(c.soma_ptr.long().diff())
    joins = F.one_hot(owner, c.num_somas).to(x.dtype)  # [R, S]
    v = (phi(u) * gate * cable) @ joins + (0 if soma_bias is None else soma_bias)
    return psi(v)


def leaky(slope: float) -> Callable[[Tensor], Tensor]:
    return lambda u: F.leaky_relu(u, slope)


def drawn(c: dk.Connectivity, batch: int, dtype: torch.dtype, of_samples: bool) -> list[Tensor]:
    """x, parameters, and gates of both signs, some of them 0."""
    shape = (batch, c.num_dendrites) if of_samples else (c.num_dendrites,)
    gate = torch.randn(shape, dtype=dtype)
    gate[..., ::5] = 0
    return [*draw(c, batch, dtype, True), gate]


def gated(c: dk.Connectivity, **options: Any) -> Callable[..., Tensor]:
    return lambda *t: LAYER(*t[:5], c, gate=t[5], **options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("of_samples", [False, True])
def test_the_identities(backend: str, name: str, of_samples: bool) -> None:
    """2: a gate that all samples share is a cable. 3: with one a sample, signs are enough."""
    c = NETWORKS[name]()
    for batch in (1, 8, 33):
        tensors = drawn(c, batch, torch.float64, of_samples)
        grad = draw_grad(batch, c.num_somas, torch.float64)
        for one, two in [("leaky_relu", "leaky_relu"), ("relu", "identity"), ("identity", "relu")]:
            ours = gradients(gated(c, activation=one, soma_activation=two), tensors, grad)
            phi, psi = leaky(PIECEWISE[one]), leaky(PIECEWISE[two])
            exact = gradients(lambda *t: plain(*t, c, phi, psi), tensors, grad)  # noqa: B023
            assert max(oracle.errors(ours, exact)) < 1e-12, (batch, one)
            oracle_of_the_package = dk.reference.dendritic_layer(
                *tensors[:5], c, gate=tensors[5], activation=one, soma_activation=two
            )
            assert oracle.relative_error(oracle_of_the_package, exact[0]) < 1e-12, (batch, one)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("of_samples", [False, True])
def test_float32(backend: str, name: str, of_samples: bool) -> None:
    c = NETWORKS[name]()
    tensors = drawn(c, 40, torch.float32, of_samples)
    grad = draw_grad(40, c.num_somas, torch.float32)
    phi = leaky(0.1)
    exact = gradients(lambda *t: plain(*t, c, phi, phi), [t.double() for t in tensors], grad)
    ours = gradients(gated(c), tensors, grad)
    assert all(t.dtype == torch.float32 for t in ours)
    assert max(oracle.errors(ours, exact)) < 1e-5


@pytest.mark.parametrize("of_samples", [False, True])
def test_any_subset_of_gradients(of_samples: bool) -> None:
    c = NETWORKS["ragged"]()
    tensors, grad = drawn(c, 9, torch.float64, of_samples), draw_grad(9, c.num_somas, torch.float64)
    _, *whole = gradients(gated(c), tensors, grad)
    for wanted in itertools.product([False, True], repeat=6):
        if not any(wanted):
            continue
        leaves = [t.clone().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
        y = gated(c)(*leaves)
        found = torch.autograd.grad(y, [t for t in leaves if t.requires_grad], grad)
        expected = itertools.compress(whole, wanted)
        assert max(oracle.errors(found, list(expected))) < 1e-14, wanted


def test_without_biases(backend: str) -> None:
    c = NETWORKS["ragged"]()
    x, weight, _, cable, _, gate = drawn(c, 9, torch.float64, True)
    phi = leaky(0.1)
    given, grad = [x, weight, cable, gate], draw_grad(9, c.num_somas, torch.float64)
    ours = gradients(lambda x, w, k, g: LAYER(x, w, None, k, None, c, gate=g), given, grad)
    exact = gradients(lambda x, w, k, g: plain(x, w, None, k, None, g, c, phi, phi), given, grad)
    assert max(oracle.errors(ours, exact)) < 1e-12


@pytest.mark.parametrize("activation", ["tanh", "gelu"])
@pytest.mark.parametrize("of_samples", [False, True])
def test_other_activations(activation: str, of_samples: bool) -> None:
    c = NETWORKS["ragged"]()
    tensors, grad = drawn(c, 9, torch.float64, of_samples), draw_grad(9, c.num_somas, torch.float64)
    phi: Any = {"tanh": torch.tanh, "gelu": F.gelu}[activation]
    for psi, soma_activation in [(phi, None), (leaky(1.0), "identity")]:
        exact = gradients(lambda *t: plain(*t, c, phi, psi), tensors, grad)  # noqa: B023
        options = {"activation": activation, "soma_activation": soma_activation}
        assert max(oracle.errors(gradients(gated(c, **options), tensors, grad), exact)) < 1e-12


@pytest.mark.parametrize("of_samples", [False, True])
def test_dense_synapses(of_samples: bool) -> None:
    c = dk.connectivity.all_to_all(6, 3, 2)
    tensors, grad = drawn(c, 9, torch.float64, of_samples), draw_grad(9, 3, torch.float64)
    exact = gradients(lambda *t: plain(*t, c, leaky(0.1), leaky(0.1)), tensors, grad)
    assert max(oracle.errors(gradients(gated(c), tensors, grad), exact)) < 1e-12


# ---- what backward keeps and computes ----


def test_backward_keeps_the_gate_and_one_bit_for_each_dendrite_and_sample() -> None:
    c, batch = NETWORKS["constant fan-in"](), 40
    leaves = [t.requires_grad_() for t in drawn(c, batch, torch.float32, True)]
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = gated(c)(*leaves)
    given = {t.data_ptr() for t in [*leaves, y]}
    new = [t for t in kept if t.data_ptr() not in given]
    assert [(t.dtype, t.shape) for t in new] == [(torch.uint8, (batch // 8, c.num_dendrites))]
    assert any(t.data_ptr() == leaves[5].data_ptr() for t in kept)
    frozen = [t.detach() for t in leaves]
    kept.clear()
    with saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        gated(c)(*frozen)
    assert not kept


def test_only_the_gradient_of_the_gate_computes_the_sums_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    c, calls = NETWORKS["constant fan-in"](), []
    run = operators.forward
    monkeypatch.setattr(operators, "forward", lambda *args: (calls.append(1), run(*args))[1])
    for gate_learns, expected in [(False, 1), (True, 2)]:
        leaves = [t.requires_grad_() for t in drawn(c, 9, torch.float32, True)]
        leaves[5].requires_grad_(gate_learns)
        calls.clear()
        gated(c)(*leaves).sum().backward()
        assert len(calls) == expected


@pytest.mark.parametrize("batch", [0, 1, 7, 8, 9, 64])
def test_packed_bits(batch: int) -> None:
    bits = torch.rand(batch, 5) < 0.5
    packed = _gated._packed(bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == ((batch + 7) // 8, 5)
    assert torch.equal(_gated._unpacked(packed, batch).bool(), bits)


def test_backward_runs_on_the_backend_of_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    c, seen = NETWORKS["constant fan-in"](), []
    run = operators.backward

    def watched(*args: Any) -> Any:
        seen.append(dk.backends.chosen.get())
        return run(*args)

    monkeypatch.setattr(operators, "backward", watched)
    with dk.use_backend("reference"):
        leaves = [t.requires_grad_() for t in drawn(c, 4, torch.float64, True)]
        y = gated(c)(*leaves)
    y.sum().backward()
    assert seen == ["reference"]


# ---- shapes, dtypes, transforms ----


def test_shapes() -> None:
    c = dk.connectivity.local_receptive_fields((4, 5), 3, 4, 5, seed=0)
    layer, x = DendriticLayer(c), torch.randn(2, 3, 20)
    gate = torch.rand(2, 3, 12)
    whole = layer(x, gate=gate)
    for b, t in itertools.product(range(2), range(3)):
        torch.testing.assert_close(layer(x[b, t], gate=gate[b, t]), whole[b, t])
    torch.testing.assert_close(layer(x.unflatten(-1, (4, 5)), gate=gate), whole)
    for shape in [(12,), (1, 12), (3, 12), (2, 1, 12), (1, 1, 12)]:
        part = torch.rand(shape, requires_grad=True)
        wide = part.detach().expand(2, 3, 12).clone().requires_grad_()
        ours, theirs = layer(x, gate=part), layer(x, gate=wide)
        torch.testing.assert_close(ours, theirs)
        (found,) = torch.autograd.grad(ours.square().sum(), part)
        (expected,) = torch.autograd.grad(theirs.square().sum(), wide)
        torch.testing.assert_close(found, expected.sum_to_size(shape))
    empty = layer(x[:, :0], gate=torch.rand(2, 0, 12, requires_grad=True))
    assert empty.shape == (2, 0, 3)
    empty.sum().backward()
    assert layer.cable_weight.grad is not None
    assert not layer.cable_weight.grad.any()
    torch.testing.assert_close(layer(x, gate=torch.ones(2, 3, 12)), layer(x))
    torch.testing.assert_close(layer(x, gate=torch.ones(12)), layer(x))


def test_strided_gates_and_gradients(backend: str) -> None:
    c = NETWORKS["ragged"]()
    tensors = drawn(c, 33, torch.float64, True)
    grad = draw_grad(33, c.num_somas, torch.float64)
    strided = [t.t().contiguous().t() if t.dim() == 2 else t for t in tensors]
    ours = gradients(gated(c), tensors, grad)
    y = gated(c)(*[t.requires_grad_() for t in strided])
    found = torch.autograd.grad(y, strided, grad.t().contiguous().t())
    assert max(oracle.errors([y.detach(), *found], ours)) < 1e-14


@pytest.mark.parametrize("of_samples", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(backend: str, of_samples: bool, dtype: torch.dtype) -> None:
    c = NETWORKS["ragged"]()
    tensors, grad = drawn(c, 33, torch.float32, of_samples), draw_grad(33, c.num_somas, dtype)
    low = [t.to(dtype) for t in tensors]
    exact = gradients(gated(c), [t.double() for t in low], grad)
    ours = gradients(gated(c), low, grad)
    assert all(t.dtype == dtype for t in ours)
    assert max(oracle.errors(ours, exact)) < 0.02
    with oracle.autocast(dtype):
        mixed = gated(c)(*tensors[:5], tensors[5].to(dtype))
        alike = gated(c)(*tensors)
    assert mixed.dtype == alike.dtype == dtype
    assert oracle.relative_error(mixed, gated(c)(*tensors)) < 0.02
    assert oracle.relative_error(alike, gated(c)(*tensors)) < 0.02


def test_rounded_input() -> None:
    c = NETWORKS["constant fan-in"]()
    tensors = drawn(c, 9, torch.float32, True)
    grad = draw_grad(9, c.num_somas, torch.float32)
    rounded = [tensors[0].bfloat16().float(), *tensors[1:]]
    ours = gradients(gated(c, precision="bf16"), tensors, grad)
    exact = gradients(gated(c), rounded, grad)
    assert torch.equal(ours[0], exact[0])
    assert oracle.relative_error(ours[-1], exact[-1]) < 1e-6  # the gate sees what somas saw
    leaves = [t.requires_grad_() for t in tensors]
    y = gated(c, precision="bf16")(*leaves)
    again = torch.autograd.grad(y, leaves, grad, create_graph=True)
    assert oracle.relative_error(again[-1].detach(), exact[-1]) < 1e-6


@pytest.mark.parametrize("of_samples", [False, True])
def test_derivatives_of_any_order(backend: str, of_samples: bool) -> None:
    c = dk.connectivity.random(7, 3, 2, 4, constant_fan_in=True, seed=3)
    leaves = drawn(c, 3, torch.float64, of_samples)
    leaves[2] += 0.3  # away from the kink at u == 0
    for leaf in leaves:
        leaf.requires_grad_()
    assert gradcheck(gated(c), leaves, fast_mode=True)
    assert gradgradcheck(gated(c), leaves, fast_mode=True)
    y = gated(c)(*leaves)
    once = torch.autograd.grad(y.square().sum(), leaves, retain_graph=True)
    recorded = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
    assert max(oracle.errors([g.detach() for g in recorded], once)) < 1e-13


@pytest.mark.parametrize("of_samples", [False, True])
def test_transforms(of_samples: bool) -> None:
    c = NETWORKS["ragged"]()
    tensors = drawn(c, 4, torch.float64, of_samples)
    x, gate, rest = tensors[0], tensors[5], tensors[1:5]

    def of_all(x: Tensor, gate: Tensor) -> Tensor:
        y: Tensor = LAYER(x, *rest, c, gate=gate)
        return y

    leaves = [x.clone().requires_grad_(), gate.clone().requires_grad_()]
    y = of_all(*leaves)
    expected = torch.autograd.grad(y.square().sum(), leaves)
    found = torch.func.grad(lambda *t: of_all(*t).square().sum(), argnums=(0, 1))(x, gate)
    assert max(oracle.errors(found, expected)) < 1e-13
    mapped = torch.func.vmap(of_all, (0, 0 if of_samples else None))(x, gate)
    assert oracle.relative_error(mapped, y.detach()) < 1e-13
    _, tangent = torch.func.jvp(of_all, (x, gate), (x, torch.zeros_like(gate)))
    _, pull = torch.func.vjp(of_all, x, gate)
    torch.testing.assert_close((pull(torch.ones_like(y))[0] * x).sum(), tangent.sum())


class _Positional(nn.Module):
    """For torch.jit.trace, which knows no keywords."""

    def __init__(self, layer: DendriticLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        y: Tensor = self.layer(x, gate=gate)
        return y


@pytest.mark.parametrize("name", ["constant fan-in", "ragged"])
@pytest.mark.parametrize("of_samples", [False, True])
def test_compiled_exported_traced(name: str, of_samples: bool) -> None:
    c = NETWORKS[name]()
    layer, x = DendriticLayer(c), torch.randn(9, c.in_features)
    gate = torch.rand((9, c.num_dendrites) if of_samples else c.num_dendrites, requires_grad=True)
    y = layer(x, gate=gate)
    expected = torch.autograd.grad(y.square().sum(), [gate, *layer.parameters()])
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(x, gate=gate)
    found = torch.autograd.grad(compiled.square().sum(), [gate, *layer.parameters()])
    assert max(oracle.errors([compiled, *found], [y, *expected])) < 1e-5
    program = torch.export.export(layer, (x,), {"gate": gate.detach()}).module()
    assert oracle.relative_error(program(x, gate=gate), y) < 1e-6
    traced = torch.jit.trace(_Positional(layer), (x, gate.detach()), check_trace=False)
    assert oracle.relative_error(traced(x, gate), y) < 1e-6
    with pytest.raises(TypeError, match="gate"):
        dk.interop.portable(layer)(x, gate=gate)


def test_fake_tensors() -> None:
    c = NETWORKS["ragged"]()
    with FakeTensorMode():
        layer, gate = DendriticLayer(c), torch.rand(4, c.num_dendrites, requires_grad=True)
        y = layer(torch.randn(4, c.in_features), gate=gate)
        y.sum().backward()
        assert y.shape == (4, c.num_somas)
        assert gate.grad is not None
        assert gate.grad.shape == gate.shape


def test_what_a_gate_must_be() -> None:
    layer, x = DendriticLayer(NETWORKS["constant fan-in"]()), torch.randn(2, 3, 100)
    wrong = r"Expected gate of shape \[48\] or \[2, 3, 48\], got "
    for gate, message in [
        (torch.ones(47), wrong + r"\[47\]"),
        (torch.ones(2, 48), wrong + r"\[2, 48\]"),
        (torch.ones(1, 2, 3, 48), wrong),
        (torch.ones(0, 3, 48), wrong),
        (torch.tensor(1.0), wrong + r"\[\]"),
        (torch.ones(48).double(), "Expected gate of dtype torch.float32 like x, got torch.float64"),
        (torch.ones(48).bfloat16(), "Expected gate of dtype torch.float32 like x"),
        (torch.ones(48, device="meta"), "Expected gate on cpu like x, got meta"),
        (torch.ones(48).to_sparse(), "Expected gate to be a dense tensor"),
        (1.0, "Expected gate to be a torch.Tensor, got float"),
    ]:
        anything: Any = gate
        with pytest.raises((TypeError, ValueError), match=message):
            layer(x, gate=anything)
    with pytest.raises(TypeError, match="Expected cable_weight to be a"):
        LAYER(x, layer.synapse_weight, None, None, None, layer.connectivity, gate=torch.ones(48))
    weight, gate = layer.synapse_weight, torch.ones(48)
    for cable in (torch.ones(1), torch.ones(3), torch.tensor(1.0), torch.ones(48).half()):
        with pytest.raises((TypeError, ValueError), match="Expected cable_weight of"):
            LAYER(x, weight, None, cable, None, layer.connectivity, gate=gate)


@pytest.mark.parametrize("of_samples", [False, True])
def test_candidates_of_rewiring_see_the_gate(of_samples: bool) -> None:
    c = dk.connectivity.random(20, 3, 4, 5, constant_fan_in=True, seed=0)
    layer = DendriticLayer(c, dtype=torch.float64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    rewirer = dk.plasticity.Rewirer(
        layer, optimizer, rule="rigl", every=1, end=9, candidates=15, seed=0
    )
    x = torch.randn(6, 20, dtype=torch.float64)
    gate = torch.rand((6, 12) if of_samples else 12, dtype=torch.float64, requires_grad=True)
    (layer(x, gate) if of_samples else layer(x, gate=gate)).square().sum().backward()
    assert rewirer._scores is not None
    assert rewirer._union is not None
    _, union, _ = rewirer._union
    dense = torch.zeros(12, 20).double().masked_scatter(c.to_mask(), layer.synapse_weight.detach())
    dense.requires_grad_()
    everything = dk.connectivity.all_to_all(20, 3, 4)
    named = {name: p.detach() for name, p in layer.named_parameters()}
    del named["synapse_weight"]
    y = LAYER(x, dense.flatten(), *named.values(), everything, gate=gate.detach())
    (expected,) = torch.autograd.grad(y.square().sum(), dense)
    torch.testing.assert_close(rewirer._scores, expected[union.to_mask()])
