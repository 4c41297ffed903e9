"""What prepares and judges the work of a GPU mixes no devices: fake tensors on "meta" show it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import dendrite_kernels as dk
from bench.gpu import problem, timing
from dendrite_kernels.backends import cuda
from dendrite_kernels.backends.protocol import Operands
from dendrite_kernels.benchmark.case import Case
from tests.cuda_emulator import check

NETWORK = dk.connectivity.random(52, 5, 3, 16, constant_fan_in=True, seed=1)
BATCH = 65


class On(TorchFunctionMode):
    """Another device in place of "cuda"."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = {name: self._other(value) for name, value in (kwargs or {}).items()}
        return func(*map(self._other, args), **named)

    def _other(self, value: Any) -> Any:
        is_device = isinstance(value, str | torch.device) and str(value).startswith("cuda")
        return torch.device(self.device) if is_device else value


class Owners(TorchDispatchMode):
    """The only sizes that depend on values: how many synapses and dendrites have owners."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.repeat_interleave.Tensor:
            of_somas = len(args[0]) == NETWORK.num_somas
            return args[0].new_empty(NETWORK.num_dendrites if of_somas else NETWORK.nnz)
        return func(*args, **(kwargs or {}))


def forward(x: Tensor, operands: Operands, *_: bool) -> tuple[Tensor, Tensor]:
    rows = NETWORK.num_dendrites
    outputs = rows if operands.cable_weight is None else NETWORK.num_somas
    words = x.new_empty(((len(x) + 31) // 32, rows), dtype=torch.int32)
    return x.new_empty((len(x), outputs)), words


def backward(grad: Tensor, x: Tensor, *_: object) -> tuple[Tensor, ...]:
    c = NETWORK
    sizes = c.nnz, c.num_dendrites, c.num_dendrites, c.num_somas
    return torch.empty_like(x), *(x.new_empty(size) for size in sizes)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(check.NETWORKS, "constant", lambda: NETWORK)
    monkeypatch.setattr(cuda, "forward", forward)
    monkeypatch.setattr(cuda, "backward", backward)
    with FakeTensorMode(allow_non_fake_inputs=True), Owners(), On("meta"):
        yield
    check.allow_kind(None)


def test_results_of_the_checks_come_to_the_host(fakes: None) -> None:
    case = check.Case("constant", BATCH)
    results, wanted = check.run(case, "cuda"), check.expected(case, "cuda")
    for got, want in zip(results, wanted, strict=True):
        assert got.device.type == want.device.type == "cpu"
        assert got.shape == want.shape


def prepared(monkeypatch: pytest.MonkeyPatch) -> tuple[dk.DendriticLayer, Tensor, Tensor]:
    monkeypatch.setattr(Case, "connectivity", lambda *_: NETWORK)
    return problem.prepare(Case("A", BATCH, 13, 4, 1, 5, 3, 16))


def test_workloads_and_their_oracle_stay_on_the_device(
    fakes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x, grad = prepared(monkeypatch)
    want = problem.wanted(layer, x, grad)
    found: list[Tensor] = []

    def compare(got: Tensor, want: Tensor) -> float:
        found.append(got - want)
        return 0.0

    monkeypatch.setattr(timing, "relative_error", compare)
    for make in (problem.OURS["ours, fp32"], problem.EmbeddingBag, problem.Gather):
        module = make(layer)
        timing.errors(module, layer, x, grad, want)
        problem.training_step(module, torch.optim.SGD(module.parameters()), x, grad)()
    assert len(found) == 3 * len(want)
    assert {tensor.device.type for tensor in found} == {"meta"}


def test_every_gather_is_compiled_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=cast(Any, counter)))
    with On("cpu"):
        layer, x, _ = prepared(monkeypatch)
    for done in range(1, 11):  # more than torch compiles of one function
        with On("cpu"):
            module = problem.compiled_gather(layer)
        module(x[: 3 * done])
        assert counter.frame_count == done
    for batch in range(1, 8):
        module(x[:batch])
    with pytest.raises(FailOnRecompileLimitHit):
        module(x[:8])
    torch._dynamo.reset()
