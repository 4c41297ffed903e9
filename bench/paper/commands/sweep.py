"""Train many networks; stop and start again whenever you want.

Name grids, or give values for the fields of a run, of which every combination is trained. With
neither, what is left in the table is trained.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from itertools import chain
from pathlib import Path

from bench.paper.commands import run_options
from bench.paper.grids import GRIDS, subset
from bench.paper.groups import group
from bench.paper.run import Run
from bench.paper.sweep import processors, sweep
from bench.paper.table import Table

_OF_GRIDS = ("data", "epochs")  # what may be set for a grid, too


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "grids:\n" + "\n".join(
        f"  {name:15s} {grid.__doc__}" for name, grid in GRIDS.items()
    )
    parser.add_argument("grids", nargs="*", metavar="GRID", help="see below")
    parser.add_argument("--table", type=Path, required=True, help="SQLite file of the results")
    parser.add_argument("--data-root", help="folder with the data sets' files (digits needs none)")
    parser.add_argument("--trials", type=int, default=5, help="seeds 0, 1, .. (%(default)s)")
    parser.add_argument(
        "--subset", type=int, default=1, metavar="N",
        help="a quick look: only every N-th number of dendrites and of somas",
    )  # fmt: skip
    parser.add_argument(
        "--processes", type=int, default=processors(), help="of one thread each (%(default)s)"
    )
    names = [name for name in run_options.NAMES if name != "trial"]
    run_options.add(parser, names, several=True)


def main(options: argparse.Namespace) -> int:
    for name in ("trials", "subset", "processes"):
        if getattr(options, name) < 1:
            raise ValueError(f"Expected --{name} >= 1, got {getattr(options, name)}")
    groups = group(subset(_runs(options), options.subset))
    if not groups and not options.table.exists():
        raise ValueError(f"Expected what to train or a table that says it, got no {options.table}")
    with Table(options.table) as table:
        try:
            done = sweep(table, groups, data_root=options.data_root, processes=options.processes)
        except KeyboardInterrupt:
            print("\nStopped. The same command goes on from here.")
            return 130
        counts = table.counts()
        print(", ".join(f"{count} {state}" for state, count in counts.items() if count))
        for run, error in table.errors().items():
            print(f"{run.key}\n    {error.strip().splitlines()[-1]}")
    return 0 if done else 1


def _runs(options: argparse.Namespace) -> list[Run]:
    values = run_options.given(options)
    if not options.grids:
        return _combinations(values, options.trials) if values else []
    unknown = [name for name in options.grids if name not in GRIDS]
    if unknown:
        raise ValueError(f"Expected grids of {list(GRIDS)}, got {unknown}")
    if others := [f"--{name}" for name in values if name not in _OF_GRIDS]:
        raise ValueError(f"Expected grids or values of their own, got both: {others}")
    if "data" not in values:
        raise ValueError("Expected --data for a grid, got none")
    runs = chain.from_iterable(
        GRIDS[name](data, options.trials) for name in options.grids for data in values["data"]
    )
    if "epochs" not in values:
        return list(runs)
    return [replace(run, epochs=epochs) for run in runs for epochs in values["epochs"]]


def _combinations(values: dict[str, object], trials: int) -> list[Run]:
    required = ("data", "kind", "dendrites", "somas")
    if missing := [f"--{name}" for name in required if name not in values]:
        raise ValueError(f"Expected --data, --kinds, --dendrites and --somas, got no {missing}")
    return run_options.every_run({**values, "trial": range(trials)})
