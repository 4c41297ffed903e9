"""Low precision: autocast, half parameters, loss scaling, judged against plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dendrite_kernels as dk
from dendrite_kernels import Connectivity
from tests import oracle
from tests.networks import NETWORKS, draw, draw_grad

functional: Any = dk.functional
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
    """Plain torch with matrices: what autocast and low precision make of nn.Linear."""
    somas = torch.repeat_interleave(torch.arange(c.num_somas), c.soma_ptr.long().diff())
    soma_mask = somas == torch.arange(c.num_somas)[:, None]

    def layer(x: Any, weight: Any, bias: Any, cable: Any = None, soma_bias: Any = None) -> Any:
        mask = c.to_mask().to(x.device)
        u = F.linear(x, weight.new_zeros(mask.shape).masked_scatter(mask, weight), bias)
        if cable is None:
            return u
        matrix = cable.new_zeros(soma_mask.shape).masked_scatter(soma_mask.to(x.device), cable)
        return F.leaky_relu(F.linear(F.leaky_relu(u, 0.1), matrix, soma_bias), 0.1)

    return layer


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
    plain = run(masked_dense(c), tensors[:3], grad)
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
    assert oracle.same(sparse, rounded, backend)  # one rounding, of the float32 result


@pytest.mark.parametrize("activation", ["relu", "tanh", "leaky_relu"])
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "sparse"])
def test_autocast_of_every_path(
    backend: str, low: torch.dtype, activation: str, dense: bool
) -> None:
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
    exact = layer(x)
    with oracle.autocast(torch.bfloat16):
        assert layer(x).dtype == torch.float64
        assert oracle.same(layer(x), exact, backend)
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
    assert oracle.same(actual, expected, backend)


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


@pytest.mark.parametrize("low_samples", [True, False], ids=["low", "float32"])
def test_backward_keeps_samples_as_they_came(
    backend: str, low: torch.dtype, low_samples: bool
) -> None:
    """No float32 copy of x or y lives until backward."""
    layer = dk.DendriticLayer(NETWORKS["constant fan-in"]())
    x = torch.randn(64, 100).to(low if low_samples else torch.float32)
    kept: list[torch.Tensor] = []
    with (
        torch.autocast("cpu", dtype=low),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        y = layer(x)
    assert y.dtype == low
    assert any(t.data_ptr() == x.data_ptr() for t in kept)
    copies = [t for t in kept if t.shape == x.shape and t.data_ptr() != x.data_ptr()]
    assert copies == []


def test_low_precision_differentiates_twice(low: torch.dtype) -> None:
    """In float32, rounded once: at most twice the error of plain torch in the same dtype."""
    c = NETWORKS["constant fan-in"]()
    tensors = [t.to(low) for t in draw(c, 9, torch.float32, somas=True)]

    def second(function: Function, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        (dx,) = torch.autograd.grad(function(*leaves).sum(), leaves[:1], create_graph=True)
        return list(torch.autograd.grad(dx.square().sum(), [leaves[1], leaves[3]]))

    exact = second(lambda *t: formula.dendritic_layer(*t, c, 0.1), [t.double() for t in tensors])
    plain = second(masked_dense(c), tensors)
    check(second(lambda *t: functional.dendritic_layer(*t, c), tensors), plain, exact)


# precision="bf16"


PRECISE = {"precision": "bf16"}


@pytest.mark.parametrize("batch", [1, 33])
@pytest.mark.parametrize("network", ["constant fan-in", "ragged", "receptive fields", "wide"])
def test_bf16_inputs_equal_rounded_inputs(backend: str, network: str, batch: int) -> None:
    c = NETWORKS[network]()
    x, *parameters = draw(c, batch, torch.float32, somas=True)
    rounded = x.bfloat16().float()
    assert oracle.same(
        functional.dendritic_layer(x, *parameters, c, **PRECISE),
        functional.dendritic_layer(rounded, *parameters, c),
        backend,
    )
    assert oracle.same(
        functional.sparse_linear(x, *parameters[:2], c, **PRECISE),
        functional.sparse_linear(rounded, *parameters[:2], c),
        backend,
    )
    pixels = torch.randint(0, 257, x.shape).float()
    assert oracle.same(
        functional.dendritic_layer(pixels, *parameters, c, **PRECISE),
        functional.dendritic_layer(pixels, *parameters, c),
        backend,
    )


def test_bf16_inputs_stay_within_the_documented_error(backend: str) -> None:
    c = NETWORKS["constant fan-in"]()
    x, weight, bias, *_ = draw(c, 65, torch.float32, somas=True)
    u = functional.sparse_linear(x, weight, bias, c, **PRECISE).double()
    exact = formula.sparse_linear(x.double(), weight.double(), bias.double(), c)
    size = formula.sparse_linear(x.abs().double(), weight.abs().double(), None, c)
    error = (u - exact).abs()
    assert (error <= 2**-8 * size + 1e-6).all()
    assert error.max() > 1e-4  # x was rounded indeed


@pytest.mark.parametrize("somas", [True, False], ids=["dendritic", "sparse"])
def test_backward_of_bf16_inputs_is_that_of_x(backend: str, somas: bool) -> None:
    """Gradients are those at x itself, wherever rounding moved no activation across 0."""
    c = NETWORKS["constant fan-in"]()
    tensors = draw(c, 33, torch.float32, somas)
    tensors[0] = torch.randint(-9, 9, tensors[0].shape) + 2**-12  # rounds to integers
    function = functional.dendritic_layer if somas else functional.sparse_linear
    grad = draw_grad(33, c.num_somas if somas else c.num_dendrites, torch.float32)
    ours = run(lambda *t: function(*t, c, **PRECISE), tensors, grad)
    exact = run(lambda *t: function(*t, c), tensors, grad)
    if not somas:
        assert all(oracle.same(a, e, backend) for a, e in zip(ours[1:], exact[1:], strict=True))
    assert ours[1].dtype == torch.float32
    for a, e in zip(ours[1:], exact[1:], strict=True):
        assert oracle.relative_error(a, e) < 0.02


@pytest.mark.parametrize("activation", ["leaky_relu", "tanh"])
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "sparse"])
def test_bf16_inputs_of_every_path(backend: str, activation: str, dense: bool) -> None:
    c = Connectivity.from_mask(torch.ones(6, 5).bool(), dendrites_per_soma=2)
    c = c if dense else NETWORKS["ragged"]()
    layer = dk.DendriticLayer(c, activation=activation, precision="bf16")
    plain = dk.DendriticLayer(c, activation=activation)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(9, c.in_features)
    x[0, 0] = float("inf")
    rounded = x.bfloat16().float()
    torch.testing.assert_close(layer(x), plain(rounded), equal_nan=True)
    x[0, 0] = rounded[0, 0] = 0
    per_sample = torch.func.vmap(torch.func.grad(lambda x: layer(x).sum()))(x)
    assert per_sample.dtype == torch.float32
    way = "reference" if dense else backend  # dense synapses are a product of torch
    assert oracle.same(torch.func.vmap(layer)(x), torch.func.vmap(plain)(rounded), way)
    x = x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(per_sample, x.grad)
    assert not torch.equal(x.grad, x.grad.bfloat16().float())  # the gradient is not rounded


def test_bf16_inputs_compile(backend: str) -> None:
    torch._dynamo.reset()
    layer = dk.DendriticLayer(NETWORKS["constant fan-in"](), precision="bf16")
    x = torch.randn(9, 100)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    assert oracle.same(y, layer(x), backend)
    y.sum().backward()
    assert layer.synapse_weight.grad is not None
    sparse = dk.SparseLinear(NETWORKS["constant fan-in"](), precision="bf16")
    y = torch.compile(sparse, fullgraph=True, backend="aot_eager")(x)
    assert oracle.same(y, sparse(x), backend)


def test_precision_is_checked_and_shown() -> None:
    c = NETWORKS["ragged"]()
    for layer_class in (dk.DendriticLayer, dk.SparseLinear):
        with pytest.raises(ValueError, match="Expected precision None or 'bf16', got 'fp8'"):
            layer_class(c, precision="fp8")
        layer = layer_class(c, precision="bf16")
        assert "precision=bf16" in repr(layer)
        assert "precision" not in repr(layer_class(c))
        with pytest.raises(ValueError, match=r"Expected precision None .*float64, got 'bf16'"):
            layer.double()(torch.randn(3, 61, dtype=torch.float64))
