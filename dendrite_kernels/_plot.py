"""The picture behind `Connectivity.plot`."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = np.ndarray[Any, np.dtype[Any]]

_PANEL = 2.4  # inches, the longer side
_TITLE_WIDTH = 1.5  # inches
_INK = "#3a3a3a"
_PAPER = "#f4f4f1"
_GOLDEN = (math.sqrt(5) - 1) / 2
# Okabe and Ito's colours, which colour-blind readers tell apart, without black; then a grey.
_FEW = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#f0e442", "#7a7a7a")


class Fields(NamedTuple):
    """What is drawn of a Connectivity."""

    in_shape: tuple[int, ...] | None  # (H, W), (H, W, C) or, channels first, (C, H, W)
    channels_first: bool
    names: Sequence[object] | None  # [S], of the somas
    crow: Array  # [R + 1]
    columns: Array  # [nnz]
    soma_ptr: Array  # [S + 1]

    @property
    def size(self) -> tuple[int, ...]:
        """(H, W)."""
        shape = self.in_shape or ()
        return shape[1:] if self.channels_first else shape[:2]

    def pixels(self, columns: Array) -> Array:
        """The pixel, row * W + column, of each input."""
        if self.channels_first:
            return columns % math.prod(self.size)
        return columns // math.prod((self.in_shape or ())[2:])


def plot(fields: Fields, somas: Iterable[int] | None, image: Any, figure: Figure | None) -> Figure:
    """See `Connectivity.plot`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Connectivity.plot needs matplotlib: pip install dendrite-kernels[plot]"
        ) from error
    if fields.in_shape is None:
        raise ValueError("Expected a connectivity with in_shape, got in_shape=None")
    height, width = fields.size
    count = len(fields.soma_ptr) - 1
    chosen = list(range(min(8, count))) if somas is None else list(somas)
    for soma in chosen:
        if not 0 <= soma < count:
            raise ValueError(f"Expected somas in [0, {count}), got {soma}")
    if not chosen:
        raise ValueError("Expected at least one soma, got none")
    grey = None if image is None else _grey(image, height, width)
    across = min(4, len(chosen))
    down = -(-len(chosen) // across)
    if figure is None:
        inch = _PANEL / max(height, width)  # of a pixel
        size = (max(inch * width, _TITLE_WIDTH) * across, (inch * height + 0.35) * down)
        figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for panel, soma in zip(panels, chosen, strict=False):
        _draw_soma(panel, fields, soma, (height, width), grey)
    for panel in panels[len(chosen) :]:
        panel.set_axis_off()
    return figure


def _draw_soma(
    panel: Axes, fields: Fields, soma: int, shape: tuple[int, int], grey: Array | None
) -> None:
    from matplotlib.collections import PolyCollection

    height, width = shape
    first, end = fields.soma_ptr[soma : soma + 2].tolist()
    pixels, dendrites = _pixels(fields, first, end)
    panel.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), aspect="equal")
    panel.set(xticks=[], yticks=[], facecolor=_PAPER)
    count = end - first
    name = f"soma {soma}" if fields.names is None else fields.names[soma]
    title = f"{name}: {count} dendrite{'' if count == 1 else 's'}"
    panel.set_title(title, fontsize=8, color=_INK, pad=4, parse_math=False)
    for spine in panel.spines.values():
        spine.set(color=_INK, linewidth=0.6)
    if grey is not None:
        panel.imshow(grey, cmap="Greys", alpha=0.45, interpolation="nearest", aspect="equal")
    elif max(shape) <= 64:
        lines: dict[str, Any] = {"color": "white", "linewidth": 0.5, "zorder": 0}
        panel.hlines(np.arange(1, height) - 0.5, -0.5, width - 0.5, **lines)
        panel.vlines(np.arange(1, width) - 0.5, -0.5, height - 0.5, **lines)
    marks = PolyCollection(
        list(_marks(pixels, width)),
        facecolors=_colours(count)[dendrites],
        linewidths=0,
        rasterized=True,  # a vector file would hold every synapse
    )
    panel.add_collection(marks, autolim=False)


def _pixels(fields: Fields, first: int, end: int) -> tuple[Array, Array]:
    """Pixel and dendrite (counted from `first`) of every mark, by pixel and then by dendrite."""
    crow = fields.crow[first : end + 1]
    columns = fields.columns[crow[0] : crow[-1]]
    dendrites = np.repeat(np.arange(end - first), np.diff(crow))
    count = max(end - first, 1)
    return np.divmod(np.unique(fields.pixels(columns) * np.int64(count) + dendrites), count)


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
