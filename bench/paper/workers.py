"""Processes that train groups of runs, one thread each.

Torch is told so. What a worker calls of numpy, scipy and scikit-learn uses no threads: no products
of matrices, no estimators.

A thread of each blocks on a pipe, whose other end only the parent has. When the parent ends,
however that happens, the read ends, and so does the worker.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import queue
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from bench.paper import datasets
from bench.paper.datasets import ImageData
from bench.paper.result import Result
from bench.paper.run import Run
from bench.paper.splits import Split, prepare
from bench.paper.training import Training

Measure = Callable[[nn.Sequential, Split], dict[str, Any]]


class Group(NamedTuple):
    """Runs that are trained as one network, and where they leave their checkpoint."""

    runs: list[Run]
    checkpoint: Path


class Epoch(NamedTuple):
    """One more epoch of a group is complete."""

    seconds: float


class Failure(NamedTuple):
    error: str


News = Epoch | Failure | list[Result]  # the results or the failure of a group come last


@dataclass(frozen=True)
class Task:
    """What workers do with a group."""

    data_root: str | Path | None
    measure: Measure


def train_groups(
    groups: Sequence[Group], task: Task, processes: int
) -> Generator[tuple[Group, News], None, None]:
    """Train the groups, in this order; close it to stop the workers. It does not end by a failure.

    Each group's checkpoint stays, also at the end: the caller removes it with the results saved.
    """
    todo = deque(groups)
    workers: dict[Connection, _Worker] = {}
    try:
        while todo or workers:
            while todo and len(workers) < processes:
                worker = _Worker(task, todo.popleft())
                workers[worker.connection] = worker
            for connection in wait(list(workers)):
                worker = workers[connection]  # type: ignore[index]
                news = worker.news()
                yield worker.group, news
                if isinstance(news, Epoch):
                    continue
                if todo and worker.lives:
                    worker.give(todo.popleft())
                else:
                    workers.pop(worker.connection).stop()
    finally:
        for worker in workers.values():
            worker.stop()


class _Worker:
    """A process with its pipe, seen from the parent."""

    def __init__(self, task: Task, group: Group) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other_end = context.Pipe()
        self.process: BaseProcess = context.Process(
            target=_work, args=(other_end, task), daemon=True
        )
        self.process.start()
        other_end.close()
        self.lives = True
        self.give(group)

    def give(self, group: Group) -> None:
        self.group = group
        with contextlib.suppress(BrokenPipeError):  # it died: `news` says so
            self.connection.send(group)

    def news(self) -> News:
        try:
            news: News = self.connection.recv()
            return news
        except (EOFError, OSError):
            self.lives = False
            self.process.join()
            return Failure(
                f"The process ended with exit code {self.process.exitcode}, which is the negative "
                "number of the signal that killed it (-9: there may not have been enough memory)"
            )

    def stop(self) -> None:
        self.connection.close()
        self.process.join()


def _work(connection: Connection, task: Task) -> None:
    """The life of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the parent decides
    torch.set_num_threads(1)
    load = functools.lru_cache(maxsize=1)(datasets.load)
    groups: queue.SimpleQueue[Group] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, groups), daemon=True).start()
    while True:
        group = groups.get()
        try:
            data = load(group.runs[0].data, task.data_root)
            news: News = _train(group, data, task.measure, connection.send)
        except Exception:
            news = Failure(traceback.format_exc())
        connection.send(news)


def _receive(connection: Connection, groups: queue.SimpleQueue[Group]) -> None:
    try:
        while True:
            groups.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)


def _train(
    group: Group, data: ImageData, measure: Measure, tell: Callable[[Epoch], None]
) -> list[Result]:
    """Train from the group's checkpoint, if there is one, or from the start."""
    runs = group.runs
    training = Training(
        runs, [run.build(data) for run in runs], [prepare(data, run) for run in runs]
    )
    if group.checkpoint.exists():
        training.load(group.checkpoint)
    while not training.ended:
        started = time.perf_counter()
        training.epoch()
        training.save(group.checkpoint)
        tell(Epoch(time.perf_counter() - started))
    trained = training.finish()
    return [
        Result(run, one.outcome, measure(one.model, one.data))
        for run, one in zip(runs, trained, strict=True)
    ]
