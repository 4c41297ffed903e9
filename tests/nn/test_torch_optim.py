"""Training as people do it: every optimizer, accumulation, checkpointing, processes, parametrizing.

Parameters are ordinary dense vectors, so whatever works on nn.Linear's bias must work on them.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, parametrizations, parametrize
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torch.utils.data import DataLoader, Dataset

import dendrite_kernels as dk
from dendrite_kernels import interop
from tests import oracle

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "Adadelta": (torch.optim.Adadelta, {}),
    "Adafactor": (torch.optim.Adafactor, {}),
    "Adagrad": (torch.optim.Adagrad, {}),
    "Adam": (torch.optim.Adam, {"weight_decay": 0.01}),
    "AdamW": (torch.optim.AdamW, {}),
    "Adamax": (torch.optim.Adamax, {}),
    "ASGD": (torch.optim.ASGD, {}),
    "NAdam": (torch.optim.NAdam, {}),
    "RAdam": (torch.optim.RAdam, {}),
    "RMSprop": (torch.optim.RMSprop, {}),
    "Rprop": (torch.optim.Rprop, {}),
    "SGD": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
}
FUSED = {"Adagrad", "Adam", "AdamW", "SGD"}  # what torch fuses on the CPU
WAYS = [
    (name, way)
    for name in OPTIMIZERS
    for way in ("for", "foreach", "fused")
    if way != "fused" or name in FUSED
]


class MaskedDense(nn.Module):
    """The twin of a layer with masked matrices, from the same weights."""

    mask: torch.Tensor
    soma_mask: torch.Tensor

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.dendrite, mask, self.soma, soma_mask = interop.to_masked_dense(layer)
        self.register_buffer("mask", mask)
        self.register_buffer("soma_mask", soma_mask)

    def forward(self, x: torch.Tensor) -> Any:
        f = functools.partial(nn.functional.leaky_relu, negative_slope=0.1)
        a = f(nn.functional.linear(x, self.dendrite.weight * self.mask, self.dendrite.bias))
        return f(nn.functional.linear(a, self.soma.weight * self.soma_mask, self.soma.bias))


def data() -> tuple[torch.Tensor, torch.Tensor]:
    return oracle.drawn(64, 30, seed=1), oracle.drawn(64, 4, seed=2)


def layer() -> dk.DendriticLayer:
    return dk.DendriticLayer(dk.connectivity.random(30, 10, 4, 6, seed=0))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    x, target = data()
    optimizer.zero_grad()
    loss = (model(x) - target).square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_optimizers_match_the_masked_dense_twin(backend: str, name: str, way: str) -> None:
    kind, options = OPTIMIZERS[name]
    if way == "fused":
        if name == "Adagrad" and torch.get_default_device().type != "cpu":
            pytest.skip("torch fuses Adagrad on the CPU only")
        options = {**options, "fused": True}
    elif name != "Adafactor" or way == "foreach":
        options = {**options, "foreach": way == "foreach"}
    ours = nn.Sequential(layer(), nn.Linear(10, 4)).double()
    twin = nn.Sequential(MaskedDense(ours[0]), copy.deepcopy(ours[1]))
    compared = name != "Adafactor"  # it factors matrices, and knows no mask
    x, target = (t.double() for t in data())
    losses = []
    for model in (ours, twin):
        optimizer = kind(model.parameters(), **options)
        for _ in range(5):
            optimizer.zero_grad()
            loss = (model(x) - target).square().mean()
            loss.backward()
            optimizer.step()
        losses.append((model(x) - target).square().mean())
    if compared:
        assert oracle.relative_error(losses[0], losses[1]) < 1e-9
    assert losses[0].isfinite()


def test_lbfgs(backend: str) -> None:
    model = nn.Sequential(layer(), nn.Linear(10, 4))
    x, target = data()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=20)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        return loss

    first = closure().item()
    optimizer.step(closure)
    assert closure().item() < 0.8 * first


def test_gradient_accumulation(backend: str) -> None:
    model = nn.Sequential(layer(), nn.Linear(10, 4)).double()
    x, target = (t.double() for t in data())
    ((model(x) - target).square().sum()).backward()
    whole = [p.grad for p in model.parameters()]
    model.zero_grad()
    for part, goal in zip(x.split(20), target.split(20), strict=True):
        ((model(part) - goal).square().sum()).backward()
    parts = [p.grad for p in model.parameters()]
    assert max(oracle.errors(parts, whole)) < 1e-13  # type: ignore[arg-type]
    assert clip_grad_norm_(model.parameters(), 0.1) > 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(backend: str, reentrant: bool) -> None:
    second = dk.DendriticLayer(dk.connectivity.random(10, 5, 3, 4, seed=0))
    model = nn.Sequential(layer(), second, nn.Linear(5, 4)).double()
    x = data()[0].double().requires_grad_()
    inputs = [x, *model.parameters()]
    plain = torch.autograd.grad(model(x).sum(), inputs)
    for y in (
        checkpoint(model, x, use_reentrant=reentrant),
        checkpoint_sequential(model, 2, x, use_reentrant=reentrant),
    ):
        if reentrant:
            model.zero_grad()
            x.grad = None
            y.sum().backward()
            again: Any = [t.grad for t in inputs]
        else:
            again = torch.autograd.grad(y.sum(), inputs)
        assert max(oracle.errors(again, plain)) < 1e-14  # nn.Linear multiplies matrices


def test_saved_tensors_may_leave_the_device(backend: str) -> None:
    model = layer()
    x = data()[0].requires_grad_()
    (plain,) = torch.autograd.grad(model(x).sum(), x)
    with torch.autograd.graph.save_on_cpu():
        y = model(x)
    (moved,) = torch.autograd.grad(y.sum(), x)
    assert oracle.same(moved, plain, backend)


def test_deterministic_algorithms_change_nothing(backend: str) -> None:
    """Results do not depend on the flag: there is no atomic addition anywhere."""
    model = layer()
    x = data()[0].requires_grad_()
    results = []
    for flag in (True, False, True):
        torch.use_deterministic_algorithms(flag)
        y = model(x)
        results.append([y, *torch.autograd.grad(y.sin().sum(), [x, *model.parameters()])])
    for other in results[1:]:
        assert all(oracle.same(a, b, backend) for a, b in zip(results[0], other, strict=True))


def test_an_overwritten_saved_tensor_is_an_error(backend: str) -> None:
    model = layer()
    y = model(data()[0])
    with torch.no_grad():
        model.synapse_weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


class Positive(nn.Module):
    def forward(self, raw: torch.Tensor) -> torch.Tensor:
        return nn.functional.softplus(raw)


def test_parametrizations(backend: str) -> None:
    """Positive (excitatory) cables, normalised synapses; then made permanent."""
    model = layer()
    parametrize.register_parametrization(model, "cable_weight", Positive())
    parametrizations.weight_norm(model, "synapse_weight", dim=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = data()[0]
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert (model.cable_weight > 0).all()
    y = model(x)
    for name in ("cable_weight", "synapse_weight"):
        parametrize.remove_parametrizations(model, name)
    assert oracle.relative_error(model(x), y) < 1e-6


def test_requires_grad_freezes(backend: str) -> None:
    model = nn.Sequential(layer().requires_grad_(False), nn.Linear(10, 4))
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    before = copy.deepcopy(model[0].state_dict())
    step(model, optimizer)
    for name, parameter in model[0].named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_swa_and_exponential_averages(backend: str) -> None:
    model = nn.Sequential(layer(), nn.Linear(10, 4))
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        step(model, optimizer)
        average.update_parameters(model)
    assert average(data()[0]).isfinite().all()


def _train_shared(model: nn.Module, steps: int, backend: str) -> None:
    torch.set_num_threads(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with dk.use_backend(backend):
        for _ in range(steps):
            step(model, optimizer)


# A spawned process imports everything anew, which takes seconds: once for each kind of kernel.
@pytest.mark.parametrize(
    ("backend", "method"),
    [
        ("cpp", "fork"),
        ("numba", "fork"),
        ("reference", "fork"),
        ("cpp", "spawn"),
        ("numba", "spawn"),
    ],
    indirect=["backend"],
)
def test_processes_train_a_shared_model(backend: str, method: str) -> None:
    """Hogwild: every process writes into the same memory."""
    model = nn.Sequential(layer(), nn.Linear(10, 4)).share_memory()
    x, target = data()
    before = (model(x) - target).square().mean().item()
    context: Any = torch.multiprocessing.get_context(method)
    workers = [context.Process(target=_train_shared, args=(model, 20, backend)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(600)
        assert worker.exitcode == 0
    assert (model(x) - target).square().mean().item() < before


class Encoded(Dataset[torch.Tensor]):
    """Samples that a frozen layer has already encoded, in the loader's workers."""

    def __init__(self, encoder: nn.Module, backend: str) -> None:
        self.encoder, self.backend = encoder.requires_grad_(False), backend
        self.x = data()[0]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> torch.Tensor:
        with dk.use_backend(self.backend):
            y: torch.Tensor = self.encoder(self.x[i])
        return y


@pytest.mark.parametrize(
    ("backend", "method"),
    [("cpp", "fork"), ("numba", "fork"), ("reference", "fork"), ("cpp", "spawn")],
    indirect=["backend"],
)
def test_data_loader_workers(backend: str, method: str) -> None:
    encoder = layer()
    expected = encoder(data()[0]).detach()
    loader = DataLoader(
        Encoded(encoder, backend), batch_size=16, num_workers=2, multiprocessing_context=method
    )
    assert oracle.relative_error(torch.cat(list(loader)), expected) < 1e-6
