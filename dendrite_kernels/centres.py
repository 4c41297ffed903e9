"""Where receptive fields lie: rules for `centres=` of `dk.connectivity`'s receptive fields.

    dk.connectivity.local_receptive_fields((28, 28), 64, 16, 16, centres=dk.centres.semirandom())

A rule is a function (in_shape, count, rng) -> [count] pixels, each row * W + column. It draws from
the generator of the fields, before them: one seed is enough. A function of yours serves as well.
Those here have the names of options of the article's public code; the details are chosen here
(docs/equations.md, section 5). Without a rule, centres are independent and uniform over pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from ._validate import Array, check_size, integers

Shape = tuple[int, int]
Rule = Callable[[Shape, int, np.random.Generator], Sequence[int] | Array | torch.Tensor]
Centres = Sequence[int] | Array | torch.Tensor | Rule


def random_limited(number: int) -> Rule:
    """A few places, used again: `number` distinct pixels, drawn uniformly.

    Each centre is one of them, drawn uniformly and independently. With few centres, some of the
    places may stay unused.

    Args:
        number: of places, at most the H * W pixels of the image.

    Returns:
        A rule for `centres=`.

    Raises:
        ValueError: `number` is not positive or, when the fields are drawn, exceeds the pixels.

    Source: the public code's option of this name; details chosen here.
    """
    return partial(_random_limited, check_size("number", number))


def semirandom(probability: float = 0.7) -> Rule:
    """Most centres in the middle: with this probability in its box, otherwise anywhere.

    The box holds the pixels whose midpoint lies in the middle half of the height and of the width:
    rows 7 to 20 of 28, rows 1 to 3 of 5. With `probability` a centre is uniform over the box,
    otherwise uniform over all pixels, which include the box: at 0.7 and 28 x 28, 77.5 % of the
    centres lie in the box. Centres are independent.

    Args:
        probability: from 0, as without a rule, to 1, all in the box.

    Returns:
        A rule for `centres=`.

    Raises:
        ValueError: `probability` is not from 0 to 1.

    Source: the public code's option of this name; details chosen here.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"Expected probability from 0 to 1, got {probability}")
    return partial(_semirandom, probability)


def serial(step: int) -> Rule:
    """A regular grid, walked row by row; after its last point it starts again. Nothing is drawn.

    The grid has every `step`-th row and column and lies in the middle of the image: where pixels
    are left over, half of them, rounded down, lie before its first point. A step of 4 takes rows
    1, 5, ..., 25 of 28. A step as large as the image leaves one point, in the middle.

    Args:
        step: rows, and columns, from one point to the next.

    Returns:
        A rule for `centres=`.

    Raises:
        ValueError: `step` is not positive.

    Source: the public code's option of this name; details chosen here.
    """
    return partial(_serial, check_size("step", step))


def _random_limited(number: int, in_shape: Shape, count: int, rng: np.random.Generator) -> Array:
    pixels = in_shape[0] * in_shape[1]
    if number > pixels:
        raise ValueError(f"Expected number <= {pixels}, the pixels of in_shape, got {number}")
    places = rng.choice(pixels, size=number, replace=False)
    return places[rng.integers(number, size=count)]


def _semirandom(probability: float, in_shape: Shape, count: int, rng: np.random.Generator) -> Array:
    height, width = in_shape
    top, left = (height + 1) // 4, (width + 1) // 4  # pixels outside the box, on either side
    in_box = rng.random(count) < probability
    row = rng.integers(top, height - top, size=count)
    column = rng.integers(left, width - left, size=count)
    anywhere = rng.integers(height * width, size=count)
    return np.where(in_box, row * width + column, anywhere)


def _serial(step: int, in_shape: Shape, count: int, rng: np.random.Generator) -> Array:
    rows, columns = (np.arange((size - 1) % step // 2, size, step) for size in in_shape)
    point = np.arange(count) % (rows.size * columns.size)
    return rows[point // columns.size] * in_shape[1] + columns[point % columns.size]


def _draw(
    centres: Centres | None, in_shape: Shape, count: int, rng: np.random.Generator, owners: str
) -> Array:
    """`count` checked pixels, int64, for the connectivity rules; `owners` says of what."""
    pixels = in_shape[0] * in_shape[1]
    if centres is None:
        return rng.integers(pixels, size=count)
    if isinstance(centres, str):
        raise TypeError(f"Expected centres as pixels or a rule of dk.centres, got {centres!r}")
    found = integers("centres", centres(in_shape, count, rng) if callable(centres) else centres)
    if found.size != count:
        raise ValueError(f"Expected centres for {count} {owners}, got {found.size}")
    if found.min() < 0 or found.max() >= pixels:
        wrong = found[(found < 0) | (found >= pixels)][0]
        raise ValueError(f"Expected centres from 0 to {pixels - 1}, got {wrong}")
    return found.astype(np.int64)
