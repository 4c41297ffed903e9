"""What questions about networks and their dense twins share: sizes, equal results, reports."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dendrite_kernels as dk
from bench.environment import write_json
from bench.paper.datasets import ImageData
from dendrite_kernels.benchmark.training_step import TrainingStep

N, SOMAS, CLASSES, BATCH = 784, 128, 10, 128
LARGEST_ERROR = 1e-4
random = partial(dk.connectivity.random, N, constant_fan_in=True)


def keep(mask: Tensor, weight: Tensor) -> None:
    """A hook of a dense weight: no gradient where the mask is 0."""
    assert weight.grad is not None
    weight.grad.mul_(mask)


def results(step: TrainingStep, x: Tensor, y: Tensor) -> list[Tensor]:
    """Logits, and the gradient of the output layer's weight, after a few steps of training."""
    for _ in range(5):
        step(x, y)
    step.optimizer.zero_grad()
    logits = step.model(x)
    F.cross_entropy(logits, y).backward()
    gradient = list(step.model.parameters())[-2].grad
    assert gradient is not None
    return [logits.detach(), gradient.clone()]


def largest_error(dense: Iterable[Tensor], ours: Iterable[Tensor]) -> float:
    """Of the norms of differences beside those of our results.

    Raises:
        RuntimeError: the two networks are not the same, so that no time can be compared.
    """
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(dense, ours, strict=True))
    if not error <= LARGEST_ERROR:
        raise RuntimeError(f"Expected equal results of ours and of dense layers, got {error}")
    return error


def train(layer: nn.Module, data: ImageData, epochs: int, seed: int, rate: float = 1e-3) -> float:
    """The test accuracy after the last epoch."""
    model = nn.Sequential(layer, nn.Linear(SOMAS, data.classes))
    step, rng = TrainingStep(model, rate), np.random.default_rng(seed)
    x, y = torch.from_numpy(data.x_train), torch.from_numpy(data.y_train)
    for _ in range(epochs):
        for rows in torch.from_numpy(rng.permutation(len(y))).split(BATCH):
            step(x[rows], y[rows])
    with torch.no_grad():
        predicted = model(torch.from_numpy(data.x_test)).argmax(1)
    return float((predicted == torch.from_numpy(data.y_test)).float().mean())


def report_speed(
    report: dict[str, Any], path: Path, threads: Iterable[int], speed: Callable[[], dict[str, Any]]
) -> None:
    """Measure with each number of threads, write and print it."""
    report["speed"] = []
    for count in threads:
        torch.set_num_threads(count)
        found = speed()
        report["speed"].append({"threads": count, **found})
        write_json(path, report, digits=4)
        print(f"{count} threads")
        print_speed(found)


def print_speed(found: dict[str, Any]) -> None:
    for name, ms in found["ms"].items():
        print(f"{name:45s} {ms['p50']:8.3f} ms (p20 {ms['p20']:.3f}, p80 {ms['p80']:.3f})")
    for name, value in found["ratios"].items():
        print(f"{name:80s} {value:.2f}", flush=True)


def print_accuracies(percent: dict[str, dict[str, float]]) -> None:
    """Of each network by seed: mean and standard deviation."""
    for name, done in percent.items():
        values = list(done.values())
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{name:35s} {statistics.mean(values):.2f} +- {spread:.2f}, {len(values)} seeds")
