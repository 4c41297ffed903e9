"""Permuted MNIST in tasks one after the other: what do context gates and k winners each do?

    python -m bench.questions.permuted --data-root FOLDER --seeds 0 1 2 [--width 256] [--epochs 1]

Networks of two hidden layers and one head for all tasks. Each task has its own permutation of the
pixels; images are normalised. A gate sees the prototype of a task, the mean of its training images:
while training that of the task, in the test the one nearest to the image. Half of the weights exist
in the layers below gates or winners; sparse: 64 a unit. A training that the file has is not
repeated.

The published setting is --width 2048 --epochs 3 (Iyer et al. 2022): hours on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import dendrite_kernels as dk
from bench.environment import describe_run, write_json
from bench.paper import datasets
from bench.paper.continual import Task, permuted
from bench.paper.datasets import ImageData
from bench.speed.run import RESULTS
from dendrite_kernels.benchmark.training_step import TrainingStep
from dendrite_kernels.models import count_parameters

BATCH, LR = 256, 5e-4
WINNERS = 0.05


@dataclass(frozen=True)
class Arm:
    """What the hidden layers have."""

    gated: bool
    winners: bool
    synapses: float | None  # of a unit; below 1: as a part of the inputs; None: all


ARMS = {
    "gate + winners": Arm(True, True, 0.5),
    "gate, ReLU": Arm(True, False, 0.5),
    "winners": Arm(False, True, 0.5),
    "dense, ReLU": Arm(False, False, None),
    "gate + winners, sparse": Arm(True, True, 64),
}


class Network(nn.Module):
    """pixels -> width -> width -> classes."""

    prototypes: Tensor  # [tasks so far, pixels]; of one task, while it is learned

    def __init__(
        self, arm: Arm, pixels: int, width: int, classes: int, tasks: int, rng: np.random.Generator
    ) -> None:
        super().__init__()
        sizes = [pixels, width, width, classes]
        self.linears, self.gates = nn.ModuleList(), nn.ModuleList()
        for i, (inputs, units) in enumerate(pairwise(sizes)):
            hidden = i < 2
            self.linears.append(_linear(inputs, units, arm.synapses if hidden else None, rng))
            if arm.winners and i:  # below are k winners: few of the inputs are not 0
                with torch.no_grad():
                    self.linears[-1].get_parameter("weight").div_(math.sqrt(WINNERS))
            if arm.gated and hidden:
                segments = dk.connectivity.all_to_all(pixels, units, tasks)
                self.gates.append(dk.ContextGate(segments))
        self.choose = dk.KWinners(WINNERS) if arm.winners else nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        task = nearest(x, self.prototypes)
        for i, linear in enumerate(list(self.linears)[:-1]):
            x = linear(x)
            if self.gates:
                x = x * self.gates[i](self.prototypes)[task]
            x = self.choose(x)
        logits: Tensor = self.linears[-1](x)
        return logits


def _linear(inputs: int, units: int, synapses: float | None, rng: np.random.Generator) -> nn.Module:
    """Weights and biases uniform within 1 / sqrt(fan_in), as torch has it."""
    if synapses is None:
        return nn.Linear(inputs, units)
    count = round(synapses * inputs if synapses < 1 else synapses)
    layer = dk.SparseLinear(
        dk.connectivity.random(inputs, units, 1, count, constant_fan_in=True, seed=rng)
    )
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -1 / math.sqrt(count), 1 / math.sqrt(count))
    return layer


def nearest(x: Tensor, prototypes: Tensor) -> Tensor:
    """x [B, N], prototypes [P, N] -> which is the nearest, [B]."""
    if len(prototypes) == 1:
        return torch.zeros(1, dtype=torch.long)
    return torch.cdist(x, prototypes).argmin(1)


def learn(arm: Arm, data: ImageData, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Test accuracy in % of each task after the last; how often prototypes are found."""
    torch.manual_seed(seed)
    rng, pixels = np.random.default_rng(seed), data.x_train.shape[1]
    network = Network(arm, pixels, options.width, data.classes, options.tasks, rng)
    step = TrainingStep(network, LR)
    tests: list[Task] = []
    prototypes = torch.empty(0, pixels)
    for task in permuted(data, options.tasks, seed):
        network.prototypes = task.x_train.mean(0, keepdim=True)
        prototypes = torch.cat([prototypes, network.prototypes])
        for _ in range(options.epochs):
            for rows in torch.from_numpy(rng.permutation(len(task.y_train))).split(BATCH):
                step(task.x_train[rows], task.y_train[rows])
        tests.append(task._replace(x_train=task.x_train[:0], y_train=task.y_train[:0]))
    network.prototypes = prototypes
    with torch.no_grad():
        right = [(network(t.x_test).argmax(1) == t.y_test).double().mean().item() for t in tests]
    found = [(nearest(t.x_test, prototypes) == i).double().mean() for i, t in enumerate(tests)]
    return {
        "percent": 100 * statistics.mean(right),
        "of_tasks": [100 * value for value in right],
        "prototypes_found": 100 * float(torch.stack(found).mean()),
        "parameters": count_parameters(network),
    }


def normalised(data: ImageData) -> ImageData:
    mean, deviation = data.x_train.mean(dtype=np.float64), data.x_train.std(dtype=np.float64)

    def scaled(x: Any) -> Any:
        return ((x - mean) / deviation).astype(np.float32)

    return replace(data, x_train=scaled(data.x_train), x_test=scaled(data.x_test))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.questions.permuted")
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--data-root", help="folder with the data set's files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=1, help="of each task")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "permuted_gates.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    setting = {key: getattr(options, key) for key in ("data", "tasks", "width", "epochs")}
    report = {**describe_run(parser, arguments, options.threads), "setting": setting, "arms": {}}
    path = options.output
    if path.exists():
        report = json.loads(path.read_text())
        if report["setting"] != setting:
            raise SystemExit(f"Expected a file of {setting}, got {report['setting']}")
    data = normalised(datasets.load(options.data, options.data_root))
    for seed in options.seeds:
        for name in options.arms:
            done = report["arms"].setdefault(name, {})
            if str(seed) in done:
                continue
            done[str(seed)] = learn(ARMS[name], data, options, seed)
            write_json(path, report)
            found = done[str(seed)]
            print(f"{name}, seed {seed}: {found['percent']:.2f}", flush=True)
    for name, done in report["arms"].items():
        values = [result["percent"] for result in done.values()]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{name:24s} {statistics.mean(values):.2f} +- {spread:.2f}, {len(values)} seeds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
