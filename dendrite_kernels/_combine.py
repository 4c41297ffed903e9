"""Several networks as one, behind `Connectivity.stack`, `block_diagonal` and `grow`."""

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
    owners = [np.diff(part.soma_ptr.numpy()) for part in (c, new)]
    somas = np.arange(c.num_somas)
    order = np.argsort(
        np.concatenate([np.repeat(somas, owned) for owned in owners]), kind="stable"
    )  # of dendrites, those of `new` after all of `c`
    crow, columns, _ = _arrays([c, new], [0, 0])
    counts = np.diff(crow)[order]
    ends = np.cumsum(counts)
    source = np.arange(columns.size) + np.repeat(crow[order] - (ends - counts), counts)
    names = chained(_names([c, new], "dendrites"))
    return kind(
        np.concatenate([[0], ends]),
        columns[source],
        np.cumsum(np.concatenate([[0], owners[0].astype(np.int64) + owners[1]])),
        c.in_features,
        c.in_shape,
        c.channels_first,
        (
            getattr(c.labels, "inputs", None),
            None if names is None else [names[i] for i in order],
            getattr(c.labels, "somas", None),
        ),
    )


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
