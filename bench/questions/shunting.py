"""Shunting neurons: beside dense layers, and beside dendritic neurons of their size.

    python -m bench.questions.shunting speed [--threads 1 2] [--seconds 20]
    python -m bench.questions.shunting accuracy --data-root FOLDER [--seeds 5] [--epochs 8]

speed: whole training steps (zero_grad, forward, cross-entropy, backward, Adam) in turns: 784
    inputs, S somas of D dendrites with 9 excitatory and 8 inhibitory synapses each, an output
    layer, 128 samples; the same with dense conductances; a DendriticLayer of as many parameters.
    After five steps dense and sparse ones must agree. One thread: CPU time; more: wall time.
accuracy: Fashion-MNIST, pixels from 0 to 1, with networks of exactly as many parameters at several
    learning rates. A training that the file has is not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dendrite_kernels as dk
from bench.environment import describe_run, write_json
from bench.paper import datasets
from bench.questions.dense_twins import (
    BATCH,
    CLASSES,
    SOMAS,
    N,
    largest_error,
    print_accuracies,
    print_speed,
    random,
    results,
    train,
)  # fmt: skip
from bench.speed.run import RESULTS
from dendrite_kernels.benchmark.timing import Task, interleave, ratio
from dendrite_kernels.benchmark.training_step import TrainingStep
from dendrite_kernels.models import count_parameters
from dendrite_kernels.shunting import ShuntingLayer

EXCITATORY, INHIBITORY = 9, 8
SIZES = [(64, 4), (128, 16), (256, 32)]  # S, D
RATES = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]


class DenseShunting(nn.Module):
    """The same neurons of matrices. Where no synapse is, theta is -inf, whose gradient is 0."""

    def __init__(self, layer: ShuntingLayer) -> None:
        super().__init__()
        self.theta = nn.ParameterList()
        for part in (layer.excitation, layer.inhibition, layer.cable):
            mask = part.connectivity.to_mask()
            theta = torch.full(mask.shape, -torch.inf, dtype=part.weight.dtype)
            theta[mask] = part.weight.detach().log()
            self.theta.append(theta)

    def forward(self, x: Tensor) -> Tensor:
        g, h, c = (theta.exp() for theta in self.theta)  # [R, N], [R, N], [S, R]
        e, i = F.linear(x, g), F.linear(x, h)
        y: Tensor = F.linear(e / (1 + e + i), c) / (1 + c.sum(1))
        return y


def shunting(somas: int, dendrites: int, seed: int = 0, input_mean: float = 0.5) -> ShuntingLayer:
    synapses = [
        random(somas, dendrites, count, seed=2 * seed + i)
        for i, count in enumerate((EXCITATORY, INHIBITORY))
    ]
    return ShuntingLayer(synapses[0], synapses[1], input_mean=input_mean)


def dendritic(somas: int, dendrites: int, seed: int = 0) -> dk.DendriticLayer:
    """As many parameters: biases take the place of a synapse of each dendrite and each soma."""
    fewer = somas // dendrites  # somas whose dendrites have one synapse less
    k = EXCITATORY + INHIBITORY - 1
    parts = [random(somas - fewer, dendrites, k, seed=2 * seed)]
    parts.append(random(fewer, dendrites, k - 1, seed=2 * seed + 1))
    return dk.DendriticLayer(dk.Connectivity.stack(parts))


# ---- speed ----


class CpuTask(Task):
    """CPU time of the process, which other work on the machine does not lengthen as it does waits.

    Only of one thread: with more it is a sum.
    """

    def measure(self) -> float:
        started = time.process_time()
        self.run()
        return time.process_time() - started


def speed(somas: int, dendrites: int, seconds: float, kind: type[Task]) -> dict[str, Any]:
    torch.manual_seed(0)
    ours = shunting(somas, dendrites)
    layers = {
        "shunting": ours,
        "shunting, dense": DenseShunting(ours),
        "dendritic": dendritic(somas, dendrites),
    }
    x, y = torch.rand(BATCH, N), torch.randint(CLASSES, (BATCH,))
    head = nn.Linear(somas, CLASSES).state_dict()
    steps = {}
    for name, layer in layers.items():
        network = nn.Sequential(layer, nn.Linear(somas, CLASSES))
        network[1].load_state_dict(head)
        steps[name] = TrainingStep(network, 1e-3)
    found = {name: results(step, x, y) for name, step in steps.items()}
    error = largest_error(found["shunting, dense"], found["shunting"])
    tasks = {name: kind(partial(step, x, y)) for name, step in steps.items()}
    interleave(list(tasks.values()), seconds)
    pairs = [("shunting, dense", "shunting"), ("shunting", "dendritic")]
    return {
        "parameters": {name: count_parameters(layer) for name, layer in layers.items()},
        "ms": {name: task.summary() for name, task in tasks.items()},
        "ratios": {f"{a} / {b}": ratio(tasks[a], tasks[b]) for a, b in pairs},
        "relative_error": error,
    }


# ---- accuracy ----


def networks(seed: int, input_mean: float) -> dict[str, Callable[[], nn.Module]]:
    return {
        "shunting": lambda: shunting(SOMAS, 16, seed, input_mean),
        "dendritic": lambda: dendritic(SOMAS, 16, seed),
    }


def accuracy(report: dict[str, Any], path: Path, options: argparse.Namespace) -> None:
    data = datasets.load("fmnist", options.data_root)
    if data.x_train.min() < 0:
        raise ValueError("Expected pixels >= 0, got negative ones")
    mean = float(data.x_train.mean())
    table = report.setdefault("accuracy", {"epochs": options.epochs, "percent": {}})
    if table["epochs"] != options.epochs:
        raise SystemExit(f"Expected a file of {options.epochs} epochs, got {table['epochs']}")
    for seed in range(options.seeds):
        for rate in RATES:
            for name, make in networks(seed, mean).items():
                done = table["percent"].setdefault(f"{name}, {rate:g}", {})
                if str(seed) in done:
                    continue
                torch.manual_seed(seed)
                layer = make()
                done[str(seed)] = 100 * train(layer, data, options.epochs, seed, rate)
                write_json(path, report)
                count, percent = count_parameters(layer), done[str(seed)]
                print(
                    f"{name}, {count} parameters, {rate:g}, seed {seed}: {percent:.2f}", flush=True
                )
    print_accuracies(table["percent"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.questions.shunting")
    parser.add_argument("what", choices=["speed", "accuracy"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing, for each size")
    parser.add_argument("--data-root", help="folder with Fashion-MNIST")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--output", type=Path, help="default: bench/results/shunting_WHAT.json")
    options = parser.parse_args(arguments)
    path = options.output or RESULTS / f"shunting_{options.what}.json"
    report = describe_run(parser, arguments, options.threads[0])
    if options.what == "accuracy":
        torch.set_num_threads(options.threads[0])
        before = json.loads(path.read_text()) if path.exists() else {}
        accuracy({**report, **before}, path, options)
        return 0
    report["speed"] = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for somas, dendrites in SIZES:
            kind, clock = (CpuTask, "CPU") if threads == 1 else (Task, "wall")
            found = speed(somas, dendrites, options.seconds, kind)
            size = {"threads": threads, "clock": clock, "somas": somas, "dendrites": dendrites}
            report["speed"].append({**size, **found})
            write_json(path, report, digits=4)
            print(size)
            print_speed(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
