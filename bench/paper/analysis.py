"""All statistics of a sweep as one JSON file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from bench.environment import describe, write_json
from bench.paper.article import Cell, compare, dense_target
from bench.paper.result import Result
from bench.paper.run import Run
from bench.paper.statistics import (
    Metric,
    best,
    best_scores,
    by_configuration,
    compare_families,
    parameters_to_match,
    plain,
    summary,
    value,
)

FILE = "analysis.json"
_METRICS: tuple[Metric, Metric] = ("accuracy", "loss")


def analyse(results: Sequence[Result], folder: Path) -> list[Path]:
    """Write FILE into the folder: configurations, families and tests by data set, the article."""
    names = sorted({result.run.data for result in results})
    path = folder / FILE
    content = {
        "environment": describe(),
        "data": {name: _of_data([r for r in results if r.run.data == name]) for name in names},
        "article": [_cell(cell) for cell in compare(results) if cell.ours is not None],
    }
    write_json(path, content)
    return [path]


def _of_data(results: Sequence[Result]) -> dict[str, Any]:
    own = plain(results)
    return {
        "configurations": [_configuration(trials) for trials in by_configuration(results).values()],
        **{metric: _of_metric(results, own, metric) for metric in _METRICS},
    }


def _configuration(trials: Sequence[Result]) -> dict[str, Any]:
    first = trials[0]
    return {
        "run": _changed(first.run),
        "trials": [trial.run.trial for trial in trials],
        "parameters": first.outcome.trainable_parameters,
        "seconds": summary([trial.outcome.seconds for trial in trials]).mean,
        **{m: asdict(summary([value(trial, m) for trial in trials])) for m in _METRICS},
    }


def _changed(run: Run) -> dict[str, Any]:
    """The fields that decide the training but for those with their defaults, the trial and data."""
    defaults = {field.name: field.default for field in fields(Run)} | {"trial": run.trial}
    values = asdict(run).items()
    return {name: v for name, v in values if name != "data" and v != defaults[name]}


def _of_metric(results: Sequence[Result], own: Sequence[Result], metric: Metric) -> dict[str, Any]:
    target = dense_target(results, metric)
    return {
        "best": {
            kind: {"dendrites": run.dendrites, "somas": run.somas, "epochs": run.epochs}
            for kind, run in best(own, metric).items()
        },
        "efficiency": {kind: asdict(s) for kind, s in best_scores(results, metric).items()},
        "vANN": target._asdict() if target else None,
        "parameters_to_match_vANN": parameters_to_match(own, metric, target.value)
        if target
        else {},
        "comparisons": [asdict(comparison) for comparison in compare_families(own, metric)],
    }


def _cell(cell: Cell) -> dict[str, Any]:
    return {
        "article": asdict(cell.article),
        "ours": asdict(cell.ours) if cell.ours else None,
        "run": cell.run.key if cell.run else None,
        "difference": cell.difference,
        "deviations": cell.deviations,
    }
