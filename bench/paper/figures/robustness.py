"""Noise, and classes one after the other: the counterpart of the article's Fig. 7."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

import dendrite_kernels as dk
from bench import plots
from bench.paper.figures import style
from bench.paper.result import Result
from bench.paper.statistics import (
    Metric,
    Summary,
    best,
    efficiency,
    families,
    sequential,
    summaries,
    summary,
    value,
    varied,
)

TITLE = "Noise and sequential learning"
CAPTION = (
    "Networks of one size for each family, trained and tested on images with noise: accuracy, loss "
    "and their efficiency scores (a to d). Training that shows one class after the other, the best "
    "network of each family (e, f). Shades and bars are one standard deviation."
)


_LOG_FROM = 30  # ratio of bars; the article has losses of 1.65 and 313


@plots.styled
def draw(results: Sequence[Result]) -> Figure:
    """Of the results of one data set; scores are relative to all of them."""
    figure = Figure(figsize=(7.6, 8.6))
    panels = figure.subplots(3, 2)
    for metric, column in zip(style.METRICS, panels.T, strict=True):
        _noise(column[0], results, metric, scores=False)
        _noise(column[1], results, metric, scores=True)
        _sequential(column[2], results, metric)
    style.letters(panels.ravel())
    style.legend(figure, *panels[:2].ravel())
    style.footnote(figure, style.absent(families(results)))
    return figure


def seen(results: Sequence[Result]) -> str:
    """What the figure shows, in a sentence."""
    text, noisy = [], varied(results, "noise")
    losses: dict[dk.models.Kind, float] = {}
    for kind, values in noisy.items():
        first, last = (_mean(values[sigma], "accuracy") for sigma in (min(values), max(values)))
        losses[kind] = first - last
    if losses:
        least, most = min(losses, key=lambda k: losses[k]), max(losses, key=lambda k: losses[k])
        text.append(
            f"The most noise costs {least} least ({losses[least]:.3g} points of accuracy) and "
            f"{most} most ({losses[most]:.3g})"
        )
    ordered = best_sequential(results, "accuracy")
    if ordered:
        top = max(ordered, key=lambda k: ordered[k].mean)
        low = min(ordered, key=lambda k: ordered[k].mean)
        text.append(
            f"In sequential learning {top} reaches {ordered[top].mean:.1f} %, "
            f"{low} {ordered[low].mean:.1f} %"
        )
    return f"{'. '.join(text)}." if text else "No network was trained on either task."


def best_sequential(results: Sequence[Result], metric: Metric) -> dict[dk.models.Kind, Summary]:
    own = sequential(results)
    means = summaries(own, metric)
    return {kind: means[run] for kind, run in best(own, metric).items()}


def _mean(trials: Sequence[Result], metric: Metric) -> float:
    return summary([value(trial, metric) for trial in trials]).mean


def _noise(axes: Axes, results: Sequence[Result], metric: Metric, *, scores: bool) -> None:
    axes.set_title(f"{metric} {'efficiency ' if scores else ''}with noise")
    of_all = efficiency(results, metric) if scores else [value(r, metric) for r in results]
    numbers = {result.run: number for result, number in zip(results, of_all, strict=True)}
    found = varied(results, "noise")
    for kind, values in found.items():
        y = [summary([numbers[trial.run] for trial in trials]) for trials in values.values()]
        style.curve(axes, kind, list(values), y)
    if found:
        label = "score" if scores else style.AXIS[metric]
        axes.set(xlabel="standard deviation of the noise", ylabel=label)
    else:
        style.missing(axes, "no network was trained with noise")


def _sequential(axes: Axes, results: Sequence[Result], metric: Metric) -> None:
    axes.set_title(f"{metric}, sequential")
    found = best_sequential(results, metric)
    if found:
        style.bars(axes, found)
        axes.set_ylabel(style.AXIS[metric])
        means = [one.mean for one in found.values()]
        if max(means) > _LOG_FROM * min(means):
            axes.set_yscale("log")
    else:
        style.missing(axes, "no network was trained\nclass after class")
