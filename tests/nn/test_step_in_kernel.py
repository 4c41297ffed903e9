"""StepInBackward where a backend takes Adam's step itself: the same training, or no such step.

No backend of the CPU does; a stand-in shows who takes which step. The kernel's own arithmetic is
checked by tests/cuda_emulator.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dendrite_kernels as dk
from dendrite_kernels.backends import cpp
from dendrite_kernels.backends.protocol import AdamStep, Gradients, Operands
from dendrite_kernels.optim import StepInBackward

pytestmark = pytest.mark.skipif(cpp.unavailable() is not None, reason=f"{cpp.unavailable()}")
Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
MAKERS: dict[str, Make] = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
    "l2": lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.8, 0.9), weight_decay=0.1, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, eps=1e-4, weight_decay=0.1, fused=True),
}


def take(step: AdamStep, weight: torch.Tensor, grad: torch.Tensor) -> None:
    """By the formulas of Kingma & Ba (2015) and of Loshchilov & Hutter (2019)."""
    weight = weight.data  # as to a kernel, which writes where autograd does not look
    with torch.no_grad():
        if step.decoupled:
            weight *= 1 - step.lr * step.weight_decay
        else:
            grad = grad + step.weight_decay * weight
        step.exp_avg.mul_(step.beta1).add_((1 - step.beta1) * grad)
        step.exp_avg_sq.mul_(step.beta2).add_((1 - step.beta2) * grad**2)
        t = float(step.step) + 1
        mean, square = step.exp_avg / (1 - step.beta1**t), step.exp_avg_sq / (1 - step.beta2**t)
        weight -= step.lr * mean / (square.sqrt() + step.eps)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[AdamStep]:
    """The steps that the backend has taken."""
    steps = []
    plain: Callable[..., Gradients] = cpp.backward

    def backward(*arguments: Any, step: AdamStep | None = None) -> Gradients:
        dx, dw, *rest = plain(*arguments)
        if step is not None:
            steps.append(step)
            operands: Operands = arguments[4]
            take(step, operands.synapse_weight, dw)
            dw = dw.new_empty(0)
        return dx, dw, *rest  # type: ignore[return-value]

    monkeypatch.setattr(cpp, "backward", backward)
    monkeypatch.setattr(cpp, "STEPS", True)
    return steps


def model() -> nn.Sequential:
    first = dk.connectivity.random(30, 12, 3, 5, seed=0)
    second = dk.connectivity.random(12, 4, 2, 6, seed=1)
    return nn.Sequential(dk.DendriticLayer(first), dk.SparseLinear(second))


def data() -> torch.Tensor:
    return torch.randn(16, 30, generator=torch.Generator().manual_seed(0))


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_it_trains_as_the_optimizer_does(taken: list[AdamStep], make: Make) -> None:
    ours = model()
    theirs = copy.deepcopy(ours)
    trainer = StepInBackward(ours.parameters(), make)
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.3) for o in trainer.optimizers]
    optimizer = make(list(theirs.parameters()))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.3)
    for _ in range(6):
        ours(data()).square().mean().backward()
        optimizer.zero_grad()
        theirs(data()).square().mean().backward()
        optimizer.step()
        for each in (*schedulers, scheduler):
            each.step()
        assert_same(ours, theirs)
        assert all(p.grad is None for p in ours.parameters())
    assert len(taken) == 2 * 5  # the optimizer takes the first step, in which it makes its state
    assert len({step.lr for step in taken}) == 3
    weight = ours[0].get_parameter("synapse_weight")
    assert trainer.optimizers[0].state[weight]["step"] == 6


def test_its_state_goes_on_from_a_checkpoint(taken: list[AdamStep]) -> None:
    ours = model()
    trainer = StepInBackward(ours.parameters(), MAKERS["adam"])
    for _ in range(3):
        ours(data()).square().mean().backward()
    twin = copy.deepcopy(ours)
    copied = StepInBackward(twin.parameters(), MAKERS["adam"])
    copied.load_state_dict(copy.deepcopy(trainer.state_dict()))
    for each in (ours, twin):
        each(data()).square().mean().backward()
    assert len(taken) == 2 * 2 + 4
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), twin.parameters(), strict=True))


def test_the_weight_is_that_of_its_module_after_rewiring(taken: list[AdamStep]) -> None:
    layer = model()[0]
    trainer = StepInBackward(layer.parameters(), MAKERS["adam"])
    layer(data()).square().mean().backward()
    generator = torch.Generator().manual_seed(0)
    dk.plasticity.rewire(layer, trainer, fraction=0.4, generator=generator)
    dense = copy.deepcopy(layer)
    optimizer = MAKERS["adam"](list(dense.parameters()))
    optimizer.load_state_dict(copy.deepcopy(joined(trainer)))
    layer(data()).square().mean().backward()
    dense(data()).square().mean().backward()
    optimizer.step()
    assert len(taken) == 1
    assert_same(layer, dense)


def joined(trainer: StepInBackward) -> dict[str, Any]:
    """The states of its optimizers as that of one."""
    states = [o.state_dict() for o in trainer.optimizers]
    group = {**states[0]["param_groups"][0], "params": list(range(len(states)))}
    return {"state": {i: s["state"][0] for i, s in enumerate(states)}, "param_groups": [group]}


class Subclass(torch.optim.Adam):
    """It could do otherwise."""


OTHERS: dict[str, Make] = {
    "not fused": lambda p: torch.optim.Adam(p, lr=1e-2),
    "foreach": lambda p: torch.optim.Adam(p, lr=1e-2, foreach=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True, fused=True),
    "maximize": lambda p: torch.optim.Adam(p, lr=1e-2, maximize=True, fused=True),
    "rate in a tensor": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-2), fused=True),
    "subclass": lambda p: Subclass(p, lr=1e-2, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_other_optimizers_take_their_steps(taken: list[AdamStep], make: Make) -> None:
    ours = model()
    theirs = copy.deepcopy(ours)
    StepInBackward(ours.parameters(), make)
    optimizer = make(list(theirs.parameters()))
    for _ in range(3):
        ours(data()).square().mean().backward()
        optimizer.zero_grad()
        theirs(data()).square().mean().backward()
        optimizer.step()
    assert not taken
    assert_same(ours, theirs)


def trained(network: nn.Module, steps: int = 2) -> StepInBackward:
    trainer = StepInBackward(network.parameters(), MAKERS["adam"])
    for _ in range(steps):
        network(data()).square().mean().backward()
    return trainer


def test_hooks_of_a_parameter_see_its_gradient(taken: list[AdamStep]) -> None:
    ours = model()
    trained(ours)
    before, seen = len(taken), []
    for name in ("0.synapse_weight", "1.weight"):
        ours.get_parameter(name).register_hook(lambda grad: seen.append(grad.norm()))
    ours(data()).square().mean().backward()
    assert len(taken) == before
    assert len(seen) == 2


@pytest.mark.parametrize("kind", ["register_step_pre_hook", "register_step_post_hook"])
def test_hooks_of_an_optimizer_run(taken: list[AdamStep], kind: str) -> None:
    ours = model()
    trainer = trained(ours)
    before, seen = len(taken), []
    for optimizer in trainer.optimizers:
        getattr(optimizer, kind)(lambda *_: seen.append(1))
    ours(data()).square().mean().backward()
    assert len(taken) == before
    assert len(seen) == len(trainer.optimizers)


def test_gradients_that_are_asked_for_are_given(taken: list[AdamStep]) -> None:
    ours = model()
    trained(ours)
    before = len(taken)
    weights = [ours.get_parameter(name) for name in ("0.synapse_weight", "1.weight")]
    values = [w.detach().clone() for w in weights]
    grads = torch.autograd.grad(ours(data()).square().mean(), weights)
    assert all(g.abs().sum() > 0 for g in grads)
    x = data().requires_grad_()
    ours(x).square().mean().backward(inputs=[x])
    assert len(taken) == before
    assert all(torch.equal(w, v) for w, v in zip(weights, values, strict=True))


@pytest.mark.parametrize("way", ["profiler", "anomaly", "create_graph", "no samples", "removed"])
def test_who_looks_at_gradients_or_has_none_sees_the_usual_way(
    taken: list[AdamStep], way: str
) -> None:
    ours = model()
    trainer = trained(ours)
    before = len(taken)
    state = trainer.optimizers[0].state[ours.get_parameter("0.synapse_weight")]
    if way == "profiler":
        with torch.profiler.profile():
            ours(data()).square().mean().backward()
    elif way == "anomaly":
        with torch.autograd.detect_anomaly():
            ours(data()).square().mean().backward()
    elif way == "create_graph":
        ours(data()).square().mean().backward(create_graph=True)
    elif way == "no samples":
        ours(data()[:0]).square().sum().backward()
    else:
        trainer.remove()
        ours(data()).square().mean().backward()
    assert len(taken) == before
    assert state["step"] == (2 if way == "removed" else 3)
    assert (ours.get_parameter("1.weight").grad is None) == (way != "removed")


def test_a_penalty_on_a_weight_is_an_error(taken: list[AdamStep]) -> None:
    """Its gradient would come behind the step that should have had it."""
    ours = model()
    trained(ours)
    penalty = ours.get_parameter("0.synapse_weight").sum()
    with pytest.raises(RuntimeError, match="from its layer alone, got more from elsewhere"):
        (ours(data()).square().mean() + penalty).backward()


def test_a_weight_of_two_layers_is_an_error(taken: list[AdamStep]) -> None:
    layer = dk.SparseLinear(dk.connectivity.random(12, 12, 1, 6, seed=1))
    StepInBackward(layer.parameters(), MAKERS["adam"])
    x = torch.randn(5, 12)
    F.relu(layer(layer(x))).sum().backward()  # the first step is the optimizer's
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        F.relu(layer(layer(x))).sum().backward()


def test_a_gradient_that_is_there_already_is_an_error(taken: list[AdamStep]) -> None:
    ours = model()
    trained(ours)
    weight = ours.get_parameter("1.weight")
    before, value = len(taken), weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    with pytest.raises(RuntimeError, match="Expected a parameter without a gradient"):
        ours(data()).square().mean().backward()
    assert len(taken) == before
    assert torch.equal(weight, value)


def test_models_and_optimizers_are_freed(taken: list[AdamStep]) -> None:
    ours = model()
    trainer = trained(ours)
    gone = [weakref.ref(each) for each in (ours[0], ours[0].synapse_weight, trainer.optimizers[0])]
    taken.clear()
    del ours, trainer
    gc.collect()
    assert [each() for each in gone] == [None] * 3


def test_a_gradient_without_memory_goes_to_the_dispatcher(taken: list[AdamStep]) -> None:
    """Such as the gradient of what does not depend on y."""
    layer = model()[0]
    trained(layer)
    before, y = len(taken), layer(data())
    y.backward(torch._efficientzerotensor(y.shape, dtype=y.dtype))
    assert len(taken) == before


def test_a_pass_that_fails_counts_no_step(
    taken: list[AdamStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = model()[0]
    trainer = trained(layer)
    state = trainer.optimizers[0].state[layer.get_parameter("synapse_weight")]

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(cpp, "backward", fail)
        with pytest.raises(MemoryError):
            layer(data()).square().mean().backward()
    assert state["step"] == 2
    layer(data()).square().mean().backward()
    assert state["step"] == 3


def test_layers_on_meta_have_no_backend(taken: list[AdamStep]) -> None:
    ours = model()
    kept = trained(ours)
    layer = model()[0].to("meta")
    layer(torch.empty(3, 30, device="meta")).sum().backward()
    assert len(kept.optimizers) == 6
