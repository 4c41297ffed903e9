"""StepInBackward: the same training as backward() and step(), with fewer gradients alive."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

import dendrite_kernels as dk
from dendrite_kernels.optim import StepInBackward

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
