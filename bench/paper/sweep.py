"""Trains what waits in a table: several processes, to be killed and started again at will.

What was killed when, and how many processes there are, changes no result: groups are fixed when
runs are added, each is trained on one thread, and goes on from the checkpoint of its last epoch.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import closing
from datetime import timedelta
from pathlib import Path

from tqdm import tqdm

from bench.paper import datasets
from bench.paper.groups import cost
from bench.paper.measures import measure as measure_all
from bench.paper.run import Run
from bench.paper.table import Table
from bench.paper.workers import Epoch, Failure, Group, Measure, News, Task, train_groups


def sweep(
    table: Table,
    groups: Iterable[Sequence[Run]] = (),
    *,
    data_root: str | Path | None = None,
    processes: int | None = None,
    measure: Measure = measure_all,
) -> bool:
    """Add groups to the table, then train all that wait or have failed before.

    Args:
        table: of the runs and their results.
        groups: see `groups.group`; none: go on with what the table has.
        data_root: the folder of the data sets' files.
        processes: None: as many as there are processors.
        measure: what to say of each trained network; a function of a module, as it is called in
            other processes.

    Returns:
        Whether all runs are done. A run that fails is written down and does not stop the others.

    Raises:
        FileNotFoundError, ValueError: there is no such data set, or its files are damaged.
        RuntimeError: another sweep works on this table.
    """
    with table.locked():
        new = list(groups)
        sizes = _sizes([*table.waiting(), *new], data_root)  # before a name of no data is kept
        table.add(new)
        checkpoints = table.beside(".checkpoints")
        costs = _costs(table.waiting(), sizes)
        todo = [Group(list(runs), _checkpoint(checkpoints, runs)) for runs in costs]
        task = Task(data_root, measure)
        with (
            closing(train_groups(todo, task, processes or processors())) as all_news,
            _Progress(costs, processes or processors()) as progress,
        ):
            for group, news in all_news:
                _write(table, group, news)
                progress.update(group.runs, news)
        done = not table.counts()["failed"]
        if done:
            shutil.rmtree(checkpoints, ignore_errors=True)
        return done


def processors() -> int:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


Costs = dict[tuple[Run, ...], float]  # of each group


Sizes = dict[str, tuple[int, int]]  # samples and inputs of each data set


def _sizes(groups: Iterable[Sequence[Run]], data_root: str | Path | None) -> Sizes:
    names = dict.fromkeys(run.data for group in groups for run in group)
    return {name: datasets.load(name, data_root).x_train.shape for name in names}


def _costs(groups: Sequence[Sequence[Run]], sizes: Sizes) -> Costs:
    """The groups in the order of their training, with their costs.

    One data set after the other, so that a worker reads each once. The long ones come first: a
    long one at the end would be trained while the other processes have nothing to do.
    """
    costs: Costs = {}
    for name in dict.fromkeys(group[0].data for group in groups):
        samples, inputs = sizes[name]
        of_data = {
            tuple(group): sum(cost(run, inputs, samples) for run in group)
            for group in groups
            if group[0].data == name
        }
        costs |= sorted(of_data.items(), key=lambda item: -item[1])
    return costs


def _checkpoint(folder: Path, runs: Sequence[Run]) -> Path:
    keys = "\n".join(run.key for run in runs)
    return folder / f"{hashlib.sha256(keys.encode()).hexdigest()[:16]}.pt"


def _write(table: Table, group: Group, news: News) -> None:
    if isinstance(news, Failure):
        table.fail(group.runs, news.error)
    elif isinstance(news, list):
        table.finish(news)
        group.checkpoint.unlink(missing_ok=True)  # only now: until then a kill would lose it all


class _Progress:
    """A bar with the time that the rest will take, at the pace of what was trained so far."""

    def __init__(self, costs: Costs, processes: int) -> None:
        self.costs, self.processes = costs, processes
        self.left = dict(costs)
        self.paid, self.seconds = 0.0, 0.0  # for epochs that are complete
        self.bar = tqdm(
            total=sum(map(len, costs)),
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt} of {total_fmt} runs, {elapsed}{postfix}",
            disable=None,
        )

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def update(self, runs: Sequence[Run], news: News) -> None:
        key = tuple(runs)
        if isinstance(news, Epoch):
            assert runs[0].epochs is not None
            paid = self.costs[key] / runs[0].epochs
            self.left[key] = max(0.0, self.left[key] - paid)
            self.paid += paid
            self.seconds += news.seconds
        else:
            self.left[key] = 0.0
            self.bar.update(len(runs))
        if self.paid:
            self.bar.set_postfix_str(f"about {timedelta(seconds=self.seconds_left())} left")

    def seconds_left(self) -> int:
        """The rest on all processes, or the longest group alone if that takes longer."""
        work = max(sum(self.left.values()) / self.processes, *self.left.values())
        return round(work * self.seconds / self.paid)
