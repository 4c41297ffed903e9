"""Synapses as a matrix: dendrites, soma by soma, over inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .._validate import Array
from .style import INK, PAPER, SMALL, TITLE, Weights, colour_bar, frame, ground

if TYPE_CHECKING:
    from ..structure import Connectivity

_CELLS = 100  # per inch at most: more of them blend to grey on a screen
_INCH = 0.17  # of a row or a column that has a name
_ROOM = 0.14  # inches, of a name
_LONG = 24  # letters
_SYNAPSES = ("#0072b2", "#003a5c")  # from some to many


class Rows(NamedTuple):
    """The dendrites in the picture."""

    dendrites: Array  # [rows]
    ends: Array  # [somas + 1], the rows of each soma


def rows_of(c: Connectivity, somas: Sequence[int]) -> Rows:
    chosen, soma_ptr = np.asarray(somas), c.soma_ptr.numpy()
    counts = soma_ptr[chosen + 1] - soma_ptr[chosen]
    return Rows(_ranges(soma_ptr[chosen], counts), np.concatenate([[0], np.cumsum(counts)]))


def _ranges(starts: Array, counts: Array) -> Array:
    """start, start + 1, ... of each range, one after the other."""
    before = np.cumsum(counts, dtype=np.int64) - counts
    return np.repeat(starts - before, counts) + np.arange(counts.sum())


def cells(
    c: Connectivity, dendrites: Array, weights: Weights | None, most: tuple[int, int]
) -> tuple[Array, tuple[int, int]]:
    """The picture [down, across], `most` at most, and of how many rows and columns a cell is.

    A cell holds the share of its places that have a synapse; with weights, the one of the largest
    size. NaN where there is no synapse. All cells but the last are equally large: otherwise even a
    uniform matrix would have stripes.
    """
    crow = c.crow_indices.numpy()
    counts = crow[dendrites + 1] - crow[dendrites]
    synapses = _ranges(crow[dendrites], counts)
    size = dendrites.size, c.in_features
    step = -(-size[0] // most[0]), -(-size[1] // most[1])
    down, across = -(-size[0] // step[0]), -(-size[1] // step[1])
    row = np.repeat(np.arange(dendrites.size) // step[0], counts)
    cell = row * across + c.col_indices.numpy()[synapses] // step[1]
    picture = np.full(down * across, np.nan)
    if weights is None:
        filled = np.bincount(cell, minlength=picture.size)
        high, wide = (
            np.minimum(s, n - np.arange(0, n, s)) for n, s in zip(size, step, strict=True)
        )
        np.divide(filled, np.outer(high, wide).ravel(), out=picture, where=filled > 0)
    else:
        values = weights.values[synapses]
        largest = np.zeros(picture.size)
        np.maximum.at(largest, cell, np.abs(values))
        shown = np.abs(values) == largest[cell]
        picture[cell[shown]] = values[shown]
    return picture.reshape(down, across), step


def plot(
    c: Connectivity,
    somas: Sequence[int],
    weights: Weights | None,
    figure: Any,
    ax: Any,
) -> Any:
    """The figure drawn into: see `Connectivity.plot`."""
    from matplotlib.figure import Figure

    rows = rows_of(c, somas)
    if not rows.dendrites.size:
        raise ValueError("Expected somas with dendrites, got none")
    if ax is None:
        if figure is None:
            wide, high = (_inches(n) for n in (c.in_features, rows.dendrites.size))
            figure = Figure(figsize=(wide + 1.2, high + 1.2), layout="constrained")
        ax = figure.subplots()
    else:
        figure = ax.figure
    box = ax.get_window_extent()
    inches = box.height / figure.dpi, box.width / figure.dpi
    most = max(int(inches[0] * _CELLS), 10), max(int(inches[1] * _CELLS), 10)
    _draw(ax, *cells(c, rows.dendrites, weights, most), rows, c.in_features, weights)
    _name(ax, c, somas, rows, inches)
    return figure


def _inches(count: int) -> float:
    return float(np.clip(count * _INCH, 1.2, 5))


def _draw(
    ax: Any, picture: Array, step: tuple[int, int], rows: Rows, inputs: int, weights: Weights | None
) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    (down, across), height = picture.shape, rows.dendrites.size
    binned = max(step) > 1
    if weights is None:
        colours = LinearSegmentedColormap.from_list("density", [PAPER, *_SYNAPSES])
        full = picture[: -1 if down > 1 else 1, : -1 if across > 1 else 1] if binned else picture
        densest = float(np.nanmax(full, initial=0)) or 1.0  # the last cells may be tiny
        mappable, ticks = ScalarMappable(Normalize(0, densest), colours), [0, densest]
        label = "density"
    else:
        mappable, ticks = weights.mappable(), [-weights.limit, 0, weights.limit]
        label = "largest weight in a cell" if binned else "synapse weight"
    ax.imshow(
        picture,
        cmap=mappable.cmap,
        norm=mappable.norm,
        extent=(-0.5, across * step[1] - 0.5, down * step[0] - 0.5, -0.5),
        aspect="auto",
        interpolation="none" if max(picture.shape) <= 150 else "antialiased",
        interpolation_stage="rgba",
    )
    ax.set(xlim=(-0.5, inputs - 0.5), ylim=(height - 0.5, -0.5))
    ground(ax, height, inputs, weights is not None)
    frame(ax)
    if weights is not None or binned:
        colour_bar(ax.figure, mappable, ax, label, ticks, location="bottom", aspect=40, shrink=0.7)


def _name(
    ax: Any, c: Connectivity, somas: Sequence[int], rows: Rows, inches: tuple[float, float]
) -> None:
    """Ticks with names: all of them where there is room, else some."""
    inputs, dendrites, names = c.labels or (None, None, None)
    high, wide = (int(length / _ROOM) for length in inches)
    ax.xaxis.tick_top()
    ax.xaxis.set_label_position("top")
    columns = np.arange(c.in_features)
    _ticks(ax.xaxis, columns, columns, inputs, wide, "input")
    _ticks(ax.yaxis, np.arange(rows.dendrites.size), rows.dendrites, dendrites, high, "dendrite")
    if c.dendrites_per_soma == 1 and dendrites == names:  # every dendrite is its own soma
        return
    between = rows.ends[1:-1]
    if between.size < 3 * high:
        ax.hlines(between - 0.5, -0.5, c.in_features - 0.5, color=INK, linewidth=0.6)
    side = ax.secondary_yaxis("right")
    side.spines["right"].set_visible(False)
    middles = (rows.ends[:-1] + rows.ends[1:] - 1) / 2
    _ticks(side.yaxis, middles, np.asarray(somas), names, high, "soma")


def _ticks(
    axis: Any, at: Array, numbers: Array, names: Sequence[object] | None, most: int, kind: str
) -> None:
    step = _step(at.size, most)
    shown = numbers[::step].tolist()
    texts = [str(n if names is None else names[n]) for n in shown]
    texts = [text if len(text) <= _LONG else text[: _LONG - 1] + "…" for text in texts]
    upright = axis.axis_name == "x" and max(map(len, texts)) > 3 and step == 1
    axis.set_ticks(at[::step], texts, parse_math=False, rotation=90 if upright else 0)
    axis.set_tick_params(labelsize=SMALL, colors=INK, width=0.6, length=2)
    label = kind if step == 1 else f"{at.size:,} {kind}s"
    axis.set_label_text(label, fontsize=TITLE, color=INK)


def _step(count: int, most: int) -> int:
    """1 where all `count` names have room, else a round number that leaves 8 or fewer."""
    if count <= most:
        return 1
    few = min(max(most // 3, 1), 8)
    steps = (digit * int(10.0**power) for power in range(10) for digit in (1, 2, 5))
    return next(step for step in steps if count <= step * few)
