"""A grown layer beside others: files, compilers, rewiring, data parallel; and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize, prune

import dendrite_kernels as dk
from dendrite_kernels.plasticity import Rewirer, adopt, grow, rewire
from tests import oracle
from tests.nn.test_distributed import launch
from tests.nn.test_growth import SOMAS, N, data, dendrites, generator, made, network, trained

# ---- files ----


def test_a_run_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    def run(model: Any, optimizer: Any, steps: range) -> None:
        for i in steps:
            if i == 3:
                grow(model[0], optimizer, dendrites(), generator=generator())
            trained(model, optimizer, 1, seed=i)

    def parts() -> Any:
        model = nn.Sequential(made(), nn.Linear(SOMAS, 2).double())
        nn.init.ones_(model[1].weight)
        nn.init.ones_(model[1].bias)
        return model, torch.optim.Adam(model.parameters(), 1e-2)

    whole = parts()
    run(*whole, range(8))
    first = parts()
    run(*first, range(5))
    state, numbers = copy.deepcopy([part.state_dict() for part in first])
    model, _ = parts()
    model[0] = dk.DendriticLayer.from_state_dict(state, "0.")
    model.load_state_dict(state)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    optimizer.load_state_dict(numbers)
    run(model, optimizer, range(5, 8))
    for a, b in zip(model.parameters(), whole[0].parameters(), strict=True):
        assert torch.equal(a, b)
    dk.save(model, tmp_path / "model")
    again: Any = dk.load(tmp_path / "model")
    assert again[0].connectivity == whole[0][0].connectivity
    assert torch.equal(again(data(0)), whole[0](data(0)))


def test_states_of_other_sizes_are_refused() -> None:
    layer, grown = made(), made()
    grow(grown, None, dendrites())
    for a, b in ((layer, grown), (grown, layer)):
        before = copy.deepcopy(a.state_dict())
        with pytest.raises(RuntimeError, match="Expected a state of"):
            a.load_state_dict(b.state_dict())
        with pytest.raises(ValueError, match=r"Expected _extra_state and .* in the state, got"):
            adopt(a, b.state_dict())
        assert all(torch.equal(value, before[key]) for key, value in a.state_dict().items())
    again = made()
    grow(again, None, dendrites())
    again.load_state_dict(grown.state_dict())
    assert torch.equal(again.synapse_weight, grown.synapse_weight)
    rewire(grown, fraction=0.5)
    adopt(again, grown.state_dict())
    assert again.connectivity == grown.connectivity


# ---- beside others ----


@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("activation", ["leaky_relu", "tanh"])
def test_compiled_layers_use_the_new_dendrites(compiler: str, activation: Any) -> None:
    results = []
    for compiled in (False, True):
        layer = made(activation=activation)
        optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
        run = torch.compile(layer, backend=compiler, fullgraph=True) if compiled else layer
        for i in range(6):
            if i in (2, 4):
                grow(layer, optimizer, dendrites(), generator=generator(i))
            trained(run, optimizer, 1, seed=i)
        assert layer.connectivity.dendrites_per_soma == 6
        results.append([run(data(9)).detach(), *layer.parameters()])
    assert max(oracle.errors(results[1], results[0])) < 1e-12
    torch.compiler.reset()


@pytest.mark.parametrize("rule", ["set", "rigl"])
def test_rewirers_go_on(rule: Any) -> None:
    layer = made()
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    rewirer = Rewirer(layer, optimizer, rule=rule, every=2, end=20, seed=0)
    moved = []
    for i in range(8):
        if i == 3:
            grow(layer, optimizer, dendrites())
        trained(layer, optimizer, 1, seed=i)
        moved.append(rewirer.step())
    assert moved == [False, True] * 4
    assert layer.connectivity.num_dendrites == 30
    around = dk.connectivity.random(N, SOMAS, 4, 20, seed=0)
    with pytest.raises(ValueError, match="Expected a region of 30 dendrites on 61 inputs, got 24"):
        rewire(layer, optimizer, fraction=0.3, region=around)
    rewire(layer, optimizer, fraction=0.3, region=around.grow(dendrites()))


def _data_parallel() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    results = []
    for distributed in (False, True):
        layer = made()
        optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
        for i in range(6):
            if i in (0, 3):
                if i:
                    grow(layer, optimizer, dendrites(), generator=generator())
                model = DistributedDataParallel(layer) if distributed else layer
            x = data(i).chunk(world)[rank] if distributed else data(i)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        results.append([p.detach() for p in layer.parameters()])
    assert max(oracle.errors(results[1], results[0])) < 1e-10


def test_data_parallel_processes_grow_alike(tmp_path: Path) -> None:
    launch(2, tmp_path, _data_parallel)


def test_other_layers_and_optimizers_are_refused_unchanged() -> None:
    def refused(match: str, layer: Any, optimizer: Any = None, *new: Any, **options: Any) -> None:
        before = getattr(layer, "connectivity", None)
        values = [p.detach().clone() for p in layer.parameters()]
        draws = torch.get_rng_state()
        with pytest.raises((TypeError, ValueError), match=match):
            grow(layer, optimizer, *(new or [dendrites()]), **options)
        assert getattr(layer, "connectivity", None) is before
        assert torch.equal(torch.get_rng_state(), draws)
        for a, b in zip(values, layer.parameters(), strict=True):
            assert a.is_meta or torch.equal(a, b)

    layer, other = made(), made()
    refused("Expected a DendriticLayer, got Linear", nn.Linear(2, 2))
    refused("Expected a DendriticLayer, got SparseLinear", dk.SparseLinear(network()))
    refused("Expected Connectivity objects, got int", layer, None, 1)
    wrong = dk.connectivity.random(N, 5, 1, 8, seed=0)
    refused("Expected dendrites of 6 somas on 61 inputs, got 5 on 61", layer, None, wrong)
    for value in (float("nan"), float("inf")):
        refused("Expected a finite cable weight", layer, cable=value)
    adam = torch.optim.Adam(other.parameters())
    refused("optimizer of the layer's synapse_weight, got one of others", layer, adam)
    adam = torch.optim.Adam([layer.synapse_weight, layer.cable_weight])
    refused("optimizer of the layer's dendrite_bias, got one of others", layer, adam)
    refused("got LBFGS", layer, torch.optim.LBFGS(layer.parameters()))
    refused("Expected an optimizer of torch.optim or StepInBackward, got list", layer, [])
    refused("got a meta one", dk.DendriticLayer(network(), device="meta"))
    signed = made()
    signs = dk.Signed(torch.ones(signed.synapse_weight.numel()))
    parametrize.register_parametrization(signed, "synapse_weight", signs)
    refused("Expected a whole layer with parameters", signed)
    pruned = prune.random_unstructured(made(), "cable_weight", 0.5)
    refused("Expected a whole layer with parameters", pruned)
