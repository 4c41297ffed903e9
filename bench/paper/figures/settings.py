"""Depth, dropout and learning rate: the counterparts of the article's supplement."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench import plots
from bench.paper.figures import style
from bench.paper.result import Result
from bench.paper.statistics import Metric, families, summary, value, varied

TITLE = "Depth, dropout and learning rate"
CAPTION = (
    "Networks of one size for each family in which only the depth, the dropout or the learning "
    "rate differs. Means and one standard deviation."
)
FIELDS = {"layers": "depth", "dropout": "dropout", "lr": "learning rate"}


@plots.styled
def draw(results: Sequence[Result]) -> Figure:
    """Of the results of one data set."""
    figure = Figure(figsize=(7.6, 5.4))
    panels = figure.subplots(2, len(FIELDS))
    for row, metric in zip(panels, style.METRICS, strict=True):
        for axes, field in zip(row, FIELDS, strict=True):
            _panel(axes, results, metric, field)
        row[0].set_ylabel(style.AXIS[metric])
    style.letters(panels.ravel())
    style.legend(figure, *panels.ravel())
    style.footnote(figure, style.absent(families(results)))
    return figure


def seen(results: Sequence[Result]) -> str:
    """What the figure shows, in a sentence."""
    text = []
    for field, name in FIELDS.items():
        best_at: dict[float, list[str]] = {}
        for kind, values in varied(results, field).items():
            best_at.setdefault(max(values, key=lambda at: _accuracy(values[at])), []).append(kind)
        if best_at:
            kinds = (f"{at:g} ({', '.join(kinds)})" for at, kinds in sorted(best_at.items()))
            text.append(f"{name} {', '.join(kinds)}")
    return f"Accuracy is highest at {'; '.join(text)}." if text else "None of these was varied."


def _accuracy(trials: Sequence[Result]) -> float:
    return summary([value(trial, "accuracy") for trial in trials]).mean


def _panel(axes: Axes, results: Sequence[Result], metric: Metric, field: str) -> None:
    found = varied(results, field)
    axes.set_title(FIELDS[field])
    for kind, values in found.items():
        y = [summary([value(trial, metric) for trial in trials]) for trials in values.values()]
        style.curve(axes, kind, list(values), y)
    if not found:
        style.missing(axes, "not varied")
        return
    axes.set_xlabel("dendrosomatic layers" if field == "layers" else FIELDS[field])
    if field == "lr":
        axes.set_xscale("log")
    if field == "layers":
        axes.set_xticks(sorted({at for values in found.values() for at in values}))
