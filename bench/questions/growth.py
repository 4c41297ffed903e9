"""Growing dendrites: what they gain in accuracy, and what growth costs.

    python -m bench.questions.growth accuracy --data-root FOLDER [--synapses 64 784] [--seeds 5]
    python -m bench.questions.growth speed [--threads 1] [--seconds 30]

accuracy: Fashion-MNIST; 16 ReLU units on all pixels and an output layer, trained for 3 epochs by
    Adam 1e-3 in batches of 128: the base. Then 4 epochs more of the base alone, or with one tanh
    dendrite for each unit, of so many synapses, whose cable weight starts at 0: all trained by
    their gradients for 4 epochs; or, after Fahlman & Lebiere, the dendrites by correlation for 2
    epochs while the rest waits, then the rest and the cables for 2 while their synapses are frozen.
    A training that the file has is not repeated.
speed: a dendrite for each soma of the layers of bench.speed.cases: ms of the growth, and of the
    next step beyond a plain one, also in plain steps. And whole training steps of a grown network
    beside the same network as dense layers under masks, in turns; results must agree first.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dendrite_kernels as dk
from bench.environment import describe_run, write_json
from bench.paper import datasets
from bench.paper.datasets import ImageData
from bench.questions.dense_twins import largest_error, results
from bench.questions.rewiring import milliseconds
from bench.speed.cases import CASES
from bench.speed.run import RESULTS
from dendrite_kernels.benchmark.case import Case
from dendrite_kernels.benchmark.masked_dense import MaskedDendriticLayer
from dendrite_kernels.benchmark.problem import Problem
from dendrite_kernels.benchmark.timing import Task, interleave, ratio
from dendrite_kernels.benchmark.training_step import TrainingStep

UNITS, BATCH, CLASSES = 16, 128, 10

# ---- accuracy ----


class Network(nn.Module):
    """Units of a dense sum and, if there are any, dendrites; an output layer."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.base, self.head = nn.Linear(inputs, UNITS), nn.Linear(UNITS, classes)
        self.dendrites: dk.DendriticLayer | None = None

    def sums(self, x: Tensor) -> Tensor:
        v: Tensor = self.base(x)
        return v if self.dendrites is None else v + self.dendrites(x)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.output(self.sums(x))
        return y

    def output(self, v: Tensor) -> Tensor:
        y: Tensor = self.head(v.relu())
        return y


