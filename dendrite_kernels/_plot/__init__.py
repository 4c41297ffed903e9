"""The pictures behind `Connectivity.plot`: receptive fields, or a matrix without an image."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from . import fields, matrix
from .style import weights_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..structure import Connectivity


def plot(
    c: Connectivity,
    somas: Iterable[int] | None,
    image: Any,
    figure: Figure | None,
    weights: Any,
    ax: Axes | None,
) -> Figure:
    """See `Connectivity.plot`."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "Connectivity.plot needs matplotlib: pip install 'dendrite-kernels[plot]'"
        ) from error
    if figure is not None and ax is not None:
        raise ValueError("Expected figure or ax, got both")
    if image is not None and c.in_shape is None:
        raise ValueError("Expected a connectivity with in_shape under an image, got in_shape=None")
    if somas is None:
        at_first = c.num_somas if c.in_shape is None else 8 if ax is None else 1
        somas = range(min(at_first, c.num_somas))
    try:
        chosen = [operator.index(soma) for soma in somas]
    except TypeError:
        raise TypeError(f"Expected a sequence of integers as somas, got {somas!r}") from None
    for soma in chosen:
        if not 0 <= soma < c.num_somas:
            raise ValueError(f"Expected somas in [0, {c.num_somas}), got {soma}")
    if not chosen:
        raise ValueError("Expected at least one soma, got none")
    scale = None if weights is None else weights_of(weights, c)
    drawn: Figure
    if c.in_shape is None:
        drawn = matrix.plot(c, chosen, scale, figure, ax)
    else:
        drawn = fields.plot(c, chosen, scale, image, figure, ax)
    return drawn
