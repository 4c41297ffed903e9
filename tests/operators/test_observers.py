"""What watches a model sees the operator: a layer that has run before, too, hides from nothing.

The fast path past the dispatcher is taken from the second call on, so every layer here is warm.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import dendrite_kernels as dk

KINDS = {
    "dendritic": lambda: dk.DendriticLayer(fields()),
    "sparse": lambda: dk.SparseLinear(fields()),
    "tanh": lambda: dk.DendriticLayer(fields(), activation="tanh"),
    "network": lambda: dk.models.build("dANN-LRF", (6, 6), 9, 2, 4, 3, layers=2, seed=0),
}
kinds = pytest.mark.parametrize("kind", KINDS)
FORWARD, BACKWARD = torch.ops.dendrite_kernels.forward, torch.ops.dendrite_kernels.backward


def fields() -> dk.Connectivity:
    return dk.connectivity.local_receptive_fields((6, 6), 9, 2, 4, seed=0)


def warm(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = KINDS[kind]()
    for _ in range(2):
        model(torch.randn(2, 36, requires_grad=True)).sum().backward()
    model.zero_grad()
    return model


# Tracers


@kinds
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("is_warm", [True, False])
def test_jit_trace(kind: str, grad: bool, frozen: bool, is_warm: bool) -> None:
    """It computes what the model does, for other inputs and batches, from a file, and trains."""
    model = (warm(kind) if is_warm else KINDS[kind]()).requires_grad_(not frozen)
    x, other = torch.randn(5, 36), torch.randn(33, 36)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, x)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    for program in (traced, torch.jit.load(file)):
        for inputs in (x, other, other):
            assert torch.equal(program(inputs), model(inputs))
        if not frozen:
            program.zero_grad()
            model.zero_grad()
            program(other).sum().backward()
            gradients = {name: p.grad for name, p in program.named_parameters()}
            model(other).sum().backward()
            for name, p in model.named_parameters():
                torch.testing.assert_close(gradients[name], p.grad)


@kinds
def test_jit_script_names_the_remedy(kind: str) -> None:
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace, or .*interop\.portable"):
        torch.jit.script(warm(kind))


@kinds
def test_symbolic_trace_names_the_remedy(kind: str) -> None:
    model, x = warm(kind), torch.randn(4, 36)
    with pytest.raises(TypeError, match=r"got Proxy: .*interop\.portable"):
        torch.fx.symbolic_trace(model)
    traced = torch.fx.symbolic_trace(dk.interop.portable(model))
    torch.testing.assert_close(traced(x), model(x))


@kinds
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_export_names_the_remedy(kind: str, dynamo: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    with pytest.raises(Exception, match=r"interop\.portable") as caught:
        torch.onnx.export(warm(kind), (torch.randn(4, 36),), tmp_path / "m.onnx", dynamo=dynamo)
    assert isinstance(caught.value, RuntimeError)
    assert not list(tmp_path.iterdir())


@kinds
def test_onnx_export_of_a_traced_program_names_the_remedy(kind: str, tmp_path: Path) -> None:
    x = torch.randn(4, 36)
    traced = torch.jit.trace(warm(kind), x)
    with pytest.raises(RuntimeError, match=r"interop\.portable"):
        torch.onnx.export(traced, (x,), tmp_path / "m.onnx", dynamo=False)


@kinds
@pytest.mark.parametrize("grad", [True, False])
def test_make_fx(kind: str, grad: bool) -> None:
    model, x, other = warm(kind), torch.randn(4, 36), torch.randn(4, 36)
    with torch.set_grad_enabled(grad):
        graph = make_fx(model)(x)
    assert FORWARD.default in {node.target for node in graph.graph.nodes}
    assert torch.equal(graph(other), model(other))


# Modes


class Dispatched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@kinds
def test_dispatch_modes_see_forward_and_backward(backend: str, kind: str) -> None:
    model = warm(kind)
    with Dispatched() as mode:
        model(torch.randn(4, 36)).sum().backward()
    assert {FORWARD.default, BACKWARD.default} <= set(mode.seen)


@kinds
def test_function_modes_see_forward(backend: str, kind: str) -> None:
    """As they see F.linear in nn.Linear."""
    model = warm(kind)
    with Called() as mode:
        model(torch.randn(4, 36))
    assert FORWARD.default in mode.seen


@kinds
def test_fake_tensors(kind: str) -> None:
    model = warm(kind)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = model(mode.from_tensor(torch.randn(4, 36)))
    assert y.shape == model(torch.randn(4, 36)).shape
    assert type(y).__name__ == "FakeTensor"


@kinds
def test_a_default_fake_mode(kind: str) -> None:
    """Which takes no ordinary tensors: layers made in it, and others with fake parameters."""
    model, x = warm(kind), torch.randn(4, 36)
    with FakeTensorMode() as mode:
        made = KINDS[kind]()
        y = made(torch.randn(4, 36))
        y.sum().backward()
        names = made.state_dict().keys()
    assert names == model.state_dict().keys()
    assert all(type(p.grad).__name__ == "FakeTensor" for p in made.parameters())
    parameters = {name: mode.from_tensor(p) for name, p in model.named_parameters()}
    called = torch.func.functional_call(model, parameters, mode.from_tensor(x))
    for found in (y, called):
        assert (type(found).__name__, found.shape) == ("FakeTensor", model(x).shape)


def test_connectivities_hold_values() -> None:
    c = fields()
    with FakeTensorMode() as mode:
        drawn = fields()
    assert drawn == c
    with pytest.raises(TypeError, match=r"tensor with values, got a torch\.strided FakeTensor"):
        dk.Connectivity.from_csr(mode.from_tensor(c.crow_indices), c.col_indices, 36)


def test_flops_are_those_of_the_weights(backend: str) -> None:
    c, batch = fields(), 5
    x = torch.randn(batch, 36, requires_grad=True)
    for kind, cable in (("dendritic", c.num_dendrites), ("sparse", 0)):
        model = warm(kind)
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        counts = counter.get_flop_counts()["Global"]
        assert counts == {
            FORWARD: 2 * batch * (c.nnz + cable),
            BACKWARD: 2 * batch * (2 * c.nnz + 2 * cable),
        }
        with FlopCounterMode(display=False) as counter:
            model(x.detach()).sum().backward()
        counts = counter.get_flop_counts()["Global"]
        assert counts[BACKWARD] == 2 * batch * (c.nnz + 2 * cable)


def test_flops_of_dense_synapses_are_those_of_linear_layers() -> None:
    """The formulas agree with torch's own for the same network."""
    c, x = dk.connectivity.all_to_all(12, 4, 1), torch.randn(5, 12)
    operands = x, torch.randn(c.nnz), None, None, None, c.crow_indices, c.col_indices, c.soma_ptr
    with FlopCounterMode(display=False) as counter:
        FORWARD(*operands, 1.0, 1.0, False)
        nn.functional.linear(x, torch.randn(4, 12))
    counts = counter.get_flop_counts()["Global"]
    assert counts[FORWARD] == counts[torch.ops.aten.mm]


