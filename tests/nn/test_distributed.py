"""Several processes: DDP, FSDP2, distributed checkpoints, somas sharded over a mesh (gloo)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

import dendrite_kernels as dk
from dendrite_kernels.parallel import ShardedDendriticLayer, ShardSomas, gather
from tests import oracle

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
BATCH = 24  # divisible by every number of processes


def network(seed: int = 0) -> Any:  # nn.Sequential, whose modules have every attribute
    """The same on every process. 250 synapses and 43 dendrites divide by no number of them."""
    torch.manual_seed(seed)
    first = dk.connectivity.random(30, 43, 1, 6, seed=seed)
    second = dk.connectivity.random(43, 8, 3, 5, constant_fan_in=True, seed=seed)
    third = dk.connectivity.random(8, 6, 2, 4, constant_fan_in=True, seed=seed)
    return nn.Sequential(
        dk.DendriticLayer(first),
        dk.DendriticLayer(second),
        dk.SparseLinear(third),
        nn.Linear(12, 3),
    ).double()


def data() -> tuple[torch.Tensor, torch.Tensor]:
    x = oracle.drawn(BATCH, 30, seed=1, dtype=torch.float64)
    return x, oracle.drawn(BATCH, 3, seed=2, dtype=torch.float64)


def share(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.chunk(dist.get_world_size())[dist.get_rank()]


def full(tensor: torch.Tensor) -> torch.Tensor:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, distributed: bool) -> None:
    x, target = (share(t) if distributed else t for t in data())
    optimizer.zero_grad()
    (model(x) - target).square().mean().backward()
    optimizer.step()


def train(model: nn.Module, distributed: bool, steps: int = 3) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(steps):
        step(model, optimizer, distributed)
    return optimizer


def assert_same(actual: nn.Module, expected: nn.Module) -> None:
    for a, e in zip(actual.parameters(), expected.parameters(), strict=True):
        assert oracle.relative_error(full(a), full(e)) < 1e-12
        if e.grad is not None:
            assert a.grad is not None
            assert oracle.relative_error(full(a.grad), e.grad) < 1e-12


def sharded(model: nn.Sequential) -> Any:
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    return model


def _worker(
    rank: int, world: int, store: str, device: str, work: Callable[..., None], args: Any
) -> None:
    torch.set_num_threads(1)
    options: dict[str, Any] = {}
    if device == "cuda":
        torch.cuda.set_device(rank)
        torch.set_default_device(f"cuda:{rank}")
        options = {"device_id": torch.device(f"cuda:{rank}")}
    kind = {"cpu": "gloo", "cuda": "nccl"}[device]
    dist.init_process_group(
        kind, rank=rank, world_size=world, init_method=f"file://{store}", **options
    )
    try:
        work(*args)
    finally:
        dist.destroy_process_group()
    # A DTensor, of whatever module, keeps the destroyed group and its threads alive (torch 2.13).
    # One that drops a collective's tensor while Python is being finalized ends in SIGABRT.
    os._exit(0)


def launch(
    world: int, folder: Path, work: Callable[..., None], *args: Any, device: str = "cpu"
) -> None:
    """Run `work` in `world` fresh processes; an assertion in one of them fails the test."""
    store = folder / f"store-{work.__name__}-{world}"
    spawn(_worker, (world, str(store), device, work, args), nprocs=world)


def data_parallel() -> None:
    expected = network()
    train(expected, distributed=False)
    model = network()
    train(DistributedDataParallel(model), distributed=True)
    assert_same(model, expected)

    model = sharded(network())
    assert all(isinstance(p, DTensor) for p in model.parameters())
    train(model, distributed=True)
    assert_same(model, expected)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ddp_and_fsdp_equal_one_process(world: int, tmp_path: Path) -> None:
    launch(world, tmp_path, data_parallel)


def _save(folder: str) -> None:
    model = sharded(network())
    optimizer = train(model, distributed=True)
    weights, moments = get_state_dict(model, optimizer)
    save({"model": weights, "optimizer": moments}, checkpoint_id=folder)


def _resume(folder: str) -> None:
    model = network(seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model = sharded(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": moments}
    load(state, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    step(model, optimizer, distributed=True)

    expected = network()
    train(expected, distributed=False, steps=4)
    assert_same(model, expected)


def _resume_elsewhere(folder: str) -> None:
    """The same shapes with other connections: an error, and nothing is overwritten."""
    other = network(seed=0)
    c = other[1].connectivity
    columns = (c.col_indices + 1) % c.in_features
    columns = columns.reshape(-1, c.fan_in).sort().values.flatten()
    moved = dk.Connectivity(c.crow_indices, columns, c.soma_ptr, c.in_features)
    other[1] = dk.DendriticLayer(moved).double()
    optimizer = torch.optim.AdamW(other.parameters())
    weights, _ = get_state_dict(other, optimizer)
    load({"model": weights}, checkpoint_id=folder)
    assert torch.equal(moved.col_indices, columns)
    with pytest.raises(RuntimeError, match="Expected a state of"):
        other.load_state_dict(weights)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2)])
def test_a_checkpoint_resumes_on_another_number_of_processes(
    before: int, after: int, tmp_path: Path
) -> None:
    folder = str(tmp_path / "checkpoint")
    launch(before, tmp_path, _save, folder)
    launch(after, tmp_path, _resume, folder)
    if before == 2:
        launch(1, tmp_path, _resume_elsewhere, folder)


def somas(even: bool) -> Any:
    """Two layers whose somas are to be sharded: into equal parts, or with ragged ends."""
    torch.manual_seed(0)
    count = 8 if even else 7
    first = dk.connectivity.random(30, count, 3, 6, constant_fan_in=even, seed=0)
    second = dk.connectivity.random(count, count, 2, 4, constant_fan_in=even, seed=1)
    layers = [dk.DendriticLayer(first), dk.DendriticLayer(second, activation="tanh")]
    return nn.Sequential(*layers, nn.Linear(count, 3)).double()


def assert_sharded_like(model: Any, expected: Any, gradients: bool) -> None:
    for ours, theirs in zip(model[:2], expected[:2], strict=True):
        for a, e in zip(gather(ours).parameters(), theirs.parameters(), strict=True):
            assert oracle.relative_error(a.detach(), e.detach()) < 1e-12
        if gradients:
            held = [p.grad for p in ours.parameters()]
            sums = [full(g).sum() for g in held]
            exact = [p.grad.sum() for p in theirs.parameters()]
            assert max(oracle.errors(sums, exact)) < 1e-10


def _shard_somas(even: bool) -> None:
    expected: Any = somas(even)
    model: Any = somas(even)
    if dist.get_rank() == 1:  # rank 0 decides
        with torch.no_grad():
            model[0].cable_weight.zero_()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(model, mesh, {"0": ShardSomas(), "1": ShardSomas()})
    assert type(model[0]) is ShardedDendriticLayer
    assert model[0].connectivity.num_somas < expected[0].connectivity.num_somas
    held: Any = model[0].synapse_weight
    assert held.to_local().numel() < expected[0].synapse_weight.numel()
    x, target = data()
    results = []
    for network in (model, expected):
        inputs = x.clone().requires_grad_()
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.01, foreach=False)
        for _ in range(3):
            optimizer.zero_grad()
            y = network(inputs)
            (y - target).square().mean().backward()
            optimizer.step()
        assert inputs.grad is not None
        results.append((y.detach(), inputs.grad))
    assert max(oracle.errors(*results)) < 1e-12
    assert_sharded_like(model, expected, gradients=True)
    with pytest.raises(RuntimeError, match="Expected a layer that is whole, got a sharded one"):
        model[0].dendrites(x)

    kept = somas(even)[0]
    y = kept(x)
    layouts: Any = {"output_layouts": Shard(-1), "use_local_output": False}
    ours = parallelize_module(somas(even)[0], mesh, ShardSomas(**layouts))(x)
    assert ours.placements[0].is_shard()
    assert oracle.relative_error(ours.full_tensor(), y) < 1e-14
    batched = DTensor.from_local(share(x), mesh, [Shard(0)])
    ours = parallelize_module(somas(even)[0], mesh, ShardSomas())(batched)
    assert oracle.relative_error(ours, y) < 1e-14


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("even", [True, False], ids=["even", "ragged"])
def test_sharded_somas_equal_one_process(world: int, even: bool, tmp_path: Path) -> None:
    launch(world, tmp_path, _shard_somas, even)


def _save_somas(folder: str) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model: Any = parallelize_module(somas(True), mesh, {"0": ShardSomas(), "1": ShardSomas()})
    save({"model": model.state_dict()}, checkpoint_id=folder)


def _load_somas(folder: str) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plain = somas(True)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    model: Any = parallelize_module(plain, mesh, {"0": ShardSomas(), "1": ShardSomas()})
    state = {"model": model.state_dict()}
    load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    assert_sharded_like(model, somas(True), gradients=False)


def _refused() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    other = dk.connectivity.random(30, 8, 3, 6, seed=dist.get_rank())
    with pytest.raises(ValueError, match="same connectivity on all ranks"):
        parallelize_module(dk.DendriticLayer(other), mesh, ShardSomas())
    few = dk.DendriticLayer(dk.connectivity.random(30, 1, 3, 6, seed=0))
    with pytest.raises(ValueError, match="Expected a soma with dendrites for each of 2 ranks"):
        parallelize_module(few, mesh, ShardSomas())
    with pytest.raises(TypeError, match="Expected a DendriticLayer, got Linear"):
        parallelize_module(nn.Linear(3, 3), mesh, ShardSomas())


@pytest.mark.slow
def test_sharded_somas_resume_on_another_number_of_processes(tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoint")
    launch(2, tmp_path, _save_somas, folder)
    launch(4, tmp_path, _load_somas, folder)
    launch(2, tmp_path, _refused)
