"""Several networks as one, behind `Connectivity.stack`, `block_diagonal` and `grow`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from ._pattern import synapses_of
from ._validate import Array
from .labels import Names, chained, common

if TYPE_CHECKING:
    from .structure import Connectivity


def stack(networks: Iterable[Connectivity], kind: type[Connectivity]) -> Connectivity:
    """See `Connectivity.stack`."""
    parts = _checked(networks, kind)
    sizes = [part.in_features for part in parts]
    if len(set(sizes)) > 1:
        raise ValueError(f"Expected networks with the same in_features, got {sizes}")
    images = {(part.in_shape, part.channels_first) for part in parts}
    image = images.pop() if len(images) == 1 else (None, False)
    inputs = common(_names(parts, "inputs"))
    return kind(*_arrays(parts, [0] * len(parts)), sizes[0], *image, _labels(parts, inputs))


def block_diagonal(networks: Iterable[Connectivity], kind: type[Connectivity]) -> Connectivity:
    """See `Connectivity.block_diagonal`."""
    parts = _checked(networks, kind)
    ends = np.cumsum([part.in_features for part in parts], dtype=np.int64).tolist()
    labels = _labels(parts, chained(_names(parts, "inputs")))
    return kind(*_arrays(parts, [0, *ends[:-1]]), ends[-1], labels=labels)


def grow(c: Connectivity, new: Connectivity) -> Connectivity:
    """See `Connectivity.grow`."""
    kind = type(c)
    _checked([new], kind)
    sizes = [(part.in_features, part.num_somas) for part in (c, new)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"Expected dendrites of {sizes[0][1]} somas on {sizes[0][0]} inputs, "
            f"got {sizes[1][1]} on {sizes[1][0]}"
        )
    images = {(part.in_shape, part.channels_first) for part in (c, new) if part.in_shape}
    if len(images) > 1:
        raise ValueError(f"Expected dendrites on images {c.in_shape}, got {new.in_shape}")
    is_new = np.zeros(c.num_dendrites + new.num_dendrites, np.bool_)
    is_new[new_rows(c, new)] = True
    order = np.empty(is_new.size, np.int64)  # of dendrites, those of `new` numbered after all of c
    order[~is_new] = np.arange(c.num_dendrites)
    order[is_new] = np.arange(new.num_dendrites) + c.num_dendrites
    crow, columns, _ = _arrays([c, new], [0, 0])
    names, old = chained(_names([c, new], "dendrites")), c.labels
    return kind(
        np.concatenate([[0], np.cumsum(np.diff(crow)[order])]),
        columns[synapses_of(crow, order)],
        c.soma_ptr.numpy().astype(np.int64) + new.soma_ptr.numpy(),
        *(c.in_features, c.in_shape, c.channels_first),
        (old and old.inputs, names and [names[i] for i in order], old and old.somas),
    )


def new_rows(c: Connectivity, new: Connectivity) -> Array:
    """Where `c.grow(new)` has the dendrites of `new`, int64."""
    ends = c.soma_ptr.numpy()[1:].repeat(np.diff(new.soma_ptr.numpy()))
    rows: Array = ends + np.arange(new.num_dendrites, dtype=np.int64)
    return rows


def _checked(networks: Iterable[Connectivity], kind: type[Connectivity]) -> list[Connectivity]:
    parts = list(networks)
    if not parts:
        raise ValueError("Expected at least one Connectivity, got none")
    for part in parts:
        if not isinstance(part, kind):
            raise TypeError(f"Expected Connectivity objects, got {type(part).__name__}")
    return parts


def _names(parts: list[Connectivity], kind: str) -> list[Names | None]:
    return [getattr(part.labels, kind, None) for part in parts]


def _labels(parts: list[Connectivity], inputs: Names | None) -> tuple[Names | None, ...]:
    return inputs, chained(_names(parts, "dendrites")), chained(_names(parts, "somas"))


def _arrays(parts: list[Connectivity], offsets: list[int]) -> tuple[Array, Array, Array]:
    """crow_indices, col_indices and soma_ptr of all parts, columns moved by the part's offset."""

    def chain(name: str) -> Array:
        steps: list[Any] = [np.diff(getattr(part, name).numpy()) for part in parts]
        return np.cumsum(np.concatenate([[0], *steps]), dtype=np.int64)

    columns = [part.col_indices.numpy() for part in parts]
    moved = [c + np.int64(offset) for c, offset in zip(columns, offsets, strict=True)]
    return chain("crow_indices"), np.concatenate(moved), chain("soma_ptr")
