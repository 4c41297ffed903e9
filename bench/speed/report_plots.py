"""The panels of the report: narrow enough for a telephone, side by side on wide screens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from bench import plots
from bench.plots import BLUE, GREEN, GREY, MISSING, ORANGE, PURPLE, RED, SKY
from dendrite_kernels.benchmark.peers import OFFICIAL, OURS

WIDTH = 3.5  # inches: 336 pixels
_LINE = 0.085  # of a series in a row
_EDGES = 0.75


class Look(NamedTuple):
    color: str
    marker: str = "o"
    filled: bool = True


LOOKS = {
    OURS: Look(BLUE),
    "dendrite_kernels numba": Look(BLUE, "D"),
    "dendrite_kernels reference": Look(BLUE, "X"),
    OFFICIAL: Look(RED),
    "masked dense, float masks": Look(RED, "s"),
    "masked dense + block-sum cable": Look(GREEN, "^"),
    "torch CSR by hand": Look(PURPLE),
    "scipy CSR": Look(PURPLE, "s"),
    "embedding_bag": Look(ORANGE),
    "embedding_bag, compiled": Look(ORANGE, "s"),
    "gather, compiled": Look(SKY, "v"),
    "the roof": Look(GREY, "|"),
    "roof of L2 in order": Look(SKY, "|"),
    "cpp kernels, forward": Look(BLUE),
    "cpp kernels, backward": Look(BLUE, "o", False),
    "numba kernels, forward": Look(GREEN, "D"),
    "numba kernels, backward": Look(GREEN, "D", False),
    "aim: 3 us + 1.6 F.linear": Look(GREY, "|"),
    "F.linear": Look(ORANGE),
    "nn.Linear": Look(ORANGE, "o", False),
    "sparse_linear": Look(GREEN, "s"),
    "SparseLinear": Look(GREEN, "s", False),
    "dendritic_layer": Look(BLUE, "D"),
    "DendriticLayer": Look(BLUE, "D", False),
}

Rows = Mapping[str, Mapping[str, float]]  # row -> series -> value


def series_of(panels: Iterable[Rows]) -> list[str]:
    """All series of some panels, in the order of LOOKS."""
    found = {series for rows in panels for row in rows.values() for series in row}
    return [*(name for name in LOOKS if name in found), *sorted(found - set(LOOKS))]


@plots.styled
def dots(
    title: str, label: str, rows: Rows, series: Sequence[str], lose: bool = False, log: bool = True
) -> Figure:
    """A row of dots each, every series a little below the one before.

    lose: values are ratios, and those below 1 are what we lose.
    """
    height = max(0.3, _LINE * (len(series) + 2))
    values = [value for row in rows.values() for value in row.values()]
    figure = Figure(figsize=(WIDTH, _EDGES + height * len(rows)))
    axes = figure.subplots()
    if log:
        _logarithmic(axes, "x", values, lose)
    else:
        axes.set_xlim(0, 1.05 * max(values))
    for y, row in enumerate(rows.values()):
        if y % 2:
            axes.axhspan(y - 0.5, y + 0.5, color=GREY, alpha=0.07, lw=0)
        for i, one in enumerate(series):
            if one in row:
                at = y + (i + 1.5) / (len(series) + 2) - 0.5
                axes.plot(row[one], at, **_style(one))
    axes.set_yticks(range(len(rows)), list(rows))
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", color=GREY, alpha=0.2, lw=0.6)
    if lose:
        axes.axvspan(axes.get_xlim()[0], 1, color=RED, alpha=0.15, lw=0)
        axes.axvline(1, color=BLUE, lw=1)
    axes.set(title=title, xlabel=label)
    return figure


@plots.styled
def legend(series: Sequence[str]) -> Figure:
    """What the markers of the panels beside it mean."""
    figure = Figure(figsize=(WIDTH, 0.3 + 0.19 * len(series)))
    handles = [Line2D([], [], label=one, **_style(one)) for one in series]
    figure.legend(handles=handles, loc="upper left", fontsize=9)
    return figure


@plots.styled
def curves(
    title: str,
    densities: Sequence[float],
    ratios: Mapping[str, Sequence[float]],
    crossings: Mapping[str, float | None],
) -> Figure:
    """How many times as long dense ways take, by density, and where they begin to win."""
    figure = Figure(figsize=(WIDTH, 2.7))
    axes = figure.subplots()
    _logarithmic(axes, "x", densities)
    _logarithmic(axes, "y", [value for row in ratios.values() for value in row], lose=True)
    axes.axhspan(axes.get_ylim()[0], 1, color=RED, alpha=0.15, lw=0)
    axes.axhline(1, color=BLUE, lw=1)
    for name, values in ratios.items():
        axes.plot(densities, values, **{**_style(name), "ls": "-"})
        if where := crossings[name]:
            axes.axvline(where, color=LOOKS[name].color, ls=":")
    axes.grid(color=GREY, alpha=0.2, lw=0.6)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axes.set(title=title, xlabel="density of synapses", ylabel="times as long as ours")
    return figure


def _style(series: str) -> dict[str, Any]:
    """For `plot`. Rates that are limits are thin lines."""
    look = LOOKS.get(series, Look(MISSING, "P"))
    limit = look.marker == "|"
    return {
        "color": look.color, "marker": look.marker, "ls": "none",
        "ms": 9 if limit else 5, "mew": 2 if limit else 1.2,
        "mfc": look.color if look.filled else "white",
    }  # fmt: skip


def _logarithmic(axes: Axes, axis: str, values: Iterable[float], lose: bool = False) -> None:
    """From below the least positive value to above the largest; lose: with 1 and room below it."""
    shown = [*(value for value in values if value > 0), *([0.9, 1.0] if lose else [])]
    least, most = min(shown), max(shown)
    getattr(axes, f"set_{axis}scale")("log")
    getattr(axes, f"set_{axis}lim")(least / 1.4, most * 1.4)
    ticks, plain = getattr(axes, f"{axis}axis"), FuncFormatter(lambda value, _: f"{value:g}")
    ticks.set_major_formatter(plain)
    ticks.set_minor_formatter(plain if most / least < 5 else NullFormatter())
