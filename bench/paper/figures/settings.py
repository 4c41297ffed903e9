"""Depth, dropout and learning rate: the counterparts of the article's supplement."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.paper.figures import style
from bench.paper.result import Result
from bench.paper.statistics import Metric, families, summary, value, varied

TITLE = "Depth, dropout and learning rate"
CAPTION = (
    "Networks of one size for each family in which only the depth, the dropout or the learning "
    "rate differs. Means and one standard deviation."
)
FIELDS = {"layers": "dendrosomatic layers", "dropout": "dropout", "lr": "learning rate"}


@style.styled
def draw(results: Sequence[Result]) -> Figure:
    """Of the results of one data set."""
    figure = Figure(figsize=(7.6, 5.4))
    panels = figure.subplots(2, len(FIELDS))
    for row, metric in zip(panels, style.METRICS, strict=True):
        for axes, field in zip(row, FIELDS, strict=True):
            _panel(axes, results, metric, field)
    style.letters(panels.ravel())
    style.legend(figure, *panels.ravel())
    style.footnote(figure, style.absent(families(results)))
    return figure


def seen(results: Sequence[Result]) -> str:
    """What the figure shows, in a sentence."""
    text = []
    for field, name in FIELDS.items():
        for kind, values in varied(results, field).items():
            means = {
                at: summary([value(t, "accuracy") for t in ts]).mean for at, ts in values.items()
            }
            top = max(means, key=lambda at: means[at])
            text.append(f"{kind} is most accurate at {name} {top:g} ({means[top]:.1f} %)")
    return f"{'; '.join(text)}." if text else "None of these was varied."


def _panel(axes: Axes, results: Sequence[Result], metric: Metric, field: str) -> None:
    found = varied(results, field)
    axes.set_title(field if field != "lr" else "learning rate")
    for kind, values in found.items():
        y = [summary([value(trial, metric) for trial in trials]) for trials in values.values()]
        style.curve(axes, kind, list(values), y)
    if not found:
        style.missing(axes, "not varied")
        return
    axes.set(xlabel=FIELDS[field], ylabel=style.AXIS[metric])
    if field == "lr":
        axes.set_xscale("log")
    if field == "layers":
        axes.set_xticks(sorted({at for values in found.values() for at in values}))
