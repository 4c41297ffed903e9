"""A signal or a lack of memory in the middle: all is written or nothing; the next call is right.

Python runs signal handlers between two steps of its own code. So an exception is raised before each
line of the package in turn, as that of Ctrl-C would be.
"""

from __future__ import annotations

import collections
import copy
import itertools
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import dendrite_kernels as dk
from dendrite_kernels import optim, plasticity
from tests.exact_cases import outputs, whole_numbers
from tests.nn.test_plasticity import generator, made, network, trained
from tests.processes import PACKAGE

Action = Callable[..., Any]
LINES = {"line"}


def watched(action: Action, events: set[str], look: Callable[[Any], None]) -> None:
    """Run the action; `look` sees the frames of the package at such events."""

    def trace(frame: Any, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(str(PACKAGE)):
            return None
        if event in events:
            look(frame)
        return trace

    before = sys.gettrace()
    (sys.setprofile if "c_call" in events else sys.settrace)(trace)
    try:
        action()
    finally:
        sys.setprofile(None)
        sys.settrace(before)


def places(action: Action, events: set[str], visits: int = 1) -> list[int]:
    """The numbers of events to stop it at: the first visits of each line."""
    lines: list[Any] = []
    watched(action, events, lambda frame: lines.append((frame.f_code, frame.f_lineno)))
    seen, chosen = collections.Counter[Any](), []
    for i, line in enumerate(lines):
        seen[line] += 1
        if seen[line] <= visits:
            chosen.append(i)
    return chosen


def stopped(action: Action, at: int, events: set[str], error: type[BaseException]) -> bool:
    """Raise the error at event `at`; whether there was one."""
    seen = itertools.count()

    def look(_: Any) -> None:
        if next(seen) == at:
            raise error

    try:
        watched(action, events, look)
    except error:
        return True
    return False


def state(*parts: Any) -> list[Any]:
    """All that may change, of layers, optimizers and connectivities."""
    found: list[Any] = []
    for part in parts:
        if isinstance(part, torch.nn.Module):
            found.append(part.connectivity.digest)
            for p in part.parameters():
                found += [p.detach().clone(), None if p.grad is None else p.grad.clone()]
        else:
            for group in part.state.values():
                found += [v.clone() for v in group.values()]
    return found


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        x.shape == y.shape and x.equal(y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(a, b, strict=True)
    )


def check_all_or_nothing(layer: Any, change: Action) -> None:
    """`change(layer, optimizer)`, interrupted everywhere."""
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    trained(layer, optimizer, 1)
    before = state(layer, optimizer)

    def again() -> tuple[Any, Any]:
        own = copy.deepcopy((layer, optimizer))
        for copied, p in zip(own[0].parameters(), layer.parameters(), strict=True):
            copied.grad = None if p.grad is None else p.grad.clone()  # a copy has none
        return own

    twins = again()
    change(*twins)
    after = state(*twins)
    trained(*twins, 1)
    counts = collections.Counter[bool]()
    own = again()
    for at in places(partial(change, *own), LINES, visits=2):
        own = again()
        assert stopped(partial(change, *own), at, LINES, KeyboardInterrupt)
        now = state(*own)
        assert same(now, before) or same(now, after), at
        counts[same(now, after)] += 1
        if same(now, before):
            change(*own)
        trained(*own, 1)
        assert same(state(*own), state(*twins)), at
    assert counts[False] > 50
    assert counts[True] > 5  # a line for each tensor that is written


@pytest.mark.parametrize(
    "kind", [dk.DendriticLayer, pytest.param(dk.SparseLinear, marks=pytest.mark.slow)]
)
def test_rewiring_is_done_or_not(kind: Any) -> None:
    def change(layer: Any, optimizer: Any) -> None:
        plasticity.rewire(layer, optimizer, fraction=0.3, generator=generator())

    check_all_or_nothing(made(kind), change)


def test_growth_is_done_or_not() -> None:
    new = dk.connectivity.random(61, 6, 1, 8, constant_fan_in=True, seed=1)

    def change(layer: Any, optimizer: Any) -> None:
        plasticity.grow(layer, optimizer, new, cable=0.5, generator=generator())

    check_all_or_nothing(made(dk.DendriticLayer), change)


def test_a_state_is_adopted_or_not() -> None:
    other = dk.DendriticLayer(network(seed=3), dtype=torch.float64)
    saved = copy.deepcopy(other.state_dict())

    def change(layer: Any, _: Any) -> None:
        plasticity.adopt(layer, saved)

    check_all_or_nothing(made(dk.DendriticLayer), change)


@pytest.mark.parametrize("bad", [lambda t: t.detach().numpy(), lambda t: t.to("meta")])
def test_a_state_without_values_is_not_adopted(bad: Action) -> None:
    layer, other = made(dk.DendriticLayer), dk.DendriticLayer(network(seed=3))
    saved = other.state_dict()
    saved["cable_weight"] = bad(saved["cable_weight"])
    before = state(layer)
    with pytest.raises(ValueError, match="Expected _extra_state and"):
        plasticity.adopt(layer, saved)
    assert same(state(layer), before)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["set", "rigl"])
