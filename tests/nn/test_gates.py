"""Gates of dendrites, context gates and k winners, beside plain PyTorch in float64."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks

import dendrite_kernels as dk
from dendrite_kernels import ContextGate, DendriticLayer, KWinners, _gated, operators
from tests import oracle
from tests.networks import NETWORKS, draw, draw_grad, gradients
from tests.nn.test_nn import assert_same, through_file

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
    layer(x, gate=gate).square().sum().backward()
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


# ---- ContextGate ----


def segments(c: dk.Connectivity | None = None, **options: Any) -> ContextGate:
    """6 gated neurons with 0 to 29 segments on 61 numbers of a context."""
    gate = ContextGate(c or NETWORKS["ragged"](), **options)
    if gate.bias is not None:
        nn.init.uniform_(gate.bias, -1, 1)
    return gate


def of_largest_size(d: Tensor) -> Tensor:
    """d [B, T] -> [B]."""
    return d[torch.arange(len(d)), d.abs().argmax(1)]


REDUCE: dict[str, Callable[[Tensor], Tensor]] = {
    "absmax": of_largest_size,
    "max": lambda d: d.amax(1),
    "sum": lambda d: d.sum(1),
}


@pytest.mark.parametrize("reduce", list(REDUCE))
@pytest.mark.parametrize("name", ["constant fan-in", "ragged", "dense"])
@pytest.mark.parametrize("bias", [False, True])
def test_context_gate(backend: str, reduce: Any, name: str, bias: bool) -> None:
    c = dk.connectivity.all_to_all(20, 3, 4) if name == "dense" else NETWORKS[name]()
    gate = segments(c, reduce=reduce, bias=bias, dtype=torch.float64)
    ctx = torch.randn(5, c.in_features, dtype=torch.float64)

    def dense(ctx: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        rows = torch.zeros(c.num_dendrites, c.in_features, dtype=torch.float64)
        d = ctx @ rows.masked_scatter(c.to_mask(), weight).T + sum(bias)
        values = torch.zeros(5, c.num_somas, dtype=torch.float64)
        for s in range(c.num_somas):
            first, end = c.soma_ptr[s : s + 2].tolist()
            if end > first:
                values[:, s] = REDUCE[reduce](d[:, first:end])
        return values.sigmoid()

    tensors = [ctx, *gate.parameters()]
    names = [name for name, _ in gate.named_parameters()]
    grad = draw_grad(5, c.num_somas, torch.float64)
    exact = gradients(dense, tensors, grad)
    ours = gradients(
        lambda ctx, *p: torch.func.functional_call(gate, dict(zip(names, p, strict=True)), ctx),
        tensors,
        grad,
    )
    assert max(oracle.errors(ours, exact)) < 1e-12
    torch.testing.assert_close(gate(ctx[0]), gate(ctx)[0])
    assert gate(ctx[:0]).shape == (0, c.num_somas)


def test_a_neuron_without_segments_is_half_open() -> None:
    assert (segments()(torch.randn(3, 61))[:, 0] == 0.5).all()


def test_a_fresh_gate() -> None:
    c = dk.connectivity.random(300, 40, 10, 25, constant_fan_in=True, seed=0)
    gate = ContextGate(c, bias=True)
    assert 0.99 < gate.weight.abs().max().item() / (0.1 * 25) ** -0.5 <= 1
    assert gate.bias is not None
    assert not gate.bias.any()
    assert ContextGate(c).bias is None


def test_state_and_copies(tmp_path: Path) -> None:
    gate, ctx = segments(reduce="max", bias=True), torch.randn(3, 61)
    state = through_file(gate.state_dict(), weights_only=True)
    assert state.keys() == {"weight", "bias", "_extra_state"}
    other = segments(reduce="max", bias=True)
    other.load_state_dict(state)
    made = ContextGate.from_state_dict(state, reduce="max")
    gate.weight.requires_grad_(False)
    dk.save(nn.Sequential(gate, KWinners(0.5)), tmp_path / "gate")
    back: Any = dk.load(tmp_path / "gate")
    assert not back[0].weight.requires_grad
    assert back[1].fraction == 0.5
    assert torch.equal(back(ctx), dk.functional.k_winners(gate(ctx), 3))
    copies = copy.deepcopy(gate), pickle.loads(pickle.dumps(gate)), back[0], other, made
    for same in copies:
        assert type(same) is ContextGate
        assert_same(same, gate)
        assert repr(same) == repr(gate)
        assert torch.equal(same(ctx), gate(ctx))
    with pytest.raises(RuntimeError, match=r"ContextGate\.from_state_dict"):
        ContextGate(dk.connectivity.random(61, 3, 2, 4, seed=0)).load_state_dict(state)
    with pytest.raises(ValueError, match="Expected a state with"):
        ContextGate.from_state_dict({"weight": gate.weight})


def test_it_works_like_other_layers() -> None:
    gate, ctx = segments(bias=True), torch.randn(3, 61)
    assert gate.prune(0.5).connectivity.nnz < gate.connectivity.nnz
    decay, rest = dk.optim.parameter_groups(gate, 0.1)
    assert decay["params"] == [gate.weight]
    assert rest["params"] == [gate.bias]
    assert dk.models.count_dense_parameters(gate) == 40 * 62
    torch._dynamo.reset()
    compiled = torch.compile(gate, backend="aot_eager", fullgraph=True)
    assert oracle.relative_error(compiled(ctx), gate(ctx)) < 1e-6
    program = torch.export.export(gate, (ctx,)).module()
    assert oracle.relative_error(program(ctx), gate(ctx)) < 1e-6
    meta = segments(device="meta").to_empty(device="cpu")
    meta.reset_parameters()
    assert meta.weight.isfinite().all()
    low = copy.deepcopy(gate).bfloat16()(ctx.bfloat16())
    assert low.dtype == torch.bfloat16
    assert oracle.relative_error(low, gate(ctx)) < 0.02
    with oracle.autocast(torch.bfloat16):
        assert gate(ctx).dtype == torch.bfloat16


def test_what_is_refused() -> None:
    c = NETWORKS["ragged"]()
    for options, message in [
        ({"reduce": "min"}, "Expected reduce of .*, got 'min'"),
        ({"dtype": torch.int32}, "Expected parameters of dtype"),
    ]:
        anything: Any = options
        with pytest.raises((TypeError, ValueError), match=message):
            ContextGate(c, **anything)
    with pytest.raises(TypeError, match="Expected a Connectivity, got int"):
        ContextGate(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Expected x of shape \[..., 61\], got \[2, 60\]"):
        segments()(torch.randn(2, 60))
    with pytest.raises(TypeError, match="Expected a DendriticLayer or SparseLinear"):
        dk.plasticity.rewire(segments(), fraction=0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Expected layers without gates, got ContextGate"):
        dk.interop.portable(nn.Sequential(segments()))


# ---- KWinners, and all together ----


@pytest.mark.parametrize(("fraction", "count"), [(0.05, 2), (0.5, 20), (1, 40), (1e-6, 1)])
def test_k_winners(fraction: float, count: int) -> None:
    module, x = KWinners(fraction), torch.randn(3, 4, 40)
    assert (module(x) != 0).sum(-1).unique().tolist() == [count]
    assert torch.equal(module(x), dk.functional.k_winners(x, count))
    assert dk.nn.KWinners is KWinners
    assert not module.state_dict()
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), module(x))


def test_fractions_are_checked() -> None:
    for fraction, message in [
        (0, "Expected fraction above 0, up to 1, got 0"),
        (1.5, "got 1.5"),
        (float("nan"), "got nan"),
        (True, "Expected fraction to be a number, got True"),
        ("0.1", "Expected fraction to be a number, got '0.1'"),
    ]:
        anything: Any = fraction
        with pytest.raises((TypeError, ValueError), match=message):
            KWinners(anything)
    with pytest.raises(ValueError, match="Expected x of shape"):
        KWinners(0.5)(torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"Expected x to be a torch\.Tensor, got list"):
        KWinners(0.5)([1.0])  # type: ignore[arg-type]


def test_gates_let_one_layer_answer_differently_in_two_contexts() -> None:
    """The sign of the target is the context's: no network without gates can know it."""
    torch.manual_seed(0)
    layer = DendriticLayer(dk.connectivity.random(20, 8, 6, 10, seed=0))
    gate = ContextGate(dk.connectivity.all_to_all(2, 48, 2))  # 48 dendrites, 2 segments each
    head, parameters = nn.Linear(8, 1), [*layer.parameters(), *gate.parameters()]
    optimizer = torch.optim.Adam([*parameters, *head.parameters()], lr=1e-2)
    x = torch.randn(256, 20)
    which = torch.arange(256) % 2
    target = x[:, :1] * (2 * which[:, None] - 1)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        y = head(layer(x, gate=gate(torch.eye(2))[which]))
        loss = F.mse_loss(y, target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]
