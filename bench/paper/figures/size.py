"""Accuracy and loss by size: the counterpart of the article's Fig. 2."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench import plots
from bench.paper.figures import style
from bench.paper.result import Result
from bench.paper.statistics import (
    Metric,
    best,
    better,
    by_configuration,
    families,
    plain,
    summaries,
    value,
)

TITLE = "Size"
CAPTION = (
    "Each point is a network of the grid, the mean of its trials; a step line is the best network "
    "of at most so many parameters (a, b). By number of dendrites of a soma, for a few numbers of "
    "somas (c, d). The dashed line is the best vANN. Bars are one standard deviation."
)
_SOMAS_SHOWN = 3
_LINES = ":", "--", "-"


@plots.styled
def draw(results: Sequence[Result]) -> Figure:
    """Of the results of one data set."""
    results = plain(results)
    figure = Figure(figsize=(7.6, 6.2))
    panels = figure.subplots(2, 2)
    for metric, column in zip(style.METRICS, panels.T, strict=True):
        _by_parameters(column[0], results, metric)
        _by_dendrites(column[1], results, metric)
    style.letters(panels.ravel())
    style.legend(figure, *panels.ravel())
    style.footnote(figure, style.absent(families(results)))
    return figure


def seen(results: Sequence[Result]) -> str:
    """What the figure shows, in a sentence."""
    results = plain(results)
    groups, parts = by_configuration(results), []
    for metric in style.METRICS:
        for kind, run in list(best(results, metric).items()):
            trials = groups[run]
            mean = float(np.mean([value(trial, metric) for trial in trials]))
            parts.append((metric, mean, kind, run, trials[0].outcome.trainable_parameters))
    if not parts:
        return "No network of the article's protocol was trained."
    text = []
    for metric, choose, unit in (("accuracy", max, " %"), ("loss", min, "")):
        _, mean, kind, run, parameters = choose(p for p in parts if p[0] == metric)
        text.append(
            f"the {'highest accuracy' if metric == 'accuracy' else 'lowest loss'} is "
            f"{mean:.4g}{unit} by {kind} (D={run.dendrites}, S={run.somas}; "
            f"{parameters:,} parameters)"
        )
    return f"Of all networks {' and '.join(text)}."


def _by_parameters(axes: Axes, results: Sequence[Result], metric: Metric) -> None:
    groups, means = by_configuration(results), summaries(results, metric)
    for kind in families(results):
        runs = [run for run in groups if run.kind == kind]
        sizes = [groups[run][0].outcome.trainable_parameters for run in runs]
        look, y = style.LOOKS[kind], [means[run].mean for run in runs]
        axes.errorbar(
            sizes,
            y,
            [means[run].sd or 0.0 for run in runs],
            fmt=look.marker,
            color=look.color,
            alpha=0.45,
            ms=3.5,
            elinewidth=0.8,
        )
        axes.step(sizes, _best_so_far(y, metric), look.line, where="post", color=look.color)
        axes.plot([], [], look.line, color=look.color, marker=look.marker, label=kind)
    _best_dense(axes, results, metric)
    axes.set(xscale="log", xlabel="trainable parameters", ylabel=style.AXIS[metric])
    axes.set_title(f"{metric} by parameters")
    if not results:
        style.missing(axes, "no networks of the article's protocol")


def _best_so_far(values: Sequence[float], metric: Metric) -> list[float]:
    reached: list[float] = []
    for one in values:
        reached.append(reached[-1] if reached and not better(metric, one, reached[-1]) else one)
    return reached


def _by_dendrites(axes: Axes, results: Sequence[Result], metric: Metric) -> None:
    means = summaries(results, metric)
    dendritic = [kind for kind in families(results) if kind in style.ARTICLE and kind != "vANN"]
    somas = sorted({run.somas for run in means if run.kind in dendritic})
    chosen = sorted(
        {somas[round(i)] for i in np.linspace(0, len(somas) - 1, _SOMAS_SHOWN)} if somas else []
    )
    for count, line in zip(chosen, _LINES[-len(chosen) :] if chosen else (), strict=True):
        for kind in dendritic:
            runs = sorted(
                (run for run in means if (run.kind, run.somas) == (kind, count)),
                key=lambda run: run.dendrites,
            )
            look = style.LOOKS[kind]
            x, y = [run.dendrites for run in runs], [means[run].mean for run in runs]
            axes.plot(x, y, line, color=look.color, marker=look.marker, ms=3)
    if chosen:
        lines = [axes.plot([], [], line, color="black")[0] for line in _LINES[-len(chosen) :]]
        axes.legend(lines, [f"{count} somas" for count in chosen], handlelength=2.5)
    _best_dense(axes, results, metric)
    axes.set(xlabel="dendrites of a soma", ylabel=style.AXIS[metric])
    axes.set_xscale("log", base=2)
    axes.set_title(f"{metric} by dendrites")
    if not chosen:
        style.missing(axes, "no dendritic networks of the article's protocol")


def _best_dense(axes: Axes, results: Sequence[Result], metric: Metric) -> None:
    run = best(results, metric).get("vANN")
    if run is not None:
        mean = summaries(results, metric)[run].mean
        axes.axhline(mean, color=style.LOOKS["vANN"].color, ls=(0, (5, 3)), lw=1, label="best vANN")
