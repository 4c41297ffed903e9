"""Print the table of a sweep, also while it runs: mean and deviation over trials."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
from tabulate import tabulate

from bench.paper.result import Result
from bench.paper.run import Run
from bench.paper.table import Table

_ALWAYS = ("data", "kind", "dendrites", "somas")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", type=Path)


def main(options: argparse.Namespace) -> int:
    with Table(options.table, read_only=True) as table:
        print(shown(table.results()))
        print(", ".join(f"{count} {state}" for state, count in table.counts().items()))
        for run, error in table.errors().items():
            print(f"\n{run.key}\n{error.rstrip()}")
    return 0


def shown(results: Sequence[Result]) -> str:
    """A line for each configuration, with the fields in which they differ."""
    configurations: dict[Run, list[Result]] = {}
    for result in results:
        configurations.setdefault(replace(result.run, trial=0), []).append(result)
    names = [
        field.name
        for field in fields(Run)
        if field.name in _ALWAYS or len({getattr(run, field.name) for run in configurations}) > 1
    ]
    header = [*names, "trials", "accuracy %", "loss", "parameters", "seconds"]
    rows = [
        [*(str(asdict(run)[name]) for name in names), *_summary(trials)]
        for run, trials in configurations.items()
    ]
    return str(tabulate(rows, header, "plain", disable_numparse=True, stralign="right"))


def _summary(trials: Sequence[Result]) -> list[str]:
    outcomes = [result.outcome for result in trials]
    return [
        str(len(outcomes)),
        _spread([100 * outcome.test_accuracy for outcome in outcomes], 2),
        _spread([outcome.test_loss for outcome in outcomes], 4),
        f"{outcomes[0].trainable_parameters:,}",
        f"{np.mean([outcome.seconds for outcome in outcomes]):.1f}",
    ]


def _spread(values: Sequence[float], digits: int) -> str:
    """Mean and sample deviation, which one value does not have."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"
