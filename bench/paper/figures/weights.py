"""Distributions of weights after training: the counterpart of the article's Fig. 4."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import dendrite_kernels as dk
from bench import plots
from bench.paper.figures import style
from bench.paper.measures import WEIGHT_BIN
from bench.paper.result import Result
from bench.paper.statistics import best, by_configuration, families, plain

TITLE = "Weights"
CAPTION = (
    "Densities of the weights of the most accurate network of each family, all trials together, "
    "on a logarithmic axis. Kurtosis (0 for a normal distribution), skewness and range are means "
    "over trials."
)
STAGES = "synapses", "cables", "output"


@plots.styled
def draw(results: Sequence[Result]) -> Figure:
    """Of the results of one data set."""
    chosen = best_trials(results)
    columns: list[dk.models.Kind | None] = list(chosen) or [None]
    figure = Figure(figsize=(max(1.55 * len(columns) + 0.6, 4), 5.2))
    panels = figure.subplots(3, len(columns), sharey=True, sharex="row", squeeze=False)
    for column, kind in zip(panels.T, columns, strict=True):
        for axes, stage in zip(column, STAGES, strict=True):
            if kind is None:
                style.missing(axes, "no weights were measured")
                continue
            _density(axes, kind, [stage_of(trial, stage) for trial in chosen[kind]])
        if kind is not None:
            column[0].set_title(kind)
    if chosen:
        panels[0, 0].set_yscale("log")
        low, high = panels[0, 0].get_ylim()
        panels[0, 0].set_ylim(low, high * (high / low) ** 0.5)  # room for the numbers
    for row, stage in zip(panels, STAGES, strict=True):
        row[0].set_ylabel(f"{stage}\ndensity")
        row[len(row) // 2].set_xlabel("weight")
    style.footnote(figure, style.absent(families(plain(results))))
    return figure


def seen(results: Sequence[Result]) -> str:
    """What the figure shows, in a sentence."""
    chosen = best_trials(results)
    if not chosen:
        return "No weights were measured."
    kurtosis = {
        kind: _mean([stage_of(trial, "synapses")["kurtosis"] for trial in trials])
        for kind, trials in chosen.items()
    }
    known = {kind: k for kind, k in kurtosis.items() if k is not None}
    if not known:
        return "Kurtosis is not known."
    least, most = min(known, key=lambda k: known[k]), max(known, key=lambda k: known[k])
    return (
        f"The kurtosis of synaptic weights is highest in {most} ({known[most]:.3g}) and lowest in "
        f"{least} ({known[least]:.3g})."
    )


def best_trials(results: Sequence[Result]) -> dict[dk.models.Kind, list[Result]]:
    """The measured trials of the most accurate configuration of each family."""
    measured = [result for result in plain(results) if result.measures]
    groups = by_configuration(measured)
    return {kind: groups[run] for kind, run in best(measured, "accuracy").items()}


def stage_of(result: Result, stage: str) -> dict[str, Any]:
    """Measures of the first layer's synapses or cables, or of the output."""
    measures = result.measures
    found: dict[str, Any] = (
        measures["output"] if stage == "output" else measures["layers"][0][stage]
    )
    return found


def added(histograms: Sequence[dict[str, Any]]) -> tuple[int, np.ndarray[Any, Any]]:
    """Histograms of several trials as one: the number of the first bin, and counts."""
    filled = [h for h in histograms if h["counts"]]
    if not filled:
        return 0, np.zeros(0, np.int64)
    start = min(h["start"] for h in filled)
    counts = np.zeros(max(h["start"] + len(h["counts"]) for h in filled) - start, np.int64)
    for h in filled:
        counts[h["start"] - start :][: len(h["counts"])] += h["counts"]
    return start, counts


def _density(axes: Axes, kind: dk.models.Kind, stages: Sequence[dict[str, Any]]) -> None:
    start, counts = added([stage["histogram"] for stage in stages])
    edges = WEIGHT_BIN * (start + np.arange(len(counts) + 1))
    axes.stairs(
        counts / (max(counts.sum(), 1) * WEIGHT_BIN),
        edges,
        color=style.LOOKS[kind].color,
        fill=True,
        alpha=0.8,
    )
    low, high = (_mean([stage[name] for stage in stages]) for name in ("min", "max"))
    numbers = {name: _mean([stage[name] for stage in stages]) for name in ("kurtosis", "skewness")}
    numbers["range"] = None if low is None or high is None else high - low
    lines = [f"{name} {'-' if n is None else f'{n:.2g}'}" for name, n in numbers.items()]
    axes.xaxis.set_major_locator(MaxNLocator(2, symmetric=True))
    axes.text(
        0.98, 0.99, "\n".join(lines), transform=axes.transAxes, ha="right", va="top", fontsize=7
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
