"""Names of inputs, dendrites and somas, which a Connectivity may carry."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

Names = tuple[Hashable, ...]


class Labels(NamedTuple):
    """Each a tuple in the order of the Connectivity, or None where nothing is named."""

    inputs: Names | None = None
    dendrites: Names | None = None
    somas: Names | None = None


def checked(labels: Sequence[Any] | None, sizes: tuple[int, int, int]) -> Labels | None:
    """Labels of three sequences or Nones whose lengths are `sizes`; None if they name nothing."""
    if labels is None:
        return None
    result = Labels(*(None if names is None else _tuple(names) for names in labels))
    for field, names, size in zip(Labels._fields, result, sizes, strict=True):
        if names is not None and len(names) != size:
            raise ValueError(f"Expected labels of {size} {field}, got {len(names)}")
    return None if result == Labels() else result


def _tuple(names: Any) -> Names:
    return tuple(names.tolist() if hasattr(names, "tolist") else names)


def shortened(labels: Labels) -> str:
    """The first labels of each kind, for a repr."""
    return "; ".join(
        f"{field} {', '.join(map(reprlib.repr, names[:2]))}{', ...' if len(names) > 2 else ''}"
        for field, names in zip(Labels._fields, labels, strict=True)
        if names is not None
    )


def chained(names: Iterable[Names | None]) -> Names | None:
    """The names of several networks one after the other, None unless all have them."""
    result: list[Hashable] = []
    for each in names:
        if each is None:
            return None
        result.extend(each)
    return tuple(result)


def common(names: Iterable[Names | None]) -> Names | None:
    """The names that several networks agree on, else None."""
    different = set(names)
    return different.pop() if len(different) == 1 else None


def to_json(labels: Labels) -> str:
    """Labels as JSON, for those that JSON gives back unchanged: str and int.

    Raises:
        TypeError: a label is of another type.
    """
    for field, names in labels._asdict().items():
        for name in names or ():
            if type(name) not in (str, int):  # a bool is an int too
                kind = type(name).__name__
                raise TypeError(
                    f"Expected labels of type str or int to save, got {kind} in {field}: {name!r}"
                )
    return json.dumps(labels._asdict())


def from_json(text: str) -> Labels:
    """What `to_json` wrote."""
    labels = Labels(**json.loads(text))
    if not all(names is None or isinstance(names, list) for names in labels):
        raise TypeError("Expected lists of labels")
    to_json(labels)  # refuses labels of other types
    return labels
