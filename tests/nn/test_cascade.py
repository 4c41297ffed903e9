"""What candidates are trained by, against numpy; and dendrites that stay bit for bit."""

from __future__ import annotations

import copy
import io
import itertools
import operator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

import dendrite_kernels as dk
from dendrite_kernels import Connectivity
from dendrite_kernels.plasticity import correlation, freeze, grow, rewire
from tests import oracle
from tests.nn.test_growth import BATCH, SOMAS, data, dendrites, generator, made, trained

RAGGED = Connectivity.from_csr(range(8), [0] * 7, 3, soma_ptr=[0, 0, 3, 4, 4, 7])


def drawn(batch: int = BATCH, c: Connectivity = RAGGED) -> list[torch.Tensor]:
    sizes = c.num_dendrites, c.num_somas
    return [oracle.drawn(batch, n, seed=n, dtype=torch.float64) for n in sizes]


# ---- correlation ----


def test_correlation_is_that_of_numpy() -> None:
    a, err = drawn()
    found = correlation(a, err, RAGGED)
    assert found.shape == (7,)
    for s, (first, end) in enumerate(itertools.pairwise(RAGGED.soma_ptr.tolist())):
        for r in range(first, end):
            expected = abs(np.corrcoef(a[:, r].numpy(), err[:, s].numpy())[0, 1])
            assert abs(float(found[r]) - expected) < 1e-14
            covariance = abs(np.cov(a[:, r].numpy(), err[:, s].numpy(), bias=True)[0, 1])
            scaled = float(found[r] * a[:, r].std(correction=0) * err[:, s].std(correction=0))
            assert abs(scaled - covariance) < 1e-14


def test_correlation_is_free_of_scale_and_at_most_1() -> None:
    a, err = drawn()
    exact = correlation(a, err, RAGGED)
    owner = torch.arange(5).repeat_interleave(RAGGED.soma_ptr.diff())
    assert oracle.relative_error(correlation(3 * a - 5, -1e-9 * err + 1e-9, RAGGED), exact) < 1e-7
    assert oracle.relative_error(correlation(2 - err[:, owner], err, RAGGED), torch.ones(7)) < 1e-14
    low = correlation(a.bfloat16(), err.bfloat16(), RAGGED)
    assert low.dtype == torch.float32
    assert oracle.relative_error(low, exact) < 1e-2
    assert oracle.relative_error(correlation(a.float(), err.float(), RAGGED), exact) < 1e-6


def test_correlation_is_differentiable() -> None:
    a, err = (t.requires_grad_() for t in drawn(6))
    assert gradcheck(lambda a, err: correlation(a, err, RAGGED), (a, err))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_does_not_vary_has_no_score_and_no_gradient(dtype: torch.dtype) -> None:
    a, err = (t.to(dtype) for t in drawn())
    a[:, 2], a[:, 4], err[:, 2] = 0, 1 / 3, 0.7
    a.requires_grad_()
    found = correlation(a, err, RAGGED)
    found.sum().backward()
    assert (found == 0).tolist() == [False, False, True, True, True, False, False]
    assert a.grad is not None
    assert a.grad.isfinite().all()
    assert not a.grad[:, 2:5].any()
    assert a.grad[:, 5:].all()
    for batch in (0, 1):
        assert not correlation(*(t.to(dtype) for t in drawn(batch)), RAGGED).any()


def test_correlation_refuses_other_shapes() -> None:
    a, err = drawn()
    message = r"Expected a \[B, 7\] and err \[B, 5\], got "
    for wrong in ((err, a), (a[1:], err), (a[0], err[0]), (a, err[:, :4])):
        with pytest.raises(ValueError, match=message):
            correlation(*wrong, RAGGED)
    with pytest.raises(TypeError, match="Expected a Connectivity, got DendriticLayer"):
        correlation(a, err, made())  # type: ignore[arg-type]


