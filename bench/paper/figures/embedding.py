"""Activities in the plane by t-SNE: the counterpart of the article's Fig. 6."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import dendrite_kernels as dk
from bench import plots
from bench.paper.embeddings import NEIGHBOURS, Embedding
from bench.paper.figures import style
from bench.paper.statistics import FAMILIES

TITLE = "Activities in the plane"
CAPTION = (
    "t-SNE of the activities on test images, a colour for each class, of the most accurate network "
    "of each family (one trial), and three scores of it, pale for dendrites and full for somas: "
    "silhouette of the classes in the plane, trustworthiness of the plane, and the part of the "
    f"{NEIGHBOURS} nearest activities that have the image's class."
)
SCORES = "silhouette", "trustworthiness", "neighbourhood"


@plots.styled
def draw(embeddings: Sequence[Embedding]) -> Figure:
    """Of one data set."""
    kinds = _kinds(embeddings)
    stages = [s for s in ("dendrites", "somas") if any(e.stage == s for e in embeddings)]
    if not kinds:
        figure = Figure(figsize=(5, 2.5))
        style.missing(figure.subplots(), "no activities were embedded")
        return figure
    figure = Figure(figsize=(max(1.7 * len(kinds), 6), 1.75 * len(stages) + 2.4))
    heights = 1.75 * len(stages), 2.4
    planes, scores = figure.subfigures(2, 1, height_ratios=heights, squeeze=False).ravel()
    panels = planes.subplots(len(stages), len(kinds), squeeze=False)
    for embedding in embeddings:
        row, column = stages.index(embedding.stage), kinds.index(embedding.run.kind)
        _plane(panels[row, column], embedding)
    for axes, kind in zip(panels[0], kinds, strict=True):
        axes.set_title(kind, loc="center")
    for axes, stage in zip(panels[:, 0], stages, strict=True):
        axes.set_ylabel(stage)
    for axes in panels.ravel():
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for axes, name in zip(scores.subplots(1, len(SCORES)), SCORES, strict=True):
        _score(axes, embeddings, kinds, stages, name)
    style.footnote(figure, style.absent(kinds))
    return figure


def seen(embeddings: Sequence[Embedding]) -> str:
    """What the figure shows, in a sentence."""
    somas = [e for e in embeddings if e.stage == "somas"]
    if not somas:
        return "No activities were embedded."
    most, least = (choose(somas, key=lambda e: e.silhouette) for choose in (max, min))
    return (
        f"On {len(somas[0].classes):,} test images the classes lie farthest apart in the somas of "
        f"{most.run.kind} (silhouette {most.silhouette:.2f}), nearest in {least.run.kind} "
        f"({least.silhouette:.2f})."
    )


def _kinds(embeddings: Sequence[Embedding]) -> list[dk.models.Kind]:
    found = {embedding.run.kind for embedding in embeddings}
    return [kind for kind in FAMILIES if kind in found]


def _plane(axes: Axes, embedding: Embedding) -> None:
    x, y = np.array(embedding.points).T
    colors = "tab10" if max(embedding.classes) < 10 else "turbo"
    axes.scatter(x, y, s=3, c=embedding.classes, cmap=colors, alpha=0.8, lw=0, rasterized=True)
    axes.set_aspect("equal", "datalim")


def _score(
    axes: Axes,
    embeddings: Sequence[Embedding],
    kinds: Sequence[dk.models.Kind],
    stages: Sequence[str],
    name: str,
) -> None:
    """Somas as bars in full colour, dendrites pale beside them."""
    width = 0.8 / len(stages)
    for embedding in embeddings:
        place = stages.index(embedding.stage)
        axes.bar(
            kinds.index(embedding.run.kind) + width * (place - (len(stages) - 1) / 2),
            getattr(embedding, name),
            width,
            color=style.LOOKS[embedding.run.kind].color,
            alpha=0.45 if embedding.stage == "dendrites" else 1,
        )
    axes.axhline(0, color="black", lw=0.6)
    style.name_ticks(axes, kinds)
    axes.set_title(name)
