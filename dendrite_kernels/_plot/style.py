"""What both pictures share: colours, names, and weights on a colour map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from .._validate import Array, as_numpy

if TYPE_CHECKING:
    from matplotlib.cm import ScalarMappable

    from ..structure import Connectivity

INK = "#3a3a3a"
PAPER = "#f4f4f1"
UNDER_WEIGHTS = "#c6c6c2"  # weights near 0 are white: they must not look like no synapse
TITLE, SMALL = 8, 7  # points
# Brewer's RdBu of five classes, safe for colour-blind readers. Its longer forms end in a red and a
# blue so dark that small marks look alike.
_DIVERGING = ("#0571b0", "#92c5de", "#f7f7f7", "#f4a582", "#ca0020")


class Weights(NamedTuple):
    """One number for each synapse, and the largest size of all."""

    values: Array  # [nnz]
    limit: float

    def mappable(self) -> ScalarMappable:
        """Red above 0, blue below."""
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import LinearSegmentedColormap, Normalize

        odd = 257  # so that 0 is exactly in the middle
        colours = LinearSegmentedColormap.from_list("weights", _DIVERGING, odd)
        return ScalarMappable(Normalize(-self.limit, self.limit), colours)


def weights_of(weights: Any, c: Connectivity) -> Weights:
    """The weights of a layer on `c`, or in a tensor or array [nnz].

    Raises:
        TypeError, ValueError: no such layer, dtype or shape, or a weight is not finite.
    """
    if isinstance(weights, torch.nn.Module):
        weights = _of_layer(weights, c)
    if isinstance(weights, torch.Tensor) and weights.is_floating_point():
        weights = weights.double()  # numpy has no bfloat16
    array = as_numpy(weights)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"Expected weights of a real dtype, got {array.dtype}")
    if array.shape != (c.nnz,):
        raise ValueError(f"Expected weights of shape [{c.nnz}], got {list(array.shape)}")
    array = array.astype(np.float64)
    largest = np.finfo(np.float64).max / 4  # colours reach from the negative size to the positive
    drawable = np.abs(array) <= largest  # which NaN is not
    if not drawable.all():
        first = int(drawable.argmin())
        raise ValueError(
            f"Expected finite weights up to {largest:.3g}, got {array[first]} at synapse {first}"
        )
    return Weights(array, float(np.abs(array).max(initial=0)) or 1.0)


def _of_layer(layer: Any, c: Connectivity) -> Any:
    name = getattr(layer, "WEIGHT", None)
    if name is None:
        kind = type(layer).__name__
        raise TypeError(f"Expected weights: DendriticLayer, SparseLinear or tensor, got {kind}")
    if layer.connectivity != c:
        raise ValueError(f"Expected a layer on {c}, got one on {layer.connectivity}")
    return getattr(layer, name)


def colour_bar(
    figure: Any, mappable: ScalarMappable, axes: Any, label: str, ticks: Sequence[float], **at: Any
) -> None:
    bar = figure.colorbar(mappable, ax=axes, ticks=ticks, **at)
    bar.ax.tick_params(labelsize=SMALL, colors=INK, width=0.6, length=2)
    (bar.ax.yaxis if bar.orientation == "vertical" else bar.ax.xaxis).set_ticklabels(
        [f"{tick:.3g}".replace("-", "\N{MINUS SIGN}") for tick in ticks]
    )
    bar.set_label(label, fontsize=SMALL, color=INK)
    bar.outline.set(color=INK, linewidth=0.6)


def frame(panel: Any) -> None:
    for spine in panel.spines.values():
        spine.set(color=INK, linewidth=0.6)


def ground(panel: Any, rows: int, columns: int, weighted: bool) -> None:
    """What is seen where there is no synapse, and lines between the cells of a small picture."""
    panel.set_facecolor(UNDER_WEIGHTS if weighted else PAPER)
    if max(rows, columns) <= 64:
        lines: dict[str, Any] = {"color": "#d2d2ce" if weighted else "white", "linewidth": 0.5}
        panel.hlines(np.arange(1, rows) - 0.5, -0.5, columns - 0.5, **lines)
        panel.vlines(np.arange(1, columns) - 0.5, -0.5, rows - 0.5, **lines)