def test_candidates_in_a_layer_learn_the_error() -> None:
    """As docs/growth.md does it: nothing else moves, and the score rises."""
    layer, target = made(), oracle.drawn(BATCH, SOMAS, seed=50, dtype=torch.float64)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    trained(layer, optimizer)
    x, y, new = data(0), layer(data(0)).detach(), dendrites()
    rows = grow(layer, optimizer, new, generator=generator())
    before = copy.deepcopy(layer)
    trial = torch.optim.Adam([layer.synapse_weight, layer.dendrite_bias], 1e-2)
    scores = []
    for _ in range(60):
        trial.zero_grad()
        score = correlation(layer.dendrites(x)[:, rows], target, new).sum()
        (-score).backward()
        trial.step()
        scores.append(score.item())
    assert scores[-1] > scores[0] + 1
    assert torch.equal(layer(x), y)
    old = torch.ones(layer.connectivity.num_dendrites, dtype=torch.bool).index_fill(0, rows, False)
    x = torch.eye(x.shape[1]).double()
    assert torch.equal(layer.dendrites(x)[:, old], before.dendrites(x)[:, old])
    assert not torch.equal(layer.dendrites(x)[:, rows], before.dendrites(x)[:, rows])


# ---- frozen dendrites ----

OPTIMIZERS: dict[str, Any] = {
    "SGD": {"momentum": 0.9, "weight_decay": 0.1},
    "Adam": {"weight_decay": 0.1, "fused": False},
    "AdamW": {"weight_decay": 0.5, "amsgrad": True},
}


def optimizer_of(name: str, layer: nn.Module) -> Any:
    return getattr(torch.optim, name)(layer.parameters(), lr=0.05, **OPTIMIZERS[name])


def numbers(layer: dk.DendriticLayer, rows: list[int]) -> list[list[float]]:
    """Synapse weights and bias of dendrites, then the cable weight."""
    crow, (weight, bias, cable, _) = layer.connectivity.crow_indices.tolist(), layer.parameters()
    return [
        [*weight[crow[r] : crow[r + 1]].tolist(), bias[r].item(), cable[r].item()] for r in rows
    ]


def inputs(each: list[list[float]]) -> list[list[float]]:
    return [row[:-1] for row in each]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("constant", [True, False])
def test_frozen_dendrites_stay_bit_for_bit(name: str, constant: bool) -> None:
    layer = made(constant)
    optimizer = optimizer_of(name, layer)
    trained(layer, optimizer)  # momentum is there
    free = copy.deepcopy(layer)
    other = optimizer_of(name, free)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    rows = [7, 1, 9, 10]
    rest = sorted(set(range(layer.connectivity.num_dendrites)) - set(rows))
    before = numbers(layer, rows)
    handle = freeze(layer, optimizer, rows)
    assert handle.rows.tolist() == rows
    trained(layer, optimizer, 1)
    trained(free, other, 1)
    assert inputs(numbers(layer, rows)) == inputs(before) != inputs(numbers(free, rows))
    assert [row[-1] for row in numbers(layer, rows)] == [row[-1] for row in numbers(free, rows)]
    assert numbers(layer, rest) == numbers(free, rest)
    trained(layer, optimizer, 5)
    assert inputs(numbers(layer, rows)) == inputs(before)
    for name, p in list(layer.named_parameters())[:2]:
        assert p.grad is not None
        zero = {"synapse_weight": sum(len(row) - 2 for row in before), "dendrite_bias": len(rows)}
        assert int((p.grad == 0).sum()) >= zero[name] > 0
    handle.remove()
    trained(layer, optimizer, 1)
    now = numbers(layer, rows)
    assert all(map(operator.ne, itertools.chain(*now), itertools.chain(*before)))


def test_cables_too_and_several_handles() -> None:
    layer = made()
    optimizer = optimizer_of("AdamW", layer)
    trained(layer, optimizer)
    before = numbers(layer, [0, 1, 2])
    handles = freeze(layer, optimizer, torch.tensor([1]), cable=True), freeze(layer, optimizer, [2])
    trained(layer, optimizer)
    now = numbers(layer, [0, 1, 2])
    assert now[1] == before[1]
    assert now[2][:-1] == before[2][:-1]
    assert now[2][-1] != before[2][-1]
    assert now[0][0] != before[0][0]
    handles[0].remove()
    trained(layer, optimizer)
    assert numbers(layer, [1]) != [before[1]]
    assert inputs(numbers(layer, [2])) == inputs(before[2:])


