"""What does a run that rewires cost, beside the same run of dense layers under masks?

    python -m bench.questions.rewiring_run [--threads 1 2] [--seconds 60]

A run is 100 training steps (zero_grad, forward, cross-entropy, backward, masks on the gradients of
dense layers, Adam) and one rewiring by its rule, of 784 inputs, 128 somas of 16 dendrites with 16
random synapses each, an output layer and 128 samples. On dense layers a rewiring draws the mask
anew: where it is 0 each number of the gradient of [R, N] is there anyway, and RigL takes all of
them as candidates; ours draws 16 a dendrite. "static" does not rewire. Runs take turns; before,
five steps must give the same logits and gradients.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import dendrite_kernels as dk
from bench.environment import describe_run
from bench.questions.dense_twins import (
    BATCH,
    CLASSES,
    SOMAS,
    N,
    largest_error,
    random,
    report_speed,
    results,
)  # fmt: skip
from bench.speed.run import RESULTS
from dendrite_kernels.benchmark.masked_dense import MaskedDendriticLayer
from dendrite_kernels.benchmark.timing import Task, interleave, ratio
from dendrite_kernels.benchmark.training_step import TrainingStep
from dendrite_kernels.plasticity import Rewirer

Rule = Literal["static", "set", "rigl"]
RULES: tuple[Rule, ...] = ("static", "set", "rigl")
EVERY, FRACTION, END = 100, 0.3, 10**9


class DenseRewirer:
    """Rewires a layer under masks in each EVERY-th step, as dk.plasticity does on synapses."""

    def __init__(self, layer: MaskedDendriticLayer, optimizer: torch.optim.Optimizer, rule: Rule):
        self.layer, self.optimizer, self.rule, self.steps = layer, optimizer, rule, 0
        self.grad: Tensor | None = None  # of all [R, N], where it is asked for
        layer.dendrite.weight.register_post_accumulate_grad_hook(self._remember)

    def _remember(self, weight: Tensor) -> None:
        if self.rule == "rigl" and (self.steps + 1) % EVERY == 0:
            assert weight.grad is not None
            self.grad = weight.grad.clone()

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        if self.steps % EVERY:
            return
        weight, mask = self.layer.dendrite.weight, self.layer.dendrite_mask
        share = FRACTION / 2 * (1 + math.cos(math.pi * self.steps / END))
        count = max(1, round(share * int(mask[0].sum())))
        weak = weight.abs().masked_fill_(mask == 0, math.inf).topk(count, largest=False).indices
        scores = torch.rand_like(weight) if self.grad is None else self.grad.abs()
        new = scores.masked_fill_(mask > 0, -1.0).topk(count).indices
        state = self.optimizer.state[weight]
        for numbers in (weight, state["exp_avg"], state["exp_avg_sq"]):
            numbers.scatter_(1, weak, 0.0).scatter_(1, new, 0.0)
        mask.scatter_(1, weak, 0.0).scatter_(1, new, 1.0)


def run_of(step: TrainingStep, x: Tensor, y: Tensor, after: Callable[[], object]) -> None:
    for _ in range(EVERY):
        step(x, y)
        after()


def speed(seconds: float) -> dict[str, Any]:
    torch.manual_seed(0)
    x, y = torch.rand(BATCH, N), torch.randint(CLASSES, (BATCH,))
    tasks: dict[str, Task] = {}
    errors = {}
    for rule in RULES:
        ours = dk.DendriticLayer(random(SOMAS, 16, 16, seed=0))
        dense = MaskedDendriticLayer.from_layer(ours)
        head = nn.Linear(SOMAS, CLASSES).state_dict()
        steps = []
        for layer in (ours, dense):
            network = nn.Sequential(layer, nn.Linear(SOMAS, CLASSES))
            network[1].load_state_dict(head)
            steps.append(TrainingStep(network, 1e-3))
        found = [results(step, x, y) for step in steps]
        errors[rule] = largest_error(found[1], found[0])
        afters: list[Callable[[], object]] = [lambda: None] * 2
        if rule != "static":
            sparse = Rewirer(
                ours, steps[0].optimizer, rule=rule, every=EVERY, fraction=FRACTION, end=END, seed=0
            )
            afters = [sparse.step, DenseRewirer(dense, steps[1].optimizer, rule).step]
        for name, step, after in zip((rule, f"{rule}, dense masks"), steps, afters, strict=True):
            run_of(step, x, y, after)
            tasks[name] = Task(partial(run_of, step, x, y, after))
        fan_in = dense.dendrite_mask.sum(1)
        if not bool((fan_in == 16).all()):
            raise RuntimeError(f"Expected 16 synapses a dendrite under the mask, got {fan_in}")
    interleave(list(tasks.values()), seconds)
    pairs = [(f"{rule}, dense masks", rule) for rule in RULES]
    pairs += [(rule, "static") for rule in RULES[1:]]
    return {
        "ms": {name: task.summary() for name, task in tasks.items()},
        "ratios": {f"{a} / {b}": ratio(tasks[a], tasks[b]) for a, b in pairs},
        "relative_errors": errors,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.questions.rewiring_run")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=60.0, help="of timing, for each of these")
    parser.add_argument("--output", type=Path, default=RESULTS / "rewiring_run.json")
    options = parser.parse_args(arguments)
    report = describe_run(parser, arguments, options.threads[0])
    report_speed(report, options.output, options.threads, partial(speed, options.seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