@kinds
def test_profilers(backend: str, kind: str) -> None:
    model = warm(kind)
    with torch.profiler.profile() as profile:
        model(torch.randn(4, 36)).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"dendrite_kernels::forward", "dendrite_kernels::backward"} <= names


# Hooks of autograd


def test_saved_tensors_hooks_see_what_is_saved(backend: str) -> None:
    model, x, seen = warm("dendritic"), torch.randn(4, 36), []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tensor.shape)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x).sum().backward()
    assert {x.shape, (4, 9), model.synapse_weight.shape} <= set(seen)  # type: ignore[arg-type]


def test_anomaly_mode_names_the_layer(backend: str) -> None:
    model = warm("dendritic")
    with (
        torch.autograd.detect_anomaly(check_nan=True),
        pytest.raises(RuntimeError, match="returned nan values"),
    ):
        model(torch.full((2, 36), float("nan"))).sum().backward()


@pytest.mark.parametrize("transform", [torch.func.vmap, lambda f: f], ids=["vmap", "plain"])
def test_functorch_levels(backend: str, transform: Callable[[Any], Any]) -> None:
    model = warm("dendritic")
    x = torch.randn(3, 4, 36)
    torch.testing.assert_close(transform(model)(x), model(x))
    _, tangent = torch.func.jvp(model, (x[0],), (x[1],))
    _, back = torch.func.vjp(model, x[0])
    (cotangent,) = back(torch.ones(4, 9))
    torch.testing.assert_close((cotangent * x[1]).sum(), tangent.sum())
