"""Low precision: autocast, half parameters, loss scaling, judged against plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from test_functional import NETWORKS, draw, draw_grad
from torch import nn

import dendrite_kernels as dk
from dendrite_kernels import Connectivity

functional: Any = dk.functional
reference: Any = dk.reference
formula: Any = oracle

LOW = [torch.bfloat16, torch.float16]
Function = Callable[..., torch.Tensor]


@pytest.fixture(params=LOW, ids=["bf16", "f16"])
def low(request: pytest.FixtureRequest) -> torch.dtype:
    dtype: torch.dtype = request.param
    return dtype


def run(function: Function, tensors: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


def check(ours: list[torch.Tensor], plain: list[torch.Tensor], exact: list[torch.Tensor]) -> None:
    """Error at most twice that of plain torch in the same dtype."""
    for a, p, e in zip(ours, plain, exact, strict=True):
        assert a.dtype == p.dtype
        assert oracle.relative_error(a, e) <= 2 * oracle.relative_error(p, e) + 1e-7


def masked_dense(c: Connectivity) -> Function:
    return lambda *t: reference.dendritic_layer(*t, c)


@pytest.mark.parametrize("network", ["constant fan-in", "ragged", "no synapse"])
def test_half_parameters(backend: str, low: torch.dtype, network: str) -> None:
    c = NETWORKS[network]()
    tensors = [t.to(low) for t in draw(c, 33, torch.float32, somas=True)]
    grad = draw_grad(33, c.num_somas, torch.float32).to(low)
    wide = [t.double() for t in tensors]
    exact = run(lambda *t: formula.dendritic_layer(*t, c, 0.1), wide, grad)
    plain = run(masked_dense(c), tensors, grad)
    check(run(lambda *t: functional.dendritic_layer(*t, c), tensors, grad), plain, exact)

    grad = draw_grad(33, c.num_dendrites, torch.float32).to(low)
    exact = run(lambda *t: formula.sparse_linear(*t, c), wide[:3], grad)
    plain = run(lambda *t: reference.sparse_linear(*t, c), tensors[:3], grad)
    check(run(lambda *t: functional.sparse_linear(*t, c), tensors[:3], grad), plain, exact)


@pytest.mark.parametrize("network", ["constant fan-in", "ragged"])
def test_autocast(backend: str, low: torch.dtype, network: str) -> None:
    """Like F.linear: float32 in, low precision out, float32 gradients of float32 parameters."""
    c = NETWORKS[network]()
    tensors = draw(c, 33, torch.float32, somas=True)
    grad = draw_grad(33, c.num_somas, torch.float32)
    wide = [t.double() for t in tensors]
    exact = run(lambda *t: formula.dendritic_layer(*t, c, 0.1), wide, grad.to(low))
    with oracle.autocast(low):
        plain = run(masked_dense(c), tensors, grad)
        ours = run(lambda *t: functional.dendritic_layer(*t, c), tensors, grad)
        sparse = functional.sparse_linear(*tensors[:3], c)
    check(ours, plain, exact)
    assert ours[0].dtype == sparse.dtype == low
    rounded = functional.sparse_linear(*tensors[:3], c).to(low)
    assert torch.equal(sparse, rounded)  # one rounding, of the float32 result


@pytest.mark.parametrize("activation", ["relu", "tanh", "leaky_relu"])
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "sparse"])
def test_autocast_of_every_path(low: torch.dtype, activation: str, dense: bool) -> None:
    somas = [0, 2, 2, 6]
    c = Connectivity.from_csr(torch.arange(7) * 5, [0, 1, 2, 3, 4] * 6, 5, soma_ptr=somas)
    c = c if dense else NETWORKS["ragged"]()
    layer = dk.DendriticLayer(c, activation=activation)
    x = torch.randn(9, c.in_features)
    exact = layer(x)
    with oracle.autocast(low):
        y = layer(x.to(low))  # what a layer below hands on
    assert y.dtype == low
    assert oracle.relative_error(y, exact) < 4 * torch.finfo(low).eps
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


def test_autocast_leaves_float64_alone(backend: str) -> None:
    layer = dk.DendriticLayer(NETWORKS["ragged"](), dtype=torch.float64)
    x = torch.randn(9, 61, dtype=torch.float64)
    with oracle.autocast(torch.bfloat16):
        assert torch.equal(layer(x), layer(x).double())
        assert layer(x).dtype == torch.float64
        with pytest.raises(TypeError, match=r"float64 like x, got torch\.float32"):
            dk.DendriticLayer(layer.connectivity)(x)


def test_mixed_dtypes_and_devices_are_errors() -> None:
    layer = dk.DendriticLayer(NETWORKS["ragged"]())
    x = torch.randn(9, 61)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        with pytest.raises(TypeError, match=r"Expected synapse_weight of dtype .* like x"):
            layer(x.to(dtype))
    with pytest.raises(TypeError, match="Expected x of dtype"):
        layer(x.long())
    with pytest.raises(ValueError, match=f"Expected synapse_weight on meta like x, got {x.device}"):
        layer(x.to("meta"))


@pytest.mark.parametrize("convert", ["half", "bfloat16", "double", "float"])
def test_module_conversions(backend: str, convert: str) -> None:
    layer = dk.DendriticLayer(NETWORKS["constant fan-in"]())
    x = torch.randn(9, 100)
    exact = layer(x)
    converted = getattr(layer, convert)()
    dtype = converted.synapse_weight.dtype
    y = converted(x.to(dtype))
    assert y.dtype == dtype
    assert oracle.relative_error(y, exact) < 10 * torch.finfo(dtype).eps + 1e-6
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in converted.parameters())


def test_a_network_trains_under_autocast_and_a_scaler(backend: str, low: torch.dtype) -> None:
    model = nn.Sequential(dk.DendriticLayer(NETWORKS["constant fan-in"]()), nn.Linear(12, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    scaler = torch.amp.GradScaler(torch.get_default_device().type, init_scale=2.0**10)
    x = torch.randn(256, 100)
    target = (x @ torch.randn(100, 3)).argmax(1)
    losses = []
    for _ in range(60):
        with oracle.autocast(low):
            loss = F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_scaler_skips_steps_with_infinite_gradients(backend: str) -> None:
    layer = dk.DendriticLayer(NETWORKS["constant fan-in"]())
    before = [p.clone() for p in layer.parameters()]
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler(torch.get_default_device().type)
    scaler.scale(layer(torch.full((4, 100), 3e38)).sum()).backward()
    scaler.step(optimizer)
    assert all(torch.equal(p, q) for p, q in zip(layer.parameters(), before, strict=True))


def test_compiled_autocast(backend: str) -> None:
    torch._dynamo.reset()
    layer = dk.DendriticLayer(NETWORKS["constant fan-in"]())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(9, 100)
    with oracle.autocast(torch.bfloat16):
        expected, actual = layer(x), compiled(x)
    assert torch.equal(actual, expected)


def test_per_sample_gradients_under_autocast(backend: str) -> None:
    layer = dk.DendriticLayer(NETWORKS["constant fan-in"]())
    x = torch.randn(9, 100)
    state = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(state: dict[str, torch.Tensor], x: torch.Tensor) -> Any:
        return torch.func.functional_call(layer, state, (x,)).float().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    exact = per_sample(state, x)
    with oracle.autocast(torch.bfloat16):
        rounded = per_sample(state, x)
    for name, value in exact.items():
        assert oracle.relative_error(rounded[name], value) < 0.01