class Training:
    """A network, its optimizer and the data in random order."""

    def __init__(self, data: ImageData, seed: int) -> None:
        torch.manual_seed(seed)
        self.x, self.y = torch.from_numpy(data.x_train), torch.from_numpy(data.y_train)
        self.test = torch.from_numpy(data.x_test), torch.from_numpy(data.y_test)
        self.network = Network(self.x.shape[1], data.classes)
        self.optimizer = torch.optim.Adam(self.network.parameters(), 1e-3)
        self.seed, self.rng = seed, np.random.default_rng(seed)

    def __deepcopy__(self, memo: dict[int, Any]) -> Training:
        new = copy.copy(self)
        new.network, new.rng = copy.deepcopy(self.network), copy.deepcopy(self.rng)
        new.optimizer = torch.optim.Adam(new.network.parameters(), 1e-3)
        new.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))  # else shared
        return new

    def batches(self, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(epochs):
            for rows in torch.from_numpy(self.rng.permutation(len(self.y))).split(BATCH):
                yield self.x[rows], self.y[rows]

    def run(self, epochs: int) -> None:
        for x, y in self.batches(epochs):
            self.optimizer.zero_grad()
            F.cross_entropy(self.network(x), y).backward()
            self.optimizer.step()

    def sprout(self, synapses: int) -> dk.DendriticLayer:
        """One dendrite for each unit."""
        c = dk.connectivity.random(
            self.x.shape[1], UNITS, 1, synapses, constant_fan_in=True, seed=self.seed
        )
        layer = dk.DendriticLayer(c, activation="tanh", soma_activation="identity")
        nn.init.zeros_(layer.cable_weight)
        self.network.dendrites = layer
        return layer

    def train_alone(self, layer: dk.DendriticLayer, epochs: int) -> None:
        """The dendrites follow the errors of their units as well as they can."""
        inputs = [layer.synapse_weight, layer.dendrite_bias]
        optimizer = torch.optim.Adam([p for p in inputs if p is not None], 1e-3)
        for x, y in self.batches(epochs):
            v = self.network.sums(x).detach().requires_grad_()
            (err,) = torch.autograd.grad(F.cross_entropy(self.network.output(v), y), v)
            optimizer.zero_grad()
            score = dk.plasticity.correlation(layer.dendrites(x), err, layer.connectivity)
            (-score.sum()).backward()
            optimizer.step()

    def accuracy(self) -> float:
        x, y = self.test
        with torch.no_grad():
            return 100 * float((self.network(x).argmax(1) == y).float().mean())


def longer(run: Training, synapses: int) -> None:
    run.run(4)


def by_gradients(run: Training, synapses: int) -> None:
    run.optimizer.add_param_group({"params": list(run.sprout(synapses).parameters())})
    run.run(4)


def by_correlation(run: Training, synapses: int) -> None:
    layer = run.sprout(synapses)
    run.train_alone(layer, 2)
    run.optimizer.add_param_group({"params": [layer.cable_weight, layer.soma_bias]})
    run.run(2)


def nothing(run: Training, synapses: int) -> None:
    pass


ARMS: dict[str, Callable[[Training, int], None]] = {
    "base, 3 epochs": nothing,
    "base, 7 epochs": longer,
    "dendrites by correlation, frozen": by_correlation,
    "dendrites by gradients": by_gradients,
}


def accuracy(report: dict[str, Any], path: Path, options: argparse.Namespace) -> None:
    data = datasets.load("fmnist", options.data_root)
    for synapses in options.synapses:
        table = report["accuracy"].setdefault(f"{synapses} synapses", {})
        for seed in range(options.seeds):
            missing = [arm for arm in ARMS if str(seed) not in table.setdefault(arm, {})]
            if missing:
                base = Training(data, seed)
                base.run(3)
            for arm in missing:
                run = copy.deepcopy(base)
                torch.manual_seed(seed)
                ARMS[arm](run, synapses)
                table[arm][str(seed)] = {
                    "accuracy": run.accuracy(),
                    "parameters": sum(p.numel() for p in run.network.parameters()),
                }
                write_json(path, report)
        print(f"one dendrite of {synapses} synapses for each unit: test accuracy in %")
        for arm in ARMS:
            found = [run["accuracy"] for run in table[arm].values()]
            spread = stdev(found) if len(found) > 1 else 0.0
            size = table[arm]["0"]["parameters"]
            print(
                f"{arm:34} {mean(found):.2f} +- {spread:.2f}  {len(found)} seeds, {size} parameters"
            )


# ---- speed ----


def event(case: Case, repeats: int) -> dict[str, float]:
    """Medians in ms: a plain step with the gradient of x and Adam; growing; what follows it."""
    new = dk.connectivity.random(
        case.in_features, case.somas, 1, case.synapses, constant_fan_in=True, seed=1
    )
    found = [_growth(case, new) for _ in range(repeats + 1)][1:]  # the first one warms up
    step, grown, following = (median(each) for each in zip(*found, strict=True))
    return {
        "step": step,
        "growth": grown,
        "next step beyond a plain one": following,
        "in steps": (grown + following) / step,
    }


def _growth(case: Case, new: dk.Connectivity) -> tuple[float, float, float]:
    problem = Problem.draw(case.connectivity("constant"), case.batch)
    layer, x = problem.layer(), problem.x.detach().requires_grad_()
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)

    def train() -> None:
        optimizer.zero_grad()
        layer(x).backward(problem.grad)
        optimizer.step()

    for _ in range(3):
        train()
    plain = median(milliseconds(train) for _ in range(5))
    grown = milliseconds(partial(dk.plasticity.grow, layer, optimizer, new))
    return plain, grown, milliseconds(train) - plain


def steps(seconds: float) -> dict[str, Any]:
    """128 somas that have grown from 15 dendrites to 16, of 16 synapses, and an output layer."""
    torch.manual_seed(0)
    random = partial(dk.connectivity.random, 784, 128, constant_fan_in=True)
    ours = dk.DendriticLayer(random(15, 16, seed=0))
    dk.plasticity.grow(ours, None, random(1, 16, seed=1), cable=0.1)
    x, y = torch.rand(BATCH, 784), torch.randint(CLASSES, (BATCH,))
    layers = {"grown": ours, "dense masks": MaskedDendriticLayer.from_layer(ours)}
    head = nn.Linear(128, CLASSES)
    found = {
        name: TrainingStep(nn.Sequential(layer, copy.deepcopy(head)), 1e-3)
        for name, layer in layers.items()
    }
    error = largest_error(*(results(found[name], x, y) for name in ("dense masks", "grown")))
    tasks = {name: Task(partial(step, x, y)) for name, step in found.items()}
    interleave(list(tasks.values()), seconds)
    return {
        "ms": {name: task.summary() for name, task in tasks.items()},
        "ratio": ratio(tasks["dense masks"], tasks["grown"]),
        "relative_error": error,
    }


def speed(report: dict[str, Any], path: Path, options: argparse.Namespace) -> None:
    found = report["speed"]["training steps"] = steps(options.seconds)
    print(f"dense masks / grown {found['ratio']:.1f}: {found['ms']}")
    events = report["speed"]["events, ms"] = {}
    for name in options.cases:
        events[name] = found = event(CASES[name], options.repeats)
        write_json(path, report)
        print(f"{CASES[name]}: " + ", ".join(f"{key} {value:.2f}" for key, value in found.items()))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.questions.growth")
    parser.add_argument("what", choices=["accuracy", "speed"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data-root", help="folder with Fashion-MNIST")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--synapses", type=int, nargs="+", default=[64, 784])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["A", "B", "C", "D"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=30.0, help="of timing the steps")
    parser.add_argument("--output", type=Path, default=RESULTS / "growth.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    report = json.loads(options.output.read_text()) if options.output.exists() else {}
    run = describe_run(parser, arguments, options.threads)
    report[options.what] = {**report.get(options.what, {}), **run}
    measure = accuracy if options.what == "accuracy" else speed
    measure(report, options.output, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