def test_frozen_dendrites_stay_frozen_through_growth_and_rewiring() -> None:
    layer = made(False)
    optimizer = optimizer_of("AdamW", layer)
    trained(layer, optimizer)
    rows = [0, 5, 8, 39]
    handle, before = freeze(layer, optimizer, rows), numbers(layer, rows)
    for i in range(2):
        grow(layer, optimizer, dendrites(False), generator=generator(i))
        trained(layer, optimizer, seed=10 * i)
        now = handle.rows.tolist()
        pointer = dendrites(False).soma_ptr.tolist()
        somas = (1, 2, 4, 5)  # of these rows
        assert now == [r + (i + 1) * pointer[s] for r, s in zip(rows, somas, strict=True)]
        assert inputs(numbers(layer, now)) == inputs(before)
    assert now != rows
    everything = numbers(layer, range(layer.connectivity.num_dendrites))
    rewire(layer, optimizer, fraction=0.3)
    assert numbers(layer, range(layer.connectivity.num_dendrites)) != everything
    assert inputs(numbers(layer, now)) == inputs(before)
    handle.remove()
    rewire(layer, optimizer, fraction=0.3)
    assert inputs(numbers(layer, now)) != inputs(before)


def test_only_new_dendrites_train() -> None:
    layer = made()
    optimizer = optimizer_of("Adam", layer)
    trained(layer, optimizer)
    old = range(layer.connectivity.num_dendrites)
    handle, before = freeze(layer, optimizer, old, cable=True), numbers(layer, list(old))
    rows = grow(layer, optimizer, dendrites(), cable=0.1, generator=generator())
    new = numbers(layer, rows.tolist())
    trained(layer, optimizer)
    assert numbers(layer, handle.rows.tolist()) == before
    now = numbers(layer, rows.tolist())
    assert all(map(operator.ne, itertools.chain(*now), itertools.chain(*new)))


def test_frozen_with_steps_in_backward_and_without_an_optimizer() -> None:
    layer = made()
    trainer = dk.optim.StepInBackward(
        layer.parameters(), lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.5)
    )
    layer(data(0)).sum().backward()
    before = numbers(layer, [3, 4])
    freeze(layer, trainer, [3])
    layer(data(1)).sum().backward()
    now = numbers(layer, [3, 4])
    assert inputs(now[:1]) == inputs(before[:1])
    assert all(a != b for a, b in zip(now[1], before[1], strict=True))

    layer = made()
    before = numbers(layer, [3])
    freeze(layer, None, [3])
    trained(layer, torch.optim.SGD(layer.parameters(), 0.1))
    assert inputs(numbers(layer, [3])) == inputs(before)


def test_copies_of_a_frozen_layer_train() -> None:
    layer = made()
    freeze(layer, None, range(24))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for again in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        trained(again, torch.optim.SGD(again.parameters(), 0.1))
        assert not torch.equal(again.synapse_weight, layer.synapse_weight)


def test_compiled_layers_keep_frozen_dendrites() -> None:
    layer = made()
    optimizer = optimizer_of("AdamW", layer)
    run = torch.compile(layer, backend="aot_eager", fullgraph=True)
    trained(run, optimizer)
    handle, before = freeze(layer, optimizer, [2, 3]), numbers(layer, [2, 3])
    for i in range(2):
        trained(run, optimizer)
        assert inputs(numbers(layer, handle.rows.tolist())) == inputs(before)
        grow(layer, optimizer, dendrites(), generator=generator(i))
    torch.compiler.reset()


def test_freezing_refuses_what_does_not_fit() -> None:
    layer, other = made(), made()
    adam: Any = torch.optim.Adam(other.parameters())
    wrong: list[tuple[Any, Any, Any, str]] = [
        (nn.Linear(2, 2), None, [0], "Expected a DendriticLayer, got Linear"),
        (layer, None, [24], "Expected rows from 0 to 23, got 24 to 24"),
        (layer, None, [3, -1], "Expected rows from 0 to 23, got -1 to 3"),
        (layer, None, [0.5], "Expected rows of an integer type"),
        (layer, None, torch.ones(24, dtype=torch.bool), "Expected rows of an integer type"),
        (layer, adam, [0], "optimizer of the layer's synapse_weight, got one of others"),
    ]
    for a, optimizer, rows, match in wrong:
        with pytest.raises((TypeError, ValueError), match=match):
            freeze(a, optimizer, rows)
    assert not any(p._backward_hooks for p in layer.parameters())
    assert not adam._optimizer_step_pre_hooks
    freeze(layer, None, []).remove()
