"""Continual learning: tasks one after the other, none of them seen again. Does the network forget?

    python -m bench.paper.continual --data mnist --data-root FOLDER [--scenario permuted|split]

permuted: each task has its own fixed permutation of the pixels, and all classes; the first has
    the images as they are.
split: each task has two classes of its own; only their logits count, in training and in the test.

After each task the network is tested on all tasks so far. Written to a JSON file: the accuracies,
their mean after the last task, and forgetting: how much lower the accuracy of a task is then than
it was at its best, averaged over all tasks but the last.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import dendrite_kernels as dk
from bench.environment import describe, write_json
from bench.paper import datasets
from bench.paper.commands import guarded
from bench.paper.datasets import ImageData
from bench.paper.run import Run
from dendrite_kernels.benchmark.masked_dense import trainable_parameters
from dendrite_kernels.benchmark.training_step import TrainingStep

Scenario = Literal["permuted", "split"]


class Task(NamedTuple):
    """x float32 [n, N], y int64 [n]; the classes whose logits count."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: Tensor


@dataclass(frozen=True)
class Network:
    """A family and its sizes, named in tables by these."""

    kind: dk.models.Kind
    dendrites: int
    somas: int

    def __str__(self) -> str:
        return f"{self.kind} D={self.dendrites} S={self.somas}"


# vANN once with about as many parameters as the dANNs (19,146 for 28 x 28 pixels), once with as
# many units.
NETWORKS = (
    Network("dANN-R", 16, 64),
    Network("dANN-LRF", 16, 64),
    Network("dANN-GRF", 16, 64),
    Network("vANN", 1, 24),
    Network("vANN", 16, 64),
)


def tasks(data: ImageData, scenario: Scenario, count: int, seed: int) -> list[Task]:
    """The tasks in the order in which they are learned."""
    return list(permuted(data, count, seed) if scenario == "permuted" else _split(data, count))


def permuted(data: ImageData, count: int, seed: int) -> Iterator[Task]:
    rng, pixels = np.random.default_rng(seed), data.x_train.shape[1]
    classes = torch.arange(data.classes)
    for i in range(count):
        order = np.arange(pixels) if i == 0 else rng.permutation(pixels)
        x_train, x_test = (torch.from_numpy(x[:, order]) for x in (data.x_train, data.x_test))
        y_train, y_test = torch.from_numpy(data.y_train), torch.from_numpy(data.y_test)
        yield Task(x_train, y_train, x_test, y_test, classes)


def _split(data: ImageData, count: int) -> Iterator[Task]:
    if 2 * count > data.classes:
        raise ValueError(f"Expected at most {data.classes // 2} tasks of two classes, got {count}")
    for i in range(count):
        train, test = (np.flatnonzero(y // 2 == i) for y in (data.y_train, data.y_test))
        x_train, x_test = torch.from_numpy(data.x_train[train]), torch.from_numpy(data.x_test[test])
        y_train, y_test = torch.from_numpy(data.y_train[train]), torch.from_numpy(data.y_test[test])
        yield Task(x_train, y_train, x_test, y_test, torch.tensor([2 * i, 2 * i + 1]))


def learn(run: Run, data: ImageData, learned: Sequence[Task]) -> list[list[float]]:
    """Test accuracies: row i has those of the tasks 0 to i after task i was learned.

    One optimizer goes through all tasks, `run.epochs` epochs for each.
    """
    model = run.build(data)
    allowed = torch.full((len(learned), data.classes), -torch.inf)  # added to the logits
    for i, task in enumerate(learned):
        allowed[i, task.classes] = 0.0
    step, accuracies = TrainingStep(model, run.lr), []
    rng = np.random.default_rng(run.trial)
    for i, task in enumerate(learned):
        step.loss = partial(_loss, allowed[i])
        for _ in range(run.epochs or 0):
            order = torch.from_numpy(rng.permutation(len(task.y_train)))
            for rows in order.split(run.batch):
                step(task.x_train[rows], task.y_train[rows])
        accuracies.append([_accuracy(model, learned[j], allowed[j]) for j in range(i + 1)])
    return accuracies


def _loss(allowed: Tensor, logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits + allowed, y)


@torch.no_grad()
def _accuracy(model: nn.Module, task: Task, allowed: Tensor) -> float:
    right = sum(
        int(((model(x) + allowed).argmax(1) == y).sum())
        for x, y in zip(task.x_test.split(1024), task.y_test.split(1024), strict=True)
    )
    return right / len(task.y_test)


def final_accuracy(accuracies: Sequence[Sequence[float]]) -> float:
    """The mean over all tasks after the last one."""
    return float(np.mean(accuracies[-1]))


def forgetting(accuracies: Sequence[Sequence[float]]) -> float:
    """The mean, over all tasks but the last, of best accuracy before the last task minus final."""
    count = len(accuracies)
    best = [max(accuracies[i][j] for i in range(j, count - 1)) for j in range(count - 1)]
    return float(np.mean(np.subtract(best, accuracies[-1][:-1]))) if best else 0.0


@dataclass(frozen=True)
class Result:
    """accuracies: those of `learn`, for each trial."""

    network: Network
    parameters: int
    accuracies: list[list[list[float]]]

    def __str__(self) -> str:
        final = _mean_and_deviation([final_accuracy(trial) for trial in self.accuracies])
        lost = _mean_and_deviation([forgetting(trial) for trial in self.accuracies])
        return (
            f"{self.network!s:20} {self.parameters:>9,} parameters: mean accuracy {final} %, "
            f"forgotten {lost} points"
        )


def _mean_and_deviation(fractions: list[float]) -> str:
    mean = f"{100 * np.mean(fractions):.1f}"
    return mean if len(fractions) < 2 else f"{mean} +- {100 * np.std(fractions, ddof=1):.1f}"


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    return guarded(lambda: _compare(options))


def _compare(options: argparse.Namespace) -> int:
    data = datasets.load(options.data, options.data_root)
    options.output.parent.mkdir(parents=True, exist_ok=True)  # errors before the first training
    count = options.tasks or (10 if options.scenario == "permuted" else data.classes // 2)
    results = []
    for n in tqdm(NETWORKS, disable=None):
        run = Run(data.name, n.kind, n.dendrites, n.somas, epochs=options.epochs)
        accuracies = [
            learn(replace(run, trial=trial), data, tasks(data, options.scenario, count, trial))
            for trial in range(options.trials)
        ]
        results.append(Result(n, trainable_parameters(run.build(data)), accuracies))
        print(results[-1], flush=True)
    report = {
        "data": data.name,
        "scenario": options.scenario,
        "tasks": count,
        "epochs": options.epochs,
        "results": [
            asdict(result)
            | {
                "final_accuracy": [final_accuracy(trial) for trial in result.accuracies],
                "forgetting": [forgetting(trial) for trial in result.accuracies],
            }
            for result in results
        ],
        "environment": describe(),
    }
    write_json(options.output, report, digits=4)
    print(f"Wrote {options.output}")
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.paper.continual", description="Tasks learned one after the other."
    )
    parser.add_argument("--data", default="digits", help="as for the demo")
    parser.add_argument("--data-root", help="folder with the data set's files")
    parser.add_argument("--scenario", default="permuted", choices=get_args(Scenario))
    parser.add_argument("--tasks", type=int, help="default: 10, or all pairs of classes")
    parser.add_argument("--epochs", type=int, default=2, help="for each task")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("reports/continual.json"))
    options = parser.parse_args(arguments)
    for name in ("tasks", "epochs", "trials"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"Expected --{name} >= 1, got {value}")
    return options


if __name__ == "__main__":
    sys.exit(main())
