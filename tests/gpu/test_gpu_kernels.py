"""The CUDA backend on a GPU: exact, deterministic, on any stream, without synchronisation."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch

import dendrite_kernels as dk
from dendrite_kernels.backends import cuda
from dendrite_kernels.backends.cuda import _Layout as Layout
from dendrite_kernels.backends.protocol import AdamStep, Gradients, Operands
from tests import oracle
from tests.cuda_emulator import check

CASES = [*check.ALL, *check.LONG, *check.WIDE]


@pytest.fixture
def any_kind() -> Iterator[None]:
    """Undo what a case asked of the planner."""
    yield
    check.allow_kind(None)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_result_matches_float64_and_repeats_bit_for_bit(
    case: check.Case, any_kind: None
) -> None:
    results = check.run(case, "cuda")
    assert not check.faults(case, results, check.expected(case, "cuda"))
    for _ in range(3):
        again = check.run(case, "cuda")
        assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))


SIZES = {  # batch, inputs, somas, dendrites, synapses
    "A": (128, 784, 256, 16, 16),
    "B": (128, 784, 512, 64, 16),
    "C": (128, 3072, 512, 32, 48),
    "D/8": (128, 4096, 4096, 16, 32),
    "wide": (96, 40000, 300, 7, 11),
}


def layer_of(name: str, rule: str = "random") -> tuple[dk.DendriticLayer, torch.Tensor]:
    """A layer and x of few bits: no rounding of u, so that no slope depends on it."""
    batch, inputs, somas, dendrites, synapses = SIZES[name]
    constant = rule == "constant"
    c = dk.connectivity.random(inputs, somas, dendrites, synapses, constant_fan_in=constant, seed=1)
    layer = dk.DendriticLayer(c, device="cuda")
    with torch.no_grad():
        for bias in (layer.dendrite_bias, layer.soma_bias):
            assert bias is not None
            bias.normal_()
        for parameter in (layer.synapse_weight, layer.dendrite_bias):
            assert parameter is not None
            parameter.copy_((256 * parameter).round() / 256)
        x = (16 * torch.randn(batch, inputs, device="cuda")).round() / 16
    return layer, x.requires_grad_()


@pytest.mark.parametrize("rule", ["constant", "random"])
@pytest.mark.parametrize("name", SIZES)
def test_layers_of_real_size_match_float64(name: str, rule: str) -> None:
    layer, x = layer_of(name, rule)
    y = layer(x)
    grad = torch.randn_like(y) + 1
    y.backward(grad)
    leaves = [t.detach().double().requires_grad_() for t in (x, *layer.parameters())]
    x64, weight, dendrite_bias, cable, soma_bias = leaves
    want = oracle.dendritic_layer(
        x64, weight, dendrite_bias, cable, soma_bias, layer.connectivity, 0.1
    )
    wanted = torch.autograd.grad(want, leaves, grad.double())
    got = [y.detach(), x.grad, *(p.grad for p in layer.parameters())]
    for tensor, reference in zip(got, [want.detach(), *wanted], strict=True):
        assert tensor is not None
        assert oracle.relative_error(tensor, reference) < 2e-6


def test_the_current_stream_is_used() -> None:
    layer, x = layer_of("A")
    expected = layer(x).detach()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        late = torch.empty_like(x)
        torch.cuda._sleep(50_000_000)  # a kernel on another stream would read before this copy
        late.copy_(x)
        y = layer(late).detach()
    side.synchronize()
    assert torch.equal(y, expected)


def test_no_call_synchronises() -> None:
    layer, x = layer_of("B")
    layer(x).sum().backward()  # copies the synapses
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_tensors_device_is_used() -> None:
    layer, x = layer_of("A")
    expected = layer(x).detach().cpu()
    y = layer.to("cuda:1")(x.detach().to("cuda:1"))  # the current device stays cuda:0
    assert torch.equal(y.detach().cpu(), expected)


def capturable_adam(parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Adam:
    return torch.optim.Adam(parameters, lr=1e-3, capturable=True, fused=True)


def training_step(
    layer: torch.nn.Module, optimizer: torch.optim.Optimizer | None, x: torch.Tensor
) -> torch.Tensor:
    """Without an optimizer backward is the step."""
    loss: torch.Tensor = layer(x).square().mean()
    if optimizer is not None:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if optimizer is not None:
        optimizer.step()
    return loss.detach()


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_adam_in_the_kernel_trains_as_the_optimizer(
    kind: type[torch.optim.Adam], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = layer_of("A")
    twin, x = copy.deepcopy(layer), x.detach()

    def make(parameters: list[torch.nn.Parameter]) -> torch.optim.Adam:
        return kind(parameters, lr=1e-2, eps=1e-4, weight_decay=0.1, fused=True)

    dk.optim.StepInBackward(layer.parameters(), make)
    optimizer = make(list(twin.parameters()))
    steps = []
    plain = cuda.backward

    def backward(*arguments: Any, step: AdamStep | None = None) -> Gradients:
        steps.append(step)
        return plain(*arguments, step=step)

    monkeypatch.setattr(cuda, "backward", backward)
    for _ in range(5):
        layer(x).square().mean().backward()
        training_step(twin, optimizer, x)
    assert [step is not None for step in steps[::2]] == [False, True, True, True, True]
    assert not any(steps[1::2])  # of the twin
    for ours, theirs in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_training_step_replays_as_a_graph(in_backward: bool) -> None:
    finals = []
    for use_graph in (False, True):
        torch.manual_seed(0)
        layer, x = layer_of("A")
        x = x.detach()
        optimizer: Any = None
        if in_backward:
            dk.optim.StepInBackward(layer.parameters(), capturable_adam)
        else:
            optimizer = capturable_adam(layer.parameters())
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                training_step(layer, optimizer, x)
        torch.cuda.current_stream().wait_stream(side)
        if use_graph:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                training_step(layer, optimizer, x)
            for _ in range(5):
                graph.replay()
        else:
            for _ in range(5):
                training_step(layer, optimizer, x)
        finals.append([p.detach().clone() for p in layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*finals, strict=True))


def test_a_capture_without_a_warm_up_is_an_error() -> None:
    layer, x = layer_of("A")
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match="Expected a call with a batch of this size before"),
        torch.cuda.graph(graph),
    ):
        layer(x)


def test_synapses_outlive_the_kernels_of_another_stream() -> None:
    layer, x = layer_of("B")
    parameters = list(layer.parameters())  # these are the caller's to keep
    expected = layer(x).detach()
    packed = [value for value in layer.connectivity.derived.values() if isinstance(value, Layout)]
    sizes = [tensor.nbytes for layout in packed for tensor in layout.tensors]
    first = weakref.ref(packed[0].tensors[0])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        y = layer(x).detach()
    # The synapses are freed while the other stream has yet to read them. Blocks of their sizes
    # would take their memory.
    del layer, packed
    assert first() is None
    blocks = [torch.zeros(size, dtype=torch.uint8, device="cuda") for size in 8 * sizes]
    side.synchronize()
    del blocks, parameters
    assert torch.equal(y, expected)


def test_training_equals_the_masked_dense_twin() -> None:
    layer, x = layer_of("A")
    x = x.detach()
    dense, dense_mask, soma, soma_mask = dk.interop.to_masked_dense(layer)
    twin = torch.nn.Sequential(dense, torch.nn.LeakyReLU(0.1), soma, torch.nn.LeakyReLU(0.1))
    ours = torch.optim.SGD(layer.parameters(), lr=0.05)
    theirs = torch.optim.SGD(twin.parameters(), lr=0.05)
    for _ in range(10):
        training_step(layer, ours, x)
        twin(x).square().mean().backward()
        assert dense.weight.grad is not None
        assert soma.weight.grad is not None
        dense.weight.grad.mul_(dense_mask)
        soma.weight.grad.mul_(soma_mask)
        theirs.step()
        theirs.zero_grad()
    assert oracle.relative_error(layer(x).detach(), twin(x).detach()) < 1e-5


def test_all_to_all_is_a_matrix_product_with_a_block_sum_cable() -> None:
    c = dk.connectivity.all_to_all(784, 128, 16)
    layer = dk.DendriticLayer(c, device="cuda")
    x = torch.randn(64, 784, device="cuda")
    layer(x)  # the first matrix product allocates cuBLAS's workspace
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = layer(x)
    # u and a [B, R], y, and less than one [S, R] matrix besides.
    assert torch.cuda.max_memory_allocated() - before < 4 * (4 * 64 * 2048 + 128 * 2048)
    weight, dendrite_bias, cable, soma_bias = (p.detach().double() for p in layer.parameters())
    want = dk.reference.dendritic_layer(x.double(), weight, dendrite_bias, cable, soma_bias, c)
    assert oracle.relative_error(y.detach().cpu(), want.cpu()) < 2e-6


def test_offsets_beyond_31_bits() -> None:
    batch, inputs = 33000, 70000  # 2.3e9 elements of x, in two bytes each
    needed = 3 * 2 * batch * inputs
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of free memory")
    c = dk.connectivity.random(inputs, 3, 4, 16, constant_fan_in=True, seed=1)
    check.poison(False)  # the fixture of every test turns it on again
    x = torch.randn(batch, inputs, device="cuda", dtype=torch.bfloat16)
    parameters = [torch.randn(n, device="cuda") for n in (c.nnz, 12, 12, 3)]
    weight, dendrite_bias, cable, soma_bias = parameters
    operands = Operands(weight, dendrite_bias, cable, soma_bias, c, 0.1, 0.1)
    y, signs = cuda.forward(x, operands, True, False)
    grad = torch.randn_like(y)
    dx = cuda.backward(grad, x, y, signs, operands, True)[0]
    tail = x[-40:].cpu().double().requires_grad_()
    weight, dendrite_bias, cable, soma_bias = (p.cpu().double() for p in parameters)
    want = oracle.dendritic_layer(tail, weight, dendrite_bias, cable, soma_bias, c, 0.1, 0.1)
    (dx_want,) = torch.autograd.grad(want, tail, grad[-40:].cpu().double())
    assert oracle.relative_error(y[-40:].cpu(), want.detach()) < 8e-3
    assert oracle.relative_error(dx[-40:].cpu(), dx_want) < 8e-3


def test_memory_of_a_step_is_that_of_the_synapses() -> None:
    layer, x = layer_of("C", "constant")
    x = x.detach()
    layer(x).sum().backward()
    layer.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    layer(x).sum().backward()
    growth = torch.cuda.max_memory_allocated() - before
    synapses = 4 * layer.connectivity.nnz
    # The gradient, at most max(64 MiB, twice the gradient) of partial sums, packed weights.
    assert growth < max(64 << 20, 2 * synapses) + 4 * synapses


def test_stacked_networks_equal_their_parts() -> None:
    parts = [dk.connectivity.random(784, 10, 8, 16, seed=seed) for seed in range(16)]
    stacked = dk.DendriticLayer(dk.Connectivity.stack(parts), device="cuda")
    x = torch.randn(128, 784, device="cuda")
    y = stacked(x).detach()
    starts = torch.tensor([0, *(c.nnz for c in parts)]).cumsum(0).tolist()
    for i, c in enumerate(parts):
        single = dk.DendriticLayer(c, bias=False, device="cuda")
        with torch.no_grad():
            single.synapse_weight.copy_(stacked.synapse_weight[starts[i] : starts[i + 1]])
            single.cable_weight.copy_(stacked.cable_weight[80 * i : 80 * (i + 1)])
        assert oracle.relative_error(y[:, 10 * i : 10 * (i + 1)], single(x).detach()) < 1e-6
