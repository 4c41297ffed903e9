"""StepInBackward: the same training as backward() and step(), with fewer gradients alive.

And which parameters decay.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import dendrite_kernels as dk
from dendrite_kernels.optim import StepInBackward, parameter_groups

Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
MAKERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
}


def model() -> torch.nn.Sequential:
    first = dk.connectivity.random(30, 12, 3, 5, seed=0)
    second = dk.connectivity.random(12, 4, 2, 6, seed=1)
    return torch.nn.Sequential(dk.DendriticLayer(first), dk.DendriticLayer(second))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_it_trains_as_backward_and_step_do(backend: str, make: Make) -> None:
    ours = model()
    theirs = copy.deepcopy(ours)
    StepInBackward(ours.parameters(), make)
    optimizer = make(list(theirs.parameters()))
    x = torch.randn(16, 30)
    for _ in range(5):
        ours(x).square().mean().backward()
        optimizer.zero_grad()
        theirs(x).square().mean().backward()
        optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert a.grad is None
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_gradients_of_one_layer_are_alive_at_a_time(backend: str) -> None:
    network = model()
    first, second = network[0], network[1]
    StepInBackward(network.parameters(), MAKERS["sgd"])
    alive = []
    assert isinstance(first, dk.DendriticLayer)
    first.synapse_weight.register_post_accumulate_grad_hook(
        lambda _: alive.append([p.grad is not None for p in second.parameters()])
    )
    network(torch.randn(8, 30)).sum().backward()
    assert alive == [[False] * 4]


def test_its_state_can_be_saved(backend: str) -> None:
    network = model()
    trainer = StepInBackward(network.parameters(), MAKERS["adam"])
    twin = copy.deepcopy(network)
    x = torch.randn(8, 30)
    network(x).sum().backward()
    copied = StepInBackward(twin.parameters(), MAKERS["adam"])
    twin.load_state_dict(network.state_dict())
    copied.load_state_dict(copy.deepcopy(trainer.state_dict()))
    for each in (network, twin):
        each(x).sum().backward()
    for a, b in zip(network.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_states_of_other_parameters_are_refused() -> None:
    trainer = StepInBackward(model().parameters(), MAKERS["adam"])
    states = trainer.state_dict()
    with pytest.raises(ValueError, match=r"parameters of shapes \[\[.*, got \[\["):
        trainer.load_state_dict(states[::-1])
    for state in states:  # as older versions wrote them
        del state["shape"]
    trainer.load_state_dict(states)


def test_two_on_the_same_parameters_are_refused() -> None:
    """The first would go on stepping, whatever the second is told."""
    network = model()
    first = StepInBackward(network.parameters(), MAKERS["sgd"])
    with pytest.raises(ValueError, match="of no other StepInBackward, got some of one"):
        StepInBackward(network[0].parameters(), MAKERS["sgd"])
    first.remove()
    second = StepInBackward(network.parameters(), MAKERS["sgd"])
    first.remove()  # changes nothing
    with pytest.raises(ValueError, match="of no other StepInBackward"):
        StepInBackward(network.parameters(), MAKERS["sgd"])
    del second  # its hooks stay with the parameters
    with pytest.raises(ValueError, match="of no other StepInBackward"):
        StepInBackward(network.parameters(), MAKERS["sgd"])


def test_remove_gives_the_parameters_back(backend: str) -> None:
    network = model()
    StepInBackward(network.parameters(), MAKERS["sgd"]).remove()
    network(torch.randn(8, 30)).sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_wrong_use_is_refused() -> None:
    network = model()
    with pytest.raises(ValueError, match="got none"):
        StepInBackward([], MAKERS["sgd"])
    network(torch.randn(8, 30)).sum().backward()
    with pytest.raises(ValueError, match="hold one"):
        StepInBackward(network.parameters(), MAKERS["sgd"])
    network.zero_grad()
    trainer = StepInBackward(network.parameters(), MAKERS["sgd"])
    with pytest.raises(ValueError, match="Expected 8 states, got 0"):
        trainer.load_state_dict([])
    first = network[0].get_parameter("synapse_weight")
    with pytest.raises(ValueError, match="each parameter once, got some twice"):
        StepInBackward([first, first], MAKERS["sgd"])
    trainer.remove()
    everything = torch.optim.SGD(network[1].parameters(), lr=0.1)
    with pytest.raises(ValueError, match="optimizer of the given parameter, got other ones"):
        StepInBackward([first], lambda _: everything)


def test_gradients_that_would_accumulate_are_refused(backend: str) -> None:
    network, x = model(), torch.randn(8, 30)
    StepInBackward(network.parameters(), MAKERS["sgd"])
    first = network[0].get_parameter("synapse_weight")
    first.grad = torch.zeros_like(first)
    before = first.detach().clone()
    with pytest.raises(RuntimeError, match="Expected a parameter without a gradient"):
        network(x).sum().backward()
    assert torch.equal(first, before)
    first.grad = None
    network(x).sum().backward()
    assert not torch.equal(first, before)


def test_groups_added_later_are_refused() -> None:
    network = model()
    trainer = StepInBackward(network[0].parameters(), MAKERS["sgd"])
    trainer.optimizers[0].add_param_group({"params": list(network[1].parameters())})
    with pytest.raises(RuntimeError, match="one parameter, got a group added to it"):
        network(torch.randn(8, 30)).sum().backward()


def test_what_the_docstring_says_of_scaling_and_clipping() -> None:
    network = model()
    trainer = StepInBackward(network.parameters(), MAKERS["sgd"])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(network(torch.randn(8, 30)).sum()).backward()
    assert torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0) == 0
    with pytest.raises(AssertionError, match="No inf checks"):
        scaler.step(trainer.optimizers[0])


def test_what_the_docstring_says_of_replaced_parameters() -> None:
    network = model()
    trainer = StepInBackward(network.parameters(), MAKERS["sgd"])
    network.load_state_dict(copy.deepcopy(network.state_dict()), assign=True)
    network(torch.randn(8, 30)).sum().backward()
    assert all(p.grad is not None for p in network.parameters())  # not stepped
    network.zero_grad()
    trainer.remove()
    StepInBackward(network.parameters(), MAKERS["sgd"])
    before = [p.detach().clone() for p in network.parameters()]
    network(torch.randn(8, 30)).sum().backward()
    assert all(p.grad is None for p in network.parameters())
    assert not any(map(torch.equal, before, network.parameters()))


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]] = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.3),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=6),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("make", [MAKERS["sgd"], MAKERS["adam"]], ids=["sgd", "adam"])
@pytest.mark.filterwarnings("error::UserWarning")
def test_schedules(backend: str, make: Make, schedule: Any) -> None:
    ours = model()
    theirs = copy.deepcopy(ours)
    schedulers = [schedule(o) for o in StepInBackward(ours.parameters(), make).optimizers]
    optimizer = make(list(theirs.parameters()))
    scheduler = schedule(optimizer)
    x, rates = torch.randn(16, 30), set()
    for _ in range(5):
        ours(x).square().mean().backward()
        for each in schedulers:
            each.step()
        optimizer.zero_grad()
        theirs(x).square().mean().backward()
        optimizer.step()
        scheduler.step()
        assert all(each.get_last_lr() == scheduler.get_last_lr() for each in schedulers)
        rates.add(scheduler.get_last_lr()[0])
    assert len(rates) > 2
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


# Which parameters decay


def names(network: nn.Module) -> tuple[set[str], set[str]]:
    """Of the parameters that decay, and of the others."""
    of = {id(p): name for name, p in network.named_parameters()}
    groups = parameter_groups(network, 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed)) == len(of)
    first, second = ({of[id(p)] for p in group["params"]} for group in groups)
    return first, second


def test_weights_decay_and_others_do_not() -> None:
    network = nn.Sequential(
        dk.DendriticLayer(dk.connectivity.random(30, 12, 3, 5, seed=0)),
        nn.LayerNorm([2, 12]),
        nn.BatchNorm1d(12),
        dk.SparseLinear(dk.connectivity.random(12, 4, 2, 6, seed=1)),
        nn.PReLU(8),
        nn.Linear(8, 3),
        nn.Embedding(3, 4),
    )
    assert names(network) == (
        {"0.synapse_weight", "0.cable_weight", "3.weight", "5.weight", "6.weight"},
        {
            "0.dendrite_bias", "0.soma_bias", "1.weight", "1.bias", "2.weight", "2.bias", "3.bias",
            "4.weight", "5.bias",
        },
    )  # fmt: skip


def test_parametrized_and_pruned_weights_decay() -> None:
    network = model()
    parametrize.register_parametrization(network[0], "synapse_weight", nn.Identity())
    prune.l1_unstructured(network[1], "cable_weight", 0.5)
    prune.l1_unstructured(network[1], "soma_bias", 0.5)
    first, second = names(network)
    assert {"0.parametrizations.synapse_weight.original", "1.cable_weight_orig"} < first
    assert "1.soma_bias_orig" in second
    assert len(first) == len(second) == 4


def test_shared_and_frozen_parameters() -> None:
    layer, tied = nn.Linear(4, 4), nn.Linear(4, 4)
    tied.weight = layer.weight
    frozen = nn.Linear(4, 4).requires_grad_(False)
    first, second = names(nn.Sequential(layer, layer, tied, frozen))
    assert (first, second) == ({"0.weight", "3.weight"}, {"0.bias", "2.bias", "3.bias"})
    assert names(nn.ReLU()) == (set(), set())


@pytest.mark.parametrize("empty", [False, True])
def test_adamw_takes_the_groups(backend: str, empty: bool) -> None:
    """Without gradients of the loss, weights shrink by 1 - lr * weight_decay."""
    c = dk.connectivity.random(30, 12, 3, 5, seed=0)
    layer = dk.DendriticLayer(c, bias=not empty)
    for p in layer.parameters():
        nn.init.ones_(p)
    optimizer = torch.optim.AdamW(parameter_groups(layer, weight_decay=0.5), lr=0.1)
    (layer(torch.randn(3, 30)).sum() * 0).backward()
    optimizer.step()
    for name, p in layer.named_parameters():
        torch.testing.assert_close(p, torch.full_like(p, 0.95 if "weight" in name else 1.0))


@pytest.mark.parametrize("weight_decay", [-0.1, math.inf, math.nan])
def test_wrong_weight_decay(weight_decay: float) -> None:
    with pytest.raises(ValueError, match="Expected a finite weight_decay >= 0, got"):
        parameter_groups(model(), weight_decay)


def test_parameters_without_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected parameters with shapes, got a lazy 0\.weight"):
        parameter_groups(nn.Sequential(nn.LazyLinear(3)), 0.1)