def test_a_rewirer_goes_on(rule: Any) -> None:
    """Interrupted in a step, it rewires then or the next time, and the layer fits its optimizer."""

    def begun() -> tuple[Any, Any, plasticity.Rewirer]:
        layer = made(dk.DendriticLayer)
        optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
        rewirer = plasticity.Rewirer(layer, optimizer, rule=rule, every=1, end=50, seed=0)
        trained(layer, optimizer, 1)
        return layer, optimizer, rewirer

    for at in places(begun()[-1].step, LINES):
        layer, optimizer, rewirer = begun()
        c = layer.connectivity
        assert stopped(rewirer.step, at, LINES, KeyboardInterrupt)
        trained(layer, optimizer, 1)
        assert rewirer.step()
        assert layer.connectivity is not c
        shapes = {v.shape for v in optimizer.state[layer.synapse_weight].values()}
        assert shapes == {layer.synapse_weight.shape, torch.Size([])}


@pytest.mark.parametrize(
    "backend",
    ["cpp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("numba", "reference"))],
    indirect=True,
)
@pytest.mark.parametrize("fresh", [False, True], ids=["with plans", "making plans"])
@pytest.mark.parametrize(
    ("events", "error"),
    [(LINES, KeyboardInterrupt), ({"c_call"}, MemoryError)],
    ids=["interrupted", "no memory"],
)
def test_the_next_call_is_right(
    backend: str, events: set[str], error: type[BaseException], fresh: bool
) -> None:
    """Wherever a call of a function in C or a line of the package fails, in forward or backward."""
    c, *rest = whole_numbers(2)
    with dk.use_backend("reference"):
        expected = outputs(c, *rest)
    outputs(c, *rest)

    def network() -> dk.Connectivity:
        return whole_numbers(2)[0] if fresh else c

    own = network()
    chosen = places(partial(outputs, own, *rest), events)
    assert len(chosen) > 20
    for at in chosen:
        own = network()
        assert stopped(partial(outputs, own, *rest), at, events, error)
        found = outputs(own, *rest)
        assert all(a.equal(b) for a, b in zip(found, expected, strict=True)), at


def test_a_step_in_backward_that_fails_leaves_no_gradient() -> None:
    layer = made(dk.DendriticLayer)
    trainer = optim.StepInBackward(layer.parameters(), lambda p: torch.optim.SGD(p, 1e-2))
    x = torch.randn(5, 61, dtype=torch.float64)

    def fail(*_: Any) -> None:
        raise MemoryError

    handles = [one.register_step_pre_hook(fail) for one in trainer.optimizers]
    with pytest.raises(MemoryError):
        layer(x).sum().backward()
    for handle in handles:
        handle.remove()
    before = layer.cable_weight.detach().clone()
    layer(x).sum().backward()
    assert not layer.cable_weight.equal(before)
    assert all(p.grad is None for p in layer.parameters())
