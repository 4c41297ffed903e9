"""Connectivity rules of the paper: pure functions of sizes and a generator.

Chavlis & Poirazi, Nat Commun 16:943 (2025); docs/equations.md, section 5. Soma s owns
the consecutive dendrites s * D .. s * D + D - 1. `seed` is an int, None for fresh entropy, or a
numpy Generator, which is advanced: one generator can serve the layers of a network in turn. The
same seed gives the same network in every version, as far as numpy keeps its streams.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ._validate import SIZE_LIMIT, Array, check_size, image_of, integers, pointer_array
from .centres import Centres, _draw
from .structure import Connectivity

Seed = int | np.random.Generator | None

# Random numbers at a time: temporaries stay in cache and near 3 MB. Constant fan-in draws depend on
# it: another value makes other networks of the same seed.
_CHUNK = 1 << 16


def random(
    in_features: int,
    somas: int,
    dendrites: int,
    synapses: int,
    *,
    constant_fan_in: bool = False,
    seed: Seed = None,
) -> Connectivity:
    """Random inputs (dANN-R).

    By default the whole layer is one draw of K * D * S of the N * D * S possible synapses, bit for
    bit that of the official code given the same Generator: the fan-in of a dendrite varies around K
    and may be 0. If K > N / 50, numpy's draw takes 8 bytes for each *possible* synapse, otherwise
    about 40 bytes for each synapse; use `constant_fan_in` where that is too much.

    Args:
        in_features: N.
        somas: S.
        dendrites: D, for each soma.
        synapses: K, for each dendrite, on average or (`constant_fan_in`) exactly.
        constant_fan_in: every dendrite draws its own K distinct inputs uniformly.
        seed: see the module.

    Returns:
        Connectivity of D * S dendrites and K * D * S synapses.

    Raises:
        ValueError: a size is not positive, K > N, or 2**31 or more synapses.

    Source: dANN-R of the paper; its code draws an [N, D * S] mask by `Generator.choice`.
    """
    n = check_size("in_features", in_features)
    rows, k = _check_layer(somas, dendrites, synapses, n, "in_features")
    rng = np.random.default_rng(seed)
    if constant_fan_in:
        return _constant(_distinct(rng, n, rows, k), n, dendrites)
    flat = rng.choice(n * rows, size=k * rows, replace=False)  # [K * R], position input * R + row
    column, key = np.divmod(flat, rows)
    del flat
    key *= n
    key += column
    key.sort()  # row * N + column
    fan_in = np.bincount(key // n, minlength=rows)
    key %= n
    return Connectivity.from_csr(np.cumsum([0, *fan_in]), key, n, dendrites_per_soma=dendrites)


def local_receptive_fields(
    in_shape: Sequence[int],
    somas: int,
    dendrites: int,
    synapses: int,
    *,
    channels: int = 1,
    channels_first: bool = False,
    centres: Centres | None = None,
    seed: Seed = None,
) -> Connectivity:
    """Local receptive fields (dANN-LRF): each dendrite has its own place in the image.

    By default the D * S centres are independent and uniform over pixels. A dendrite sees K pixels
    around its centre: the 3 x 3 block and then whole Chebyshev rings, clamped to the image, while
    they fit, and a uniform sample without replacement of the first that does not.

    Args:
        in_shape: (H, W).
        somas: S.
        dendrites: D, for each soma.
        synapses: K pixels for each dendrite; in all `channels` of them, so K * channels synapses.
        channels: the input is [H, W, channels] flattened, channels last.
        channels_first: it is [channels, H, W] flattened, as torch stores images.
        centres: [D * S] pixels, row * W + column, one for each dendrite in order; or a rule that
            gives them (`dk.centres`).
        seed: see the module.

    Returns:
        Connectivity of H * W * channels inputs and D * S dendrites, with its in_shape.

    Raises:
        ValueError: a size is not positive, K > H * W, centres of another number or outside the
            image, or 2**31 or more synapses.
        TypeError: centres that are not integers.

    Source: dANN-LRF of the paper.
    """
    height, width, channels = _check_image(in_shape, channels)
    pixels = height * width
    rows, k = _check_layer(somas, dendrites, synapses, pixels, "the pixels of in_shape", channels)
    rng = np.random.default_rng(seed)
    own = _draw(centres, (height, width), rows, rng, "dendrites")
    fields = _around(rng, own, (height, width), k)
    return _tiled(fields, (height, width), channels, channels_first, dendrites)


def global_receptive_fields(
    in_shape: Sequence[int],
    somas: int,
    dendrites: int,
    synapses: int,
    *,
    channels: int = 1,
    channels_first: bool = False,
    centres: Centres | None = None,
    seed: Seed = None,
) -> Connectivity:
    """Global receptive fields (dANN-GRF): the dendrites of a soma lie close together.

    By default the S soma centres are independent and uniform over pixels. The centres of a soma's
    dendrites are D distinct pixels around the soma's, and each dendrite sees K pixels around its
    own centre, both picked as in `local_receptive_fields`. This is the rule as published. The
    public code compares D with the size of the 3 x 3 block the wrong way round, which leaves 47 %
    of the dendrites without inputs at D = 16 and gives others to the wrong soma; that is not
    reproduced.

    Args:
        in_shape: (H, W).
        somas: S.
        dendrites: D, for each soma.
        synapses: K pixels for each dendrite; in all `channels` of them, so K * channels synapses.
        channels: the input is [H, W, channels] flattened, channels last.
        channels_first: it is [channels, H, W] flattened, as torch stores images.
        centres: of the somas: [S] pixels, row * W + column, or a rule that gives them
            (`dk.centres`).
        seed: see the module.

    Returns:
        Connectivity of H * W * channels inputs and D * S dendrites, with its in_shape.

    Raises:
        ValueError: a size is not positive, K or D > H * W, centres of another number or outside the
            image, or 2**31 or more synapses.
        TypeError: centres that are not integers.

    Source: dANN-GRF of the paper, not its code: see above.
    """
    height, width, channels = _check_image(in_shape, channels)
    pixels = height * width
    rows, k = _check_layer(somas, dendrites, synapses, pixels, "the pixels of in_shape", channels)
    if dendrites > pixels:
        raise ValueError(
            f"Expected dendrites <= {pixels}, the pixels of in_shape, got {dendrites}: "
            "the dendrites of a soma have different centres"
        )
    rng = np.random.default_rng(seed)
    of_somas = _draw(centres, (height, width), rows // dendrites, rng, "somas")
    own = _around(rng, of_somas, (height, width), dendrites).ravel()
    fields = _around(rng, own, (height, width), k)
    return _tiled(fields, (height, width), channels, channels_first, dendrites)


def all_to_all(in_features: int, somas: int, dendrites: int) -> Connectivity:
    """Every dendrite sees every input (pdANN); only the cable from dendrites to somas is sparse.

    Args:
        in_features: N.
        somas: S.
        dendrites: D, for each soma.

    Returns:
        Connectivity of D * S dendrites and N * D * S synapses.

    Raises:
        ValueError: a size is not positive, or 2**31 or more synapses.

    Source: pdANN of the paper.
    """
    n = check_size("in_features", in_features)
    rows, _ = _check_layer(somas, dendrites, n, n, "in_features")
    columns = np.broadcast_to(np.arange(n, dtype=np.int32), (rows, n))
    return _constant(columns, n, dendrites)


def one_to_one(in_features: int, somas: int, dendrites: int) -> Connectivity:
    """Dendrite i sees input i and nothing else: K = 1, and as many dendrites as inputs.

    Soma s then reads the inputs s * D to s * D + D - 1.

    Args:
        in_features: N, which must be D * S.
        somas: S.
        dendrites: D, for each soma.

    Returns:
        Connectivity of D * S dendrites and D * S synapses.

    Raises:
        ValueError: a size is not positive, or D * S is not N.

    Source: the public code's option of this name; details chosen here.
    """
    n = check_size("in_features", in_features)
    rows, _ = _check_layer(somas, dendrites, 1, n, "in_features")
    if rows != n:
        raise ValueError(f"Expected somas * dendrites == {n}, in_features, got {rows}")
    return _constant(np.arange(n, dtype=np.int32)[:, None], n, dendrites)


def chain(ptr: Any) -> Connectivity:
    """Row p sees the consecutive inputs ptr[p] to ptr[p + 1] - 1: a level of a tree.

    Every input feeds one row; each row is a dendrite and a soma.

    Args:
        ptr: [rows + 1] integers from 0 to the number of inputs, not decreasing.

    Returns:
        Connectivity of ptr[-1] inputs and as many synapses.

    Raises:
        TypeError, ValueError: not such a pointer, or one of no inputs.

    Source: docs/trees.md.
    """
    pointer = integers("ptr", ptr)
    inputs = check_size("the end of ptr", pointer[-1] if pointer.size else 0)
    pointer = pointer_array("ptr", pointer, "row", inputs, "number of inputs")
    return Connectivity.from_csr(pointer, np.arange(inputs, dtype=np.int32), inputs)


def pseudo_image(features: int) -> tuple[int, int]:
    """The (H, W) image that the somas of a layer form for receptive fields in the next one.

    The middle pair of divisors, the larger first: 32 -> (8, 4), 256 -> (16, 16), 7 -> (7, 1).

    Raises:
        ValueError: `features` is not positive.

    Source: the paper's networks of two and three dendrosomatic layers.
    """
    features = check_size("features", features)
    width = next(w for w in range(math.isqrt(features), 0, -1) if features % w == 0)
    return features // width, width


def _check_layer(
    somas: int, dendrites: int, synapses: int, limit: int, limit_name: str, channels: int = 1
) -> tuple[int, int]:
    """R and K of a layer whose dendrites pick K of `limit` places."""
    rows = check_size("somas", somas) * check_size("dendrites", dendrites)
    k = check_size("synapses", synapses)
    if k > limit:
        raise ValueError(f"Expected synapses <= {limit}, {limit_name}, got {k}")
    if rows * k * channels >= SIZE_LIMIT:
        raise ValueError(f"Expected fewer than 2**31 synapses, got {rows * k * channels}")
    return rows, k


def _check_image(in_shape: Sequence[int], channels: int) -> tuple[int, int, int]:
    if not isinstance(in_shape, Iterable):
        raise TypeError(f"Expected in_shape (H, W), got {in_shape!r}")
    sizes = [check_size("every size in in_shape", size) for size in in_shape]
    if len(sizes) != 2:
        raise ValueError(f"Expected in_shape (H, W), got {tuple(sizes)}")
    channels = check_size("channels", channels)
    check_size("height * width * channels", sizes[0] * sizes[1] * channels)
    return sizes[0], sizes[1], channels


def _constant(
    columns: Array,
    in_features: int,
    dendrites: int,
    in_shape: Sequence[int] | None = None,
    channels_first: bool = False,
) -> Connectivity:
    """Connectivity of [R, K] sorted columns."""
    rows, k = columns.shape
    pattern = np.arange(0, rows * k + 1, k), columns.ravel(), in_features
    return Connectivity.from_csr(*pattern, None, dendrites, in_shape, channels_first)


def _distinct(rng: np.random.Generator, n: int, rows: int, k: int) -> Array:
    """[R, K] sorted columns: in each row a uniform sample of K of N without replacement."""
    columns = np.empty((rows, k), np.int32)
    by_rejection = k * k <= n  # at least 6 of 10 rows then have no duplicate at the first draw
    step = max(1, _CHUNK // (k if by_rejection else n))
    for start in range(0, rows, step):
        part = columns[start : start + step]
        if by_rejection:
            wrong = np.arange(len(part))
            while wrong.size:
                drawn = rng.integers(n, size=(wrong.size, k), dtype=np.int32)
                drawn.sort(axis=1)
                part[wrong] = drawn
                wrong = wrong[(drawn[:, 1:] == drawn[:, :-1]).any(axis=1)]
        else:
            inputs = np.broadcast_to(np.arange(n, dtype=np.int32), (len(part), n))
            part[:] = rng.permuted(inputs, axis=1)[:, :k]
            part.sort(axis=1)
    return columns


def _around(rng: np.random.Generator, centres: Array, shape: tuple[int, int], count: int) -> Array:
    """`count` distinct pixels around each of `centres` [n], sorted: [n, count].

    The 3 x 3 block and Chebyshev rings 2, 3, ... clamped to the image, whole while they fit, and a
    uniform sample of the first that does not. Pixels are row * W + column.
    """
    height, width = shape
    radius = 1  # that a centre in a corner, the worst place, needs
    while min(radius + 1, height) * min(radius + 1, width) < count:
        radius += 1
    ys, xs = min(radius, height - 1), min(radius, width - 1)
    dy, dx = (grid.ravel() for grid in np.mgrid[-ys : ys + 1, -xs : xs + 1])  # [window]
    ring = np.maximum(np.maximum(abs(dy), abs(dx)), 1)  # [window], the 3 x 3 block is ring 1
    pixels = np.empty((centres.size, count), np.int32)
    step = max(1, _CHUNK // ring.size)
    for start in range(0, centres.size, step):
        centre = centres[start : start + step, None]
        y, x = centre // width + dy, centre % width + dx  # [n, window]
        # Ring by ring, and in random order within a ring.
        order = ring + rng.random(y.shape)
        order[(y < 0) | (y >= height) | (x < 0) | (x >= width)] = np.inf
        chosen = np.argpartition(order, count - 1, axis=1)[:, :count]
        found = np.take_along_axis(y * width + x, chosen, axis=1)
        pixels[start : start + step] = np.sort(found, axis=1)
    return pixels


def _tiled(
    fields: Array, shape: tuple[int, int], channels: int, channels_first: bool, dendrites: int
) -> Connectivity:
    """Connectivity of [R, K] sorted pixels, each pixel seen in every channel."""
    rows, pixels = len(fields), shape[0] * shape[1]
    channel = np.arange(channels, dtype=np.int32)
    if channels == 1:
        columns = fields
    elif channels_first:
        columns = fields[:, None, :] + channel[:, None] * np.int32(pixels)  # [R, C, K]
    else:
        columns = fields[:, :, None] * np.int32(channels) + channel  # [R, K, C]
    image = image_of(shape, channels, channels_first)
    return _constant(columns.reshape(rows, -1), pixels * channels, dendrites, *image)
