"""The counterparts of the article's figures. Each module draws one, from any results there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from bench import plots
from bench.paper import embeddings
from bench.paper.figures import (
    efficiency,
    embedding,
    nodes,
    robustness,
    settings,
    size,
    weights,
)
from bench.paper.result import Result

FOLDER = "figures"


class Drawn(NamedTuple):
    """A figure of one data set, its title and what to say below it."""

    name: str  # of its files, without the ending
    data: str
    title: str
    figure: Figure
    caption: str
    seen: str


def draw_all(results: Sequence[Result], folder: Path) -> Iterator[Drawn]:
    """All figures of every data set; embeddings are those in `folder`."""
    embedded = embeddings.read(folder)
    for data in sorted({result.run.data for result in results}):
        own = [result for result in results if result.run.data == data]
        planes = [one for one in embedded if one.run.data == data]
        for number, module in (("2", size), ("3", efficiency), ("4", weights), ("5", nodes)):
            yield _drawn(number, data, module, own)
        yield _drawn("6", data, embedding, planes)
        yield _drawn("7", data, robustness, own)
        yield _drawn("s", data, settings, own)


def _drawn(number: str, data: str, module: Any, shown: Sequence[Any]) -> Drawn:
    name = module.__name__.rpartition(".")[2]
    where = "supplement" if number == "s" else f"Fig. {number}"
    return Drawn(
        f"{data}-{number}-{name}",
        data,
        f"{module.TITLE} (the article's {where})",
        module.draw(shown),
        module.CAPTION,
        module.seen(shown),
    )


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """Write all figures into `folder`/figures, as PNG and SVG."""
    return [
        path
        for drawn in draw_all(results, folder)
        for path in plots.save(drawn.figure, folder / FOLDER, drawn.name)
    ]
