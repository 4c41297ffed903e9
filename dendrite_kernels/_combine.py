"""Several networks as one, behind `Connectivity.stack` and `Connectivity.block_diagonal`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

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
