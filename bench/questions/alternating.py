"""What it costs to share the threads of torch: the layer and a matrix product alone, then in turns.

    python -m bench.questions.alternating [--case A] [--threads 4] [--seconds 3]

Prints medians of single calls. "In turns" alternates between the two, so that each finds the
threads and the caches in the state that the other left; the second figure is its ratio to "alone".
The same for a 1 x 1 nn.Linear shows the part that any layer pays: Python and autograd run with cold
caches.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch

from bench.speed.cases import CASES
from dendrite_kernels.benchmark.problem import Problem

Run = Callable[[], object]


def in_turns(runs: dict[str, Run], seconds: float) -> dict[str, float]:
    """Median milliseconds of each; the calls alternate."""
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
    parser = argparse.ArgumentParser(
        prog="python -m bench.questions.alternating", description=__doc__
    )
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

    tiny, grain = torch.nn.Linear(1, 1), torch.ones(1, 1)

    def tiny_linear() -> None:
        tiny.zero_grad()
        tiny(grain).backward(grain)

    matmul: dict[str, Run] = {"matmul 512": lambda: a @ b}
    print(f"{case}, {options.threads} threads, torch {torch.__version__}. ms: alone, in turns")
    for name, run in {"the layer": train, "nn.Linear(1, 1)": tiny_linear}.items():
        pair = {f"{name}, forward and backward": run, **matmul}
        alone = {key: in_turns({key: pair[key]}, options.seconds)[key] for key in pair}
        together = in_turns(pair, 2 * options.seconds)
        for key in pair:
            lost = together[key] - alone[key]
            print(f"{key:38} {alone[key]:8.3f} {together[key]:8.3f}  {lost:+.3f}", end="")
            print(f"  {together[key] / alone[key]:.2f}x")


if __name__ == "__main__":
    main()
