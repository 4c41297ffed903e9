"""What sharing torch's threads costs: the layer and a matrix product alone, then in turns.

    python -m bench.alternating [--case A] [--threads 4] [--seconds 3]

Medians of one call each. "In turns" calls one after the other all the time, so that each finds the
threads and the caches as the other left them; the second figure is its ratio to "alone".
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch

from bench.cases import CASES
from bench.problem import Problem

Run = Callable[[], object]


def in_turns(runs: dict[str, Run], seconds: float) -> dict[str, float]:
    """Milliseconds of each, one call of each after the other."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            found[name].append((time.perf_counter() - start) * 1e3)
    return {name: median(times) for name, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.alternating", description=__doc__)
    parser.add_argument("--case", choices=CASES, default="A")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    case = CASES[options.case]
    problem = Problem.draw(case.connectivity("constant"), case.batch)
    layer = problem.layer()
    a, b = torch.randn(512, 512), torch.randn(512, 512)

    def train() -> None:
        layer.zero_grad()
        layer(problem.x).backward(problem.grad)

    runs: dict[str, Run] = {"layer, forward and backward": train, "matmul 512": lambda: a @ b}
    alone = {name: in_turns({name: run}, options.seconds)[name] for name, run in runs.items()}
    together = in_turns(runs, 2 * options.seconds)
    print(f"{case}, {options.threads} threads, torch {torch.__version__}. ms: alone, in turns")
    for name in runs:
        ratio = together[name] / alone[name]
        print(f"{name:30} {alone[name]:8.3f} {together[name]:8.3f}  {ratio:.2f}x")


if __name__ == "__main__":
    main()
