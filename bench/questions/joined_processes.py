"""Whether several trials train faster as one network than as processes, on all processors.

    python -m bench.questions.joined_processes [--kind dANN-R] [--trials 5] [--rounds 5]

Three ways, each with the whole machine for itself:

processes    a process of one thread for each trial, all at the same time
one network  one process, the trials as one network, as many threads as there are processors
a sweep      as many processes of one thread as there are processors, the trials as one network in
             each: as `bench.paper sweep` trains small networks

Prints milliseconds of a step and trial on the whole machine: time, divided by the steps of all
trials of all processes. Medians, least and most of rounds in turns, of `--seconds` each. Starting a
process, building its networks and the first epochs are not counted. A ratio above 1: faster than
processes. Images, batches and steps are those of `bench.questions.joined_trials`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from multiprocessing.connection import Connection
from statistics import median
from typing import get_args

import torch

import dendrite_kernels as dk
from bench.paper.run import Run
from bench.paper.sweep import processors
from bench.paper.training import Training
from bench.questions.joined_trials import STEPS, noise_images, train_on

SIZES = ((32, 1), (128, 4), (256, 16), (512, 32))


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    trials, cores = range(options.trials), processors()
    with ExitStack() as stack:
        ways = [
            stack.enter_context(closing(Way(title, groups, threads)))
            for title, groups, threads in (
                ("processes", [[trial] for trial in trials], 1),
                ("one network", [trials], cores),
                ("a sweep", [trials] * cores, 1),
            )
        ]
        print(f"{options.kind}, {options.trials} trials, {cores} processors; ms (least..most)")
        print("   S   D" + "".join(f"{way.title:>24s}" for way in ways) + "  ratios")
        for somas, dendrites in SIZES:
            run = Run("noise", options.kind, dendrites, somas)
            times = step_times(ways, run, options.rounds, options.seconds)
            middle, *others = map(median, times)
            cells = (f"{median(ms):10.3f} ({min(ms):.3f}..{max(ms):.3f})" for ms in times)
            ratios = " ".join(f"{middle / other:.2f}" for other in others)
            row = "".join(f"{cell:>24s}" for cell in cells)
            print(f"{somas:4d} {dendrites:3d}{row}  {ratios}", flush=True)


def step_times(ways: Sequence[Way], run: Run, rounds: int, seconds: float) -> list[list[float]]:
    """Milliseconds of a step and trial, of each way in each round."""
    for way in ways:
        way.prepare(run)
    turns = [[1e3 / way.rate(seconds) for way in ways] for _ in range(rounds)]
    return [list(of_way) for of_way in zip(*turns, strict=True)]


class Way:
    """Processes that train at the same time, each its group of trials as one network."""

    def __init__(self, title: str, groups: Sequence[Sequence[int]], threads: int) -> None:
        self.title = title
        context = multiprocessing.get_context("spawn")
        self._connections: list[Connection] = []
        for trials in groups:
            connection, other_end = context.Pipe()
            context.Process(target=_work, args=(other_end, trials, threads), daemon=True).start()
            other_end.close()
            self._connections.append(connection)

    def prepare(self, run: Run) -> None:
        self._ask(run)

    def rate(self, seconds: float) -> float:
        """Steps in a second, of all trials of all processes."""
        self._ask(seconds / 10)  # the other ways had the caches; all begin when all are warm
        return sum(self._ask(seconds))

    def _ask(self, question: Run | float) -> list[float]:
        for connection in self._connections:
            connection.send(question)
        return [connection.recv() for connection in self._connections]

    def close(self) -> None:
        """The processes end, too."""
        for connection in self._connections:
            connection.close()


def _work(connection: Connection, trials: Sequence[int], threads: int) -> None:
    """The life of a process: it builds the networks of a run, or trains them for some seconds."""
    torch.set_num_threads(threads)
    data = noise_images()
    while True:
        try:
            question: Run | float = connection.recv()
        except EOFError:
            return
        if isinstance(question, Run):
            training = train_on([replace(question, trial=trial) for trial in trials], data)
            connection.send(0.0)
        else:
            connection.send(len(trials) * steps_in_a_second(training, question))


def steps_in_a_second(training: Training, seconds: float) -> float:
    """From whole epochs, which take about so many seconds."""
    started, epochs, passed = time.perf_counter(), 0, 0.0
    while passed < seconds:
        training.epoch(())
        epochs, passed = epochs + 1, time.perf_counter() - started
    return STEPS * epochs / passed


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.questions.joined_processes", description=__doc__.split("\n")[0]
    )
    kinds = get_args(dk.models.Kind)
    parser.add_argument("--kind", choices=kinds, default="dANN-R", metavar="KIND")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a way in a round")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
