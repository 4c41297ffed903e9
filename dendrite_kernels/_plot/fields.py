"""Receptive fields: a panel for each soma, a mark for each synapse."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .._validate import Array
from .style import INK, TITLE, Weights, colour_bar, frame, ground

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..structure import Connectivity

_PANEL = 2.4  # inches, the longer side
_TITLE_WIDTH = 1.5  # inches
_BAR = 1.1  # inches, of a colour bar, its numbers and its name
_GOLDEN = (math.sqrt(5) - 1) / 2
# Okabe and Ito's colours, which colour-blind readers tell apart, without black; then a grey.
_FEW = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#f0e442", "#7a7a7a")


def plot(
    c: Connectivity,
    somas: Sequence[int],
    weights: Weights | None,
    image: Any,
    figure: Any,
    ax: Any,
) -> Any:
    """The figure drawn into: see `Connectivity.plot`."""
    height, width = _size(c)
    grey = None if image is None else _grey(image, height, width)
    if ax is not None:
        if len(somas) > 1:
            raise ValueError(f"Expected one soma with ax, got {len(somas)}")
        figure, panels = ax.figure, np.array([ax])
    else:
        figure, panels = _panels(figure, len(somas), (height, width), weights is not None)
    for panel, soma in zip(panels, somas, strict=False):
        _draw_soma(panel, c, soma, weights, grey)
    for panel in panels[len(somas) :]:
        panel.set_axis_off()
    if weights is not None:
        ends = [-weights.limit, 0, weights.limit]
        colour_bar(
            figure, weights.mappable(), panels, "synapse weight", ends, aspect=30, shrink=0.8
        )
    return figure


def _panels(
    figure: Figure | None, count: int, shape: tuple[int, int], bar: bool
) -> tuple[Figure, Array]:
    from matplotlib.figure import Figure

    height, width = shape
    across = min(4, count)
    down = -(-count // across)
    if figure is None:
        inch = _PANEL / max(height, width)  # of a pixel
        wide = max(inch * width, _TITLE_WIDTH) * across + _BAR * bar
        figure = Figure(figsize=(wide, (inch * height + 0.35) * down), layout="constrained")
    return figure, figure.subplots(down, across, squeeze=False).ravel()


def _draw_soma(
    panel: Axes, c: Connectivity, soma: int, weights: Weights | None, grey: Array | None
) -> None:
    from matplotlib.collections import PolyCollection

    height, width = _size(c)
    first, end = c.soma_ptr[soma : soma + 2].tolist()
    count = end - first
    if weights is None:
        pixels, dendrites = _dendrites(c, first, end)
        colours = _colours(count)[dendrites]
    else:
        pixels, values = _synapses(c, first, end, weights)
        colours = weights.mappable().to_rgba(values)
    panel.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), aspect="equal")
    panel.set(xticks=[], yticks=[])
    names = None if c.labels is None else c.labels.somas
    name = f"soma {soma}" if names is None else names[soma]
    title = f"{name}: {count} dendrite{'' if count == 1 else 's'}"
    panel.set_title(title, fontsize=TITLE, color=INK, pad=4, parse_math=False)
    frame(panel)
    ground(panel, *((height, width) if grey is None else (1, 1)), weights is not None)
    if grey is not None:
        panel.imshow(grey, cmap="Greys", alpha=0.45, interpolation="nearest", aspect="equal")
    marks = PolyCollection(
        list(_marks(pixels, width)),
        facecolors=colours,
        linewidths=0,
        rasterized=True,  # a vector file would hold every synapse
    )
    panel.add_collection(marks, autolim=False)


def _size(c: Connectivity) -> tuple[int, ...]:
    """(H, W)."""
    shape = c.in_shape or ()
    return shape[1:] if c.channels_first else shape[:2]


def _pixels(c: Connectivity, columns: Array) -> Array:
    """The pixel, row * W + column, of each input."""
    if c.channels_first:
        return columns % math.prod(_size(c))
    return columns // math.prod((c.in_shape or ())[2:])


def _dendrites(c: Connectivity, first: int, end: int) -> tuple[Array, Array]:
    """Pixel and dendrite (counted from `first`) of every mark, by pixel and then by dendrite."""
    crow = c.crow_indices.numpy()[first : end + 1]
    columns = c.col_indices.numpy()[crow[0] : crow[-1]]
    dendrites = np.repeat(np.arange(end - first), np.diff(crow))
    count = max(end - first, 1)
    return np.divmod(np.unique(_pixels(c, columns) * np.int64(count) + dendrites), count)


def _synapses(c: Connectivity, first: int, end: int, weights: Weights) -> tuple[Array, Array]:
    """Pixel and weight of every synapse, by pixel, then by dendrite and channel."""
    begin, stop = c.crow_indices[[first, end]].tolist()
    pixels = _pixels(c, c.col_indices.numpy()[begin:stop])
    order = np.argsort(pixels, kind="stable")
    return pixels[order], weights.values[begin:stop][order]


def _marks(pixels: Array, width: int) -> Array:
    """Corners [marks, 4, 2] of the marks; those that share a pixel split it in a full grid."""
    _, first, counts = np.unique(pixels, return_index=True, return_counts=True)
    place = np.arange(pixels.size) - np.repeat(first, counts)
    shared = np.repeat(counts, counts)  # marks in the pixel of each mark
    across = np.ceil(np.sqrt(shared))
    row, column = np.divmod(place, across)
    gap = 0.06  # left free along each edge of a pixel
    cell_w = (1 - 2 * gap) / np.minimum(across, shared - row * across)  # the last row may be short
    cell_h = (1 - 2 * gap) / np.ceil(shared / across)
    x = pixels % width - 0.5 + gap + column * cell_w
    y = pixels // width - 0.5 + gap + row * cell_h
    corners = [(x, y), (x + cell_w, y), (x + cell_w, y + cell_h), (x, y + cell_h)]
    return np.stack([np.stack(corner, axis=-1) for corner in corners], axis=1)


def _colours(count: int) -> Array:
    """[count, 3] colours; many dendrites get hues by the golden ratio so that neighbours differ."""
    if count <= len(_FEW):
        rgb = [[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in _FEW[:count]]
    else:
        light, rich = (0.40, 0.56, 0.72), (0.60, 0.55, 0.65)
        rgb = [
            list(colorsys.hls_to_rgb(i * _GOLDEN % 1, light[i % 3], rich[i % 3]))
            for i in range(count)
        ]
    return np.array(rgb).reshape(-1, 3)


def _grey(image: Any, height: int, width: int) -> Array:
    array: Array = np.asarray(image, np.float64)
    if array.ndim == 3 and array.shape[:2] == (height, width):
        array = array.mean(axis=2)
    if array.shape != (height, width):
        raise ValueError(f"Expected an image of {height} x {width} pixels, got {array.shape}")
    return array
