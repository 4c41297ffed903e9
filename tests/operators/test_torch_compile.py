"""The operators as torch's compiler sees them: opcheck, fake and meta tensors, torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config as inductor_config
from torch.utils._pytree import tree_map_only

import dendrite_kernels as dk
from dendrite_kernels import operators
from tests import oracle
from tests.networks import NETWORKS

functional: Any = dk.functional

FORWARD = torch.ops.dendrite_kernels.forward.default
BACKWARD = torch.ops.dendrite_kernels.backward.default


@pytest.fixture(params=["cpp", "numba"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels; the reference backend is a formula, which nobody compiles."""
    name: str = request.param
    entry = dk.backend_info()[name]
    if not entry["available"]:
        pytest.skip(f"backend {name}: {entry['reason']}")
    with dk.use_backend(name):
        yield name


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    # A cache on disk would answer with what another version of these operators returned.
    with inductor_config.patch(force_disable_caches=True):
        yield
    torch._dynamo.reset()


@pytest.fixture(params=["aot_eager", "inductor"])
def mode(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "inductor":
        request.getfixturevalue("inductor")
    return name


def network(seed: int = 0) -> nn.Sequential:
    first = dk.connectivity.random(30, 10, 4, 6, seed=seed)
    second = dk.connectivity.random(10, 5, 3, 4, constant_fan_in=True, seed=seed)
    return nn.Sequential(
        dk.DendriticLayer(first),
        dk.SparseLinear(second),
        nn.LeakyReLU(),
        nn.Linear(second.num_dendrites, 3),
    )


def train(
    model: nn.Module, step: Callable[..., torch.Tensor], batches: list[int]
) -> list[torch.Tensor]:
    """Losses of SGD steps on drawn batches of the given sizes, then the parameters."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for i, batch in enumerate(batches):
        x = oracle.drawn(batch, 30, seed=i)
        loss = step(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses + [p.detach() for p in model.parameters()]


@pytest.mark.parametrize(
    ("name", "biased"),
    [
        ("constant fan-in", True),
        ("variable fan-in", False),
        ("ragged", True),
        ("ragged", False),
        ("no synapse", True),
    ],
)
def test_opcheck(backend: str, name: str, biased: bool) -> None:
    """Schemas, fake kernels, and tracing with dynamic shapes, of both operators."""
    c = NETWORKS[name]()
    x = torch.randn(5, c.in_features)
    weight, bias = torch.randn(c.nnz), torch.randn(c.num_dendrites) if biased else None
    cable, soma_bias = torch.randn(c.num_dendrites), torch.randn(c.num_somas) if biased else None
    indices = operators.index_tensors(c)
    for save_signs in (True, False):
        torch.library.opcheck(
            FORWARD, (x, weight, bias, cable, soma_bias, *indices, 0.1, 0.1, save_signs)
        )
    y, signs = FORWARD(x, weight, bias, cable, soma_bias, *indices, 0.1, 0.1, True)
    torch.library.opcheck(FORWARD, (x, weight, bias, None, None, *indices, 1.0, 1.0, False))
    for need_x in (True, False):
        torch.library.opcheck(
            BACKWARD,
            (torch.ones_like(y), x, y, signs, weight, bias, cable, *indices, 0.1, 0.1, need_x),
        )
        grad = torch.randn(5, c.num_dendrites)
        torch.library.opcheck(
            BACKWARD, (grad, x, None, None, weight, bias, None, *indices, 1.0, 1.0, need_x)
        )
    for leaf in (x, weight, bias, cable, soma_bias):
        if leaf is not None:
            leaf.requires_grad_()
    torch.library.opcheck(FORWARD, (x, weight, bias, cable, soma_bias, *indices, 0.1, 0.1, True))
    torch.library.opcheck(FORWARD, (x, weight, bias, None, None, *indices, 1.0, 1.0, False))


def test_index_tensors_of_no_connectivity_are_validated(backend: str) -> None:
    """An exported program calls the operators with index tensors of its own."""
    c = NETWORKS["ragged"]()
    x, weight = torch.randn(5, c.in_features), torch.randn(c.nnz)
    copies = [t.clone() for t in operators.index_tensors(c)]
    u, _ = FORWARD(x, weight, None, None, None, *copies, 1.0, 1.0, False)
    assert torch.equal(u, functional.sparse_linear(x, weight, None, c))
    copies[1][0] = c.in_features
    columns = copies[1].clone()
    with pytest.raises(ValueError, match="Expected columns"):
        FORWARD(x, weight, None, None, None, copies[0], columns, copies[2], 1.0, 1.0, False)


def test_columns_of_a_connectivity_serve_other_somas(backend: str) -> None:
    """They lead back to their Connectivity, which is not the one that is meant."""
    c = dk.Connectivity.from_csr([0, 1, 2, 4], [0, 1, 0, 1], 2, soma_ptr=[0, 1, 3])
    x, weight, cable = torch.randn(3, 2), torch.randn(4), torch.randn(3)
    crow, col, own = operators.index_tensors(c)
    for soma_ptr in (own, torch.tensor([0, 2, 3], dtype=torch.int32)):
        other = dk.Connectivity.from_csr(crow, col, 2, soma_ptr)
        expected = dk.reference.dendritic_layer(x, weight, None, cable, None, other)
        y, _ = FORWARD(x, weight, None, cable, None, crow, col, soma_ptr, 0.1, 0.1, False)
        torch.testing.assert_close(y, expected)


def test_compiled_forward(backend: str, mode: str) -> None:
    model = network()
    compiled = torch.compile(model, fullgraph=True, backend=mode)
    x = torch.randn(7, 30)
    with torch.no_grad():
        assert oracle.relative_error(compiled(x), model(x)) < 1e-6
    assert oracle.relative_error(compiled(x), model(x)) < 1e-6


def test_compiled_training_equals_eager(backend: str, mode: str) -> None:
    batches = [8, 16, 33, 5, 64]
    eager, model = network(), network()
    model.load_state_dict(eager.state_dict())
    compiled = torch.compile(model, fullgraph=True, backend=mode, dynamic=True)
    expected = train(eager, eager, batches)
    assert max(oracle.errors(train(model, compiled, batches), expected)) < 1e-5


def test_changing_batches_compile_twice(backend: str) -> None:
    """Once for the first batch size, once for any: no recompilation storm."""
    counter = CompileCounterWithBackend("aot_eager")
    model = network()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    train(model, compiled, [8, 16, 33, 5, 64, 128, 3, 200])
    assert counter.frame_count == 2


def test_dynamic_batches_compile_once(backend: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    model = network()
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    train(model, compiled, [8])
    first = counter.frame_count
    train(model, compiled, [16, 33, 5, 64])
    assert counter.frame_count == first


def test_networks_of_equal_shape_share_compiled_code(backend: str) -> None:
    """Connections are data, not constants: a new draw needs no new code."""
    counter = CompileCounterWithBackend("aot_eager")
    c = [dk.connectivity.random(30, 10, 4, 6, constant_fan_in=True, seed=s) for s in range(4)]
    weight, bias, cable = torch.randn(c[0].nnz), torch.randn(40), torch.randn(40)
    compiled = torch.compile(
        lambda x, c: functional.dendritic_layer(x, weight, bias, cable, None, c),
        fullgraph=True,
        backend=counter,
    )
    x = torch.randn(7, 30)
    for connections in c:
        expected = functional.dendritic_layer(x, weight, bias, cable, None, connections)
        assert torch.equal(compiled(x, connections), expected)
    assert counter.frame_count == 1


def test_what_a_backend_derives_is_not_traced() -> None:
    """Behind a graph break the compiler tries every frame: numpy code must stay numpy code."""
    c, found = NETWORKS["ragged"](), []

    def factory() -> np.ndarray[Any, Any]:
        array = np.zeros(4, np.uint16)
        array[np.array([1, 2])] = 7
        found.append(torch.compiler.is_compiling() or array.size)
        return array

    def run(x: torch.Tensor) -> torch.Tensor:
        return x + int(c.cached("test", factory).sum())

    x = torch.randn(3)
    assert torch.equal(torch.compile(run, backend="aot_eager")(x), x + 14)
    assert found == [4]
    assert c.cached("a class", dict) == {}


@pytest.mark.parametrize("activation", ["relu", "identity", "tanh", "gelu"])
def test_other_activations_compile(backend: str, activation: str) -> None:
    layer = dk.DendriticLayer(NETWORKS["ragged"](), activation=activation)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(7, layer.connectivity.in_features, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    (actual,) = torch.autograd.grad(compiled(x).sum(), x)
    assert oracle.relative_error(actual, expected) < 1e-6


def test_leading_dimensions_compile(backend: str) -> None:
    model = network()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in [(4, 5, 30), (2, 3, 30)]:
        x = torch.randn(shape)
        assert oracle.relative_error(compiled(x), model(x)) < 1e-6


def test_fake_tensors() -> None:
    """Shapes without memory, also on a device that this machine may not have."""
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        c = NETWORKS["ragged"]()
        sizes = (33, 61), (c.nnz,), (40,), (40,), (6,)
        y = functional.dendritic_layer(*(torch.empty(s, device="cuda") for s in sizes), c)
        assert (y.shape, y.device.type) == ((33, 6), "cuda")
        layer = dk.DendriticLayer(c)
        x = torch.empty(33, 61, requires_grad=True)
        layer(x).sum().backward()
        for tensor in (x, *layer.parameters()):
            assert tensor.grad is not None
            assert tensor.grad.shape == tensor.shape


@pytest.mark.parametrize("batch", [0, 1, 31, 32, 33, 64])
def test_tensors_without_memory_have_the_shapes_of_real_ones(backend: str, batch: int) -> None:
    """Sign words above all, each of which serves 32 samples."""
    c = NETWORKS["ragged"]()
    sizes = (batch, c.in_features), (c.nnz,), (c.num_dendrites,), (c.num_dendrites,), (c.num_somas,)
    tensors = [*map(torch.randn, sizes), *operators.index_tensors(c)]
    real = FORWARD(*tensors, 0.1, 0.1, True)
    empty = FORWARD(*(t.to("meta") for t in tensors), 0.1, 0.1, True)
    assert [t.shape for t in empty] == [t.shape for t in real]


def test_meta_construction_and_materialisation(backend: str) -> None:
    model = network()
    with torch.device("meta"):
        empty = network()
    assert all(p.is_meta for p in empty.parameters())
    x = torch.empty(7, 30, device="meta", requires_grad=True)
    empty(x).sum().backward()
    assert empty(x).shape == (7, 3)
    assert x.grad is not None
    assert x.grad.is_meta
    assert empty.state_dict().keys() == model.state_dict().keys()

    empty.to_empty(device=torch.get_default_device()).load_state_dict(model.state_dict())
    x = torch.randn(7, 30)
    assert torch.equal(empty(x), model(x))

    layer = dk.DendriticLayer(NETWORKS["ragged"](), device="meta").to_empty(
        device=torch.get_default_device()
    )
    layer.reset_parameters()
    assert all(p.isfinite().all() for p in layer.parameters())
    assigned = dk.DendriticLayer(NETWORKS["ragged"](), device="meta")
    assigned.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(3, 61)
    assert torch.equal(assigned(x), layer(x))


class Wrapper(torch.Tensor):
    """Holds its numbers in another tensor: it has no memory of its own that a kernel could read."""

    inner: torch.Tensor
    called: ClassVar[list[str]] = []

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapper:
        made: Wrapper = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, dtype=inner.dtype, requires_grad=False
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        cls.called.append(str(function))
        args, kwargs = tree_map_only(Wrapper, lambda t: t.inner, (args, kwargs or {}))
        return function(*args, **kwargs)


@pytest.mark.parametrize("which", range(5))
def test_any_operand_may_be_a_subclass_without_memory(backend: str, which: int) -> None:
    """Both operators go through the dispatcher, which takes it apart; no pointer of it is read."""
    c = NETWORKS["ragged"]()
    sizes = (3, 61), (c.nnz,), (c.num_dendrites,), (c.num_dendrites,), (c.num_somas,)
    operands = [torch.randn(size, requires_grad=True) for size in sizes]
    y = functional.dendritic_layer(*operands, c)
    expected = [y, *torch.autograd.grad(y.sum(), operands)]
    operands[which] = Wrapper(operands[which].detach()).requires_grad_()
    Wrapper.called.clear()
    y = functional.dendritic_layer(*operands, c)
    found = [y, *torch.autograd.grad(y.sum(), operands)]
    assert all(oracle.same(a, b, backend) for a, b in zip(found, expected, strict=True))
    # soma_bias is no operand of backward
    wanted = ["forward"] if which == 4 else ["forward", "backward"]
    ours = [name for name in Wrapper.called if name.startswith("dendrite_kernels")]
    assert ours == [f"dendrite_kernels.{name}.default" for name in wanted]


def test_a_profile_shows_the_operators(backend: str) -> None:
    layer = dk.DendriticLayer(NETWORKS["ragged"]())
    with torch.profiler.profile() as profile:
        layer(torch.randn(3, 61)).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert "dendrite_kernels::forward" in names
    assert "dendrite_kernels::backward" in names
