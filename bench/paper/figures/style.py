"""How the figures of families look: a colour and a marker for each of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

import dendrite_kernels as dk
from bench.paper.statistics import FAMILIES, Metric, Summary
from bench.plots import BLUE, GREEN, GREY, MISSING, PURPLE, RED


class Look(NamedTuple):
    """The colour tells how synapses were chosen, line and marker how dendrites reach somas."""

    color: str
    line: str
    marker: str


LOOKS: dict[dk.models.Kind, Look] = {
    "dANN-R": Look(GREEN, "-", "o"),
    "dANN-LRF": Look(RED, "-", "s"),
    "dANN-GRF": Look(BLUE, "-", "^"),
    "pdANN": Look(PURPLE, "-", "D"),
    "sANN": Look(GREEN, ":", "o"),
    "sANN-LRF": Look(RED, ":", "s"),
    "sANN-GRF": Look(BLUE, ":", "^"),
    "psANN": Look(PURPLE, ":", "D"),
    "vANN": Look(GREY, "-", "X"),
    "vANN-R": Look(GREEN, "--", "o"),
    "vANN-LRF": Look(RED, "--", "s"),
    "vANN-GRF": Look(BLUE, "--", "^"),
}
ARTICLE: tuple[dk.models.Kind, ...] = ("dANN-R", "dANN-LRF", "dANN-GRF", "pdANN", "vANN")
AXIS: dict[Metric, str] = {"accuracy": "test accuracy (%)", "loss": "test loss"}
METRICS: tuple[Metric, Metric] = ("accuracy", "loss")


def curve(axes: Axes, kind: dk.models.Kind, x: Sequence[float], y: Sequence[Summary]) -> None:
    """Means, and a shade of one standard deviation."""
    look, means = LOOKS[kind], [s.mean for s in y]
    axes.plot(x, means, color=look.color, ls=look.line, marker=look.marker, label=kind)
    spread = [s.sd or 0.0 for s in y]
    low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
    axes.fill_between(x, low, high, color=look.color, alpha=0.18, lw=0)


def bars(axes: Axes, values: dict[dk.models.Kind, Summary]) -> None:
    """A bar for each family, its mean above it, with one standard deviation."""
    kinds = list(values)
    means, spread = [values[k].mean for k in kinds], [values[k].sd or 0.0 for k in kinds]
    drawn = axes.bar(
        range(len(kinds)),
        means,
        yerr=spread,
        color=[LOOKS[k].color for k in kinds],
        error_kw={"lw": 1, "capsize": 2},
        width=0.75,
    )
    for patch, kind in zip(drawn, kinds, strict=True):
        patch.set_hatch({"-": "", ":": "...", "--": "///"}[LOOKS[kind].line])
    labels = [f"{mean:.3g}" for mean in means]
    axes.bar_label(drawn, labels, padding=2, fontsize=8, rotation=turn(kinds))
    axes.margins(y=0.15 if turn(kinds) == 0 else 0.25)
    name_ticks(axes, kinds)


def name_ticks(axes: Axes, kinds: Sequence[dk.models.Kind]) -> None:
    """Families along the x axis, one at each whole number; few are not drawn large."""
    axes.set_xticks(range(len(kinds)), kinds, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.6, max(len(kinds), len(ARTICLE)) - 0.4)


def turn(kinds: Sequence[dk.models.Kind]) -> int:
    """The rotation of numbers above families: upright where many stand close."""
    return 0 if len(kinds) <= 7 else 90


def legend(figure: Figure, *panels: Axes) -> None:
    """One legend above all panels, of whatever any of them has a label for."""
    shown: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        shown |= {label: handle for handle, label in zip(handles, labels, strict=True)}
    if shown:
        columns = min(len(shown), 7)
        figure.legend(shown.values(), shown.keys(), loc="outside upper center", ncols=columns)


def letters(panels: Iterable[Axes]) -> None:
    """a, b, c ... before the titles."""
    for letter, axes in zip("abcdefghijklmnop", panels, strict=False):
        axes.set_title(f"{letter}  {axes.get_title('left')}")


def missing(axes: Axes, text: str) -> None:
    """An empty panel that says what it would show."""
    axes.text(
        0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=MISSING, wrap=True
    )
    axes.set(xticks=[], yticks=[])


def absent(kinds: Iterable[dk.models.Kind]) -> str:
    """The families of the article that were not trained, as a line; empty if there are none."""
    gone = set(ARTICLE) - set(kinds)
    return f"not trained: {', '.join(k for k in FAMILIES if k in gone)}" if gone else ""


def footnote(figure: Figure, text: str) -> None:
    if text:
        figure.supxlabel(text, fontsize=8, color=MISSING)
