"""The dense way to rewire, which our time is compared with: each dendrite keeps its fan-in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dendrite_kernels as dk
from bench.questions import rewiring_run
from bench.questions.rewiring_run import DenseRewirer, Rule
from dendrite_kernels.benchmark.masked_dense import MaskedDendriticLayer
from dendrite_kernels.benchmark.training_step import TrainingStep


@pytest.mark.parametrize("rule", ["set", "rigl"])
def test_the_weakest_synapses_go(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewiring_run, "EVERY", 2)
    c = dk.connectivity.random(30, 5, 3, 10, constant_fan_in=True, seed=0)
    layer = MaskedDendriticLayer.from_layer(dk.DendriticLayer(c))
    step = TrainingStep(nn.Sequential(layer, nn.Linear(5, 4)), 1e-3)
    rewirer = DenseRewirer(layer, step.optimizer, rule)
    x, y = torch.rand(8, 30), torch.randint(4, (8,))
    grads = []
    layer.dendrite.weight.register_post_accumulate_grad_hook(
        lambda weight: grads.append(weight.grad.clone())
    )
    before = layer.dendrite_mask.clone()
    step(x, y)
    rewirer.step()
    assert torch.equal(layer.dendrite_mask, before)
    step(x, y)
    weight = layer.dendrite.weight.detach().clone()
    rewirer.step()
    gone, new = (before > layer.dendrite_mask), (layer.dendrite_mask > before)
    assert gone.sum(1).tolist() == new.sum(1).tolist() == [3] * 15  # 0.3 of 10
    kept = weight.abs().where(layer.dendrite_mask * before > 0, torch.inf).amin(1)
    assert bool((weight.abs().where(gone, 0).amax(1) <= kept).all())
    if rule == "rigl":
        missing = grads[1].abs().where(before == 0, -1)
        assert bool(
            (missing.where(new, torch.inf).amin(1) >= missing.where(~new, -1).amax(1)).all()
        )
    state = step.optimizer.state[layer.dendrite.weight]
    for numbers in (layer.dendrite.weight, state["exp_avg"], state["exp_avg_sq"]):
        assert not numbers[gone | new].any()
