"""Context gates and k winners, beside plain PyTorch in float64."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dendrite_kernels as dk
from dendrite_kernels import ContextGate, DendriticLayer, KWinners
from tests import oracle
from tests.networks import NETWORKS, draw_grad, gradients
from tests.nn.test_nn import assert_same, through_file


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
