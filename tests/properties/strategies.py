"""Random networks, numbers, shapes and layouts in memory.

Hypothesis chooses sizes and kinds, and one seed for each set of numbers: it is quick, and a
failure shrinks to small sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from dendrite_kernels import Connectivity, connectivity

Draw = Callable[[st.SearchStrategy[Any]], Any]
Lead = tuple[int, ...]

generators = st.integers(0, 2**32 - 1).map(np.random.default_rng)
# Kernels have tiles of 16 to 128 samples and words of 32 sign bits.
batches = st.sampled_from([0, 1, 1, 1, 2, 3, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 129, 257])
leads = st.one_of(
    batches.map(lambda b: (b,)),
    batches.map(lambda b: (b,)),
    st.sampled_from([(), (2, 3), (3, 1, 5), (0, 4), (2, 0, 3), (1, 1), (33, 2)]),
)
rows = st.one_of(st.integers(1, 12), st.sampled_from([16, 33, 64, 90]))
FLOATS = torch.float32, torch.float64, torch.bfloat16, torch.float16
dtypes = st.sampled_from([torch.float32, torch.float32, *FLOATS])
layouts = st.sampled_from(["plain", "plain", "transposed", "spread", "odd", "sliced", "expanded"])
slopes = st.sampled_from([0.1, 0.0, 0.25, 0.5, 1.0, 2.0])
activations = st.sampled_from(
    ["leaky_relu"] * 6 + ["relu", "identity", "tanh", "sigmoid", "gelu", "silu", "elu"]
)


@st.composite
def soma_pointers(draw: Draw, count: int) -> list[int]:
    """From 0 to `count`, somas of any sizes, none too."""
    divisors = [d for d in range(1, count + 1) if count % d == 0]
    if draw(st.booleans()):
        return list(range(0, count + 1, draw(st.sampled_from(divisors))))
    cuts = draw(generators).integers(0, count + 1, draw(st.integers(0, 8)))
    return [0, *np.sort(cuts).tolist(), count]


@st.composite
def images(draw: Draw) -> tuple[tuple[int, ...], bool]:
    """in_shape and channels_first."""
    height, width = draw(st.tuples(st.integers(1, 8), st.integers(1, 8)))
    channels = draw(st.sampled_from([0, 0, 1, 3]))
    if not channels:
        return (height, width), False
    first = draw(st.booleans())
    return (channels, height, width) if first else (height, width, channels), first


@st.composite
def masks(draw: Draw, dendrites: int, inputs: int) -> np.ndarray[Any, Any]:
    """bool [R, N]: rows of any number of inputs, of one number, all, or none."""
    rng = draw(generators)
    kind = draw(st.sampled_from(["ragged", "constant", "mixed"] * 3 + ["dense", "none"]))
    if kind == "constant":  # some have kernels of their own
        k = draw(st.sampled_from([k for k in (1, 2, 3, 8, 16, 32, 48) if k <= inputs]))
        return _first(rng, np.full(dendrites, k), inputs)
    if kind == "mixed":  # short and long rows, empty ones between them
        counts = rng.choice([0, 1, min(5, inputs), inputs], dendrites)
        return _first(rng, counts, inputs)
    density = {"ragged": rng.choice([0.02, 0.2, 0.6]), "dense": 1.0, "none": 0.0}[kind]
    mask: np.ndarray[Any, Any] = rng.random((dendrites, inputs)) < density
    return mask


def _first(rng: np.random.Generator, counts: np.ndarray[Any, Any], n: int) -> np.ndarray[Any, Any]:
    order = rng.permuted(np.tile(np.arange(n), (counts.size, 1)), axis=1)
    taken: np.ndarray[Any, Any] = order < counts[:, None]
    return taken


@st.composite
def large_networks(draw: Draw) -> Connectivity:
    """What kernels treat differently: columns of int32, long rows, many rows, local fields."""
    kind = draw(st.sampled_from(["wide", "wide", "long rows", "fields", "many rows", "many rows"]))
    rng = draw(generators)
    if kind == "wide":
        inputs, dendrites = draw(
            st.tuples(st.sampled_from([65_536, 65_537, 70_000]), st.integers(1, 3))
        )
        mask = rng.random((dendrites, inputs)) < rng.choice([0.001, 0.3])
        return Connectivity.from_mask(mask, soma_ptr=draw(soma_pointers(dendrites)))
    if kind == "long rows":
        k, somas = draw(st.tuples(st.integers(120, 400), st.integers(1, 9)))
        return connectivity.random(400, somas, 3, k, constant_fan_in=draw(st.booleans()), seed=rng)
    if kind == "many rows":
        return connectivity.random(40, draw(st.integers(60, 140)), 18, 5, seed=rng)
    sizes = draw(st.tuples(st.integers(7, 12), st.integers(7, 12)))
    somas, dendrites, k = draw(
        st.tuples(st.integers(40, 160), st.integers(1, 4), st.integers(9, 20))
    )
    fields = draw(
        st.sampled_from([connectivity.local_receptive_fields, connectivity.global_receptive_fields])
    )
    first = draw(st.booleans())
    channels = draw(st.sampled_from([1, 1, 3]))
    return fields(sizes, somas, dendrites, k, channels=channels, channels_first=first, seed=rng)


@st.composite
def networks(
    draw: Draw, inputs: int | None = None, image: bool = False, large: bool = True
) -> Connectivity:
    """Of `inputs`, or any number; `image`: maybe with an in_shape; `large`: maybe a large one."""
    if large and inputs is None and draw(st.sampled_from([False] * 5 + [True])):
        return draw(large_networks())
    in_shape, first = None, False
    dendrites = draw(rows)
    if inputs is None and image and draw(st.booleans()):
        in_shape, first = draw(images())
        inputs = math.prod(in_shape)
    elif inputs is None:
        inputs = draw(st.integers(1, 70))
    return Connectivity.from_mask(
        draw(masks(dendrites, inputs)),
        soma_ptr=draw(soma_pointers(dendrites)),
        in_shape=in_shape,
        channels_first=first,
    )


def numbers(rng: np.random.Generator, whole: bool, *shape: int) -> Tensor:
    """float64: small whole ones, or normal ones between zeros, which make sums 0 exactly."""
    if whole:
        most = rng.choice([3, 3, 12])  # some sums are halfway between numbers of low precision
        return torch.from_numpy(rng.integers(-most, most + 1, shape)).double()
    kept = rng.random(shape) < 0.8
    return torch.from_numpy(np.asarray(rng.standard_normal(shape) * kept))


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The same numbers in other places, NaN around them; "expanded" repeats the first row."""
    if layout == "transposed" and t.dim() > 1:
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "spread":  # every other number
        return torch.stack([t, t + torch.nan], -1)[..., 0]
    if layout == "odd":  # no vector is aligned
        padded = t.new_full((t.numel() + 3,), torch.nan)
        padded[3:] = t.flatten()
        return padded[3:].reshape(t.shape)
    if layout == "sliced" and t.dim() > 0:  # rows with gaps, in a larger matrix
        padded = t.new_full((*t.shape[:-1], t.shape[-1] + 5), torch.nan)
        padded[..., 2:-3] = t
        return padded[..., 2:-3]
    if layout == "expanded" and t.dim() > 1 and t.shape[0]:
        return t[:1].expand_as(t)
    return t
