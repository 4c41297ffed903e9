"""Entropy and selectivity of dendrites and somas: the counterpart of the article's Fig. 5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import dendrite_kernels as dk
from bench import plots
from bench.paper.figures import style
from bench.paper.figures.weights import added, best_trials
from bench.paper.measures import ENTROPY_BIN
from bench.paper.result import Result
from bench.paper.statistics import families, plain

TITLE = "Entropy and selectivity of nodes"
CAPTION = (
    "Dendrites and somas of the most accurate network of each family, all trials together. Entropy "
    "is high where a node responds to many classes; nodes that no image activates are left out. "
    "Selectivity is the number of classes of whose test images a node is active on more than 40 % "
    "(the article's 400 of 1,000)."
)
NODES = "dendrites", "somas"


@plots.styled
def draw(results: Sequence[Result]) -> Figure:
    """Of the results of one data set."""
    chosen = best_trials(results)
    figure = Figure(figsize=(7.6, 6.2))
    panels = figure.subplots(2, 2)
    for nodes, column in zip(NODES, panels.T, strict=True):
        _entropy(column[0], chosen, nodes)
        _selectivity(column[1], chosen, nodes)
        if not chosen:
            for axes in column:
                style.missing(axes, "no nodes were measured")
    style.letters(panels.ravel())
    style.legend(figure, panels[0, 0])
    style.footnote(figure, style.absent(families(plain(results))))
    return figure


def seen(results: Sequence[Result]) -> str:
    """What the figure shows, in a sentence."""
    means: dict[dk.models.Kind, float] = {}
    for kind, trials in best_trials(results).items():
        known = [_nodes(trial, "somas")["entropy"]["mean"] for trial in trials]
        if None not in known:
            means[kind] = float(np.mean(known))
    if not means:
        return "No nodes were measured."
    most, least = max(means, key=lambda k: means[k]), min(means, key=lambda k: means[k])
    return (
        f"Somas have the highest mean entropy in {most} ({means[most]:.2f} bits) and the lowest in "
        f"{least} ({means[least]:.2f} bits)."
    )


def _nodes(result: Result, nodes: str) -> dict[str, Any]:
    found: dict[str, Any] = result.measures["layers"][0][nodes]
    return found


def _entropy(axes: Axes, chosen: dict[dk.models.Kind, list[Result]], nodes: str) -> None:
    for kind, trials in chosen.items():
        start, counts = added([_nodes(t, nodes)["entropy"]["histogram"] for t in trials])
        if not len(counts):
            continue
        centres = ENTROPY_BIN * (start + np.arange(len(counts)) + 0.5)
        look = style.LOOKS[kind]
        axes.plot(
            centres,
            counts / (counts.sum() * ENTROPY_BIN),
            color=look.color,
            ls=look.line,
            marker=look.marker,
            ms=3,
            label=kind,
        )
    axes.set(xlabel="entropy (bits)", ylabel="density", ylim=(0, None))
    axes.set_title(f"entropy of {nodes}")


def _selectivity(axes: Axes, chosen: dict[dk.models.Kind, list[Result]], nodes: str) -> None:
    for kind, trials in chosen.items():
        counts = np.sum([_nodes(t, nodes)["selectivity"]["histogram"] for t in trials], axis=0)
        look = style.LOOKS[kind]
        axes.plot(
            counts / counts.sum(), color=look.color, ls=look.line, marker=look.marker, label=kind
        )
    axes.set(xlabel="classes that a node responds to", ylabel="part of the nodes", ylim=(0, None))
    axes.set_title(f"selectivity of {nodes}")
