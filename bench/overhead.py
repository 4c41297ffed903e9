"""What one call costs beside its arithmetic: a tiny layer against nn.Linear, eager and compiled.

    python -m bench.overhead

Times are CPU time of the calling thread, so that other work on the machine counts little.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import dendrite_kernels as dk

BATCH, REPEATS, CALLS = 4, 60, 100
Run = Callable[[], object]


def models() -> dict[str, nn.Module]:
    c = dk.connectivity.random(16, 4, 2, 4, constant_fan_in=True, seed=0)
    return {
        "nn.Linear": nn.Linear(16, 4),
        "SparseLinear": dk.SparseLinear(c),
        "DendriticLayer": dk.DendriticLayer(c),
    }


def without_gradients(model: nn.Module, x: torch.Tensor) -> Run:
    def run() -> None:
        with torch.no_grad():
            model(x)

    return run


def forward(model: nn.Module, x: torch.Tensor) -> Run:
    return lambda: model(x)


def forward_backward(model: nn.Module, x: torch.Tensor) -> Run:
    x = x.clone().requires_grad_()
    grad = torch.ones_like(model(x))
    tensors = [x, *model.parameters()]

    def run() -> None:
        model(x).backward(grad)
        for tensor in tensors:
            tensor.grad = None

    return run


WAYS = {"no grad": without_gradients, "forward": forward, "forward+backward": forward_backward}


def measure(cases: dict[str, Run]) -> dict[str, float]:
    """Microseconds per call: the lower quartile of rounds that visit every case in turn."""
    for run in cases.values():
        for _ in range(20):
            run()
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(REPEATS):
        for name, run in cases.items():
            run()
            start = time.thread_time()
            for _ in range(CALLS):
                run()
            times[name].append((time.thread_time() - start) / CALLS * 1e6)
    return {name: sorted(values)[REPEATS // 4] for name, values in times.items()}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(BATCH, 16)
    cases = {}
    for compiled in (False, True):
        for name, model in models().items():
            runs: Any = torch.compile(model, fullgraph=True) if compiled else model
            for way, build in WAYS.items():
                cases[f"{name}|{'compiled ' if compiled else ''}{way}"] = build(runs, x)
    found = measure(cases)
    columns = [f"{mode}{way}" for mode in ("", "compiled ") for way in WAYS]
    print(f"us per call; batch {BATCH}, torch {torch.__version__}, {platform.processor()}")
    print("".join(f"{title:>26}" for title in ["", *columns]))
    for name in models():
        row = [f"{found[f'{name}|{column}']:26.1f}" for column in columns]
        print(f"{name:>26}" + "".join(row))
    limit = 3 + 1.6 * found["nn.Linear|no grad"]
    print(f"limit of a forward call, 3 us + 1.6 nn.Linear: {limit:.1f} us")


if __name__ == "__main__":
    main()
