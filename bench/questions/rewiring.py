"""What it costs to rewire a layer: in training steps, and as a share of a run.

    python -m bench.questions.rewiring [--cases A B C D] [--threads 1] [--every 100] [--repeats 5]

A training step is forward and backward of one layer, with the gradient of x, and Adam. Rewiring
adds: with RigL, the gradients of as many candidates as synapses in the backward pass before; the
rewiring itself; and what the next step makes anew for another connectivity. "Rewiring" is all of
that beside a plain step, medians, and "share" what it takes of the time when every T-th step
rewires. The cosine's first fraction, 0.3, moves most.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import get_args

import torch

from bench.speed.cases import CASES
from dendrite_kernels.benchmark.case import Case
from dendrite_kernels.benchmark.problem import Problem
from dendrite_kernels.plasticity import Rewirer, Rule


def milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def measure(case: Case, rule: Rule, repeats: int) -> tuple[float, float, float, float]:
    """Medians in ms: a plain step; what candidates, rewiring and the step after it add."""
    problem = Problem.draw(case.connectivity("constant"), case.batch)
    layer, x = problem.layer(), problem.x.detach().requires_grad_()
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)

    def train() -> None:
        optimizer.zero_grad()
        layer(x).backward(problem.grad)
        optimizer.step()

    for _ in range(3):
        train()
    rewirer = Rewirer(layer, optimizer, rule=rule, every=4, end=10**9, seed=0)
    found = []
    for i in range(4 * repeats + 4):
        step, move = milliseconds(train), milliseconds(rewirer.step)
        if i >= 4:  # the first round warms up
            found.append((step, move))
    after, first, second, before = ([found[i] for i in range(k, len(found), 4)] for k in range(4))
    plain = median(step for step, _ in first + second)
    return (
        plain,
        median(step for step, _ in before) - plain,
        median(move for _, move in before),
        median(step for step, _ in after) - plain,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.questions.rewiring", description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["A", "B", "C", "D"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--every", type=int, default=100, help="T, for the share")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.threads} threads, torch {torch.__version__}; times in ms")
    print("case rule    step  candidates  rewire  next step  rewiring: steps  share")
    for name in options.cases:
        for rule in get_args(Rule):
            plain, *parts = measure(CASES[name], rule, options.repeats)
            steps = sum(parts) / plain
            share = steps / (options.every + steps)
            print(
                f"{name:4} {rule:5} {plain:6.1f}  {parts[0]:10.1f}  {parts[1]:6.1f}  "
                f"{parts[2]:9.1f}  {steps:15.1f}  {share:5.1%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
