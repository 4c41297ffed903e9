"""Times several candidates in turns, so that other load on the machine affects all of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import torch

ROUNDS = 10
MIN_SAMPLES = 3
MAX_SAMPLES = 2000
SLOW = 2.0  # seconds: what estimates the time is a sample, and may be the only one
QUICK = 0.02  # seconds: caches are warmed up before each block of samples


@dataclass
class Task:
    run: Callable[[], object]
    surroundings: Callable[[], AbstractContextManager[object]] = nullcontext
    least: int = MIN_SAMPLES
    turns: dict[int, list[float]] = field(default_factory=dict)  # round -> seconds

    @property
    def samples(self) -> list[float]:
        return [seconds for turn in self.turns.values() for seconds in turn]

    def measure(self) -> float:
        started = time.perf_counter()
        self.run()
        return time.perf_counter() - started

    def summary(self) -> dict[str, float]:
        """Milliseconds."""
        p20, p50, p80 = np.percentile(self.samples, [20, 50, 80])
        ms = {"p20": 1e3 * float(p20), "p50": 1e3 * float(p50), "p80": 1e3 * float(p80)}
        return {**ms, "samples": len(self.samples)}


def ratio(a: Task, b: Task) -> float:
    """How many times as long `a` takes: the median of the ratios of their turns.

    Shared machines change their speed for seconds at a time. A round mostly meets one speed.
    Medians of all samples may be of two, most of all where a task had only a few turns.
    """
    turns = min(a.turns, b.turns, key=len)
    return median(_nearest(a, turn) / _nearest(b, turn) for turn in turns)


def _nearest(task: Task, turn: int) -> float:
    """Median of the task's samples in this turn, or in the one nearest to it."""
    return median(task.turns[min(task.turns, key=lambda other: abs(other - turn))])


def waiting_for(device: torch.device, run: Callable[[], object]) -> Callable[[], object]:
    """`run`, until the device has done what it was given."""
    if device.type == "cpu":
        return run

    def run_to_the_end() -> None:
        run()
        torch.accelerator.synchronize(device)

    return run_to_the_end


def interleave(tasks: Sequence[Task], seconds: float, seed: int = 0) -> None:
    """Measure samples of all tasks, about `seconds` in all, an equal share for each task.

    Every task must have run before. The samples are measured in rounds; each round has a block of
    samples of every task, in random order. Tasks with few samples are not in every round.
    """
    share = seconds / max(1, len(tasks))
    estimates, wanted = [], []
    for task in tasks:
        with task.surroundings():
            started = time.perf_counter()
            sample = task.measure()
            estimate = time.perf_counter() - started
        slow = estimate > SLOW
        if slow:
            task.turns[-1] = [sample]
        estimates.append(estimate)
        wanted.append(int(np.clip(share / estimate - slow, 0 if slow else task.least, MAX_SAMPLES)))
    rng = np.random.default_rng(seed)
    gc.collect()
    gc.disable()
    try:
        for turn in range(ROUNDS):
            for i in rng.permutation(len(tasks)):
                count = wanted[i] * (turn + 1) // ROUNDS - wanted[i] * turn // ROUNDS
                if count:
                    _block(tasks[i], turn, count, warm_up=estimates[i] < QUICK)
    finally:
        gc.enable()


def _block(task: Task, turn: int, count: int, warm_up: bool) -> None:
    with task.surroundings():
        if warm_up:
            task.run()
        task.turns[turn] = [task.measure() for _ in range(count)]
