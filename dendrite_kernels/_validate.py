"""Checks of sizes and CSR arrays, vectorised; messages say what was expected and what came."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, Literal, SupportsIndex

import numpy as np
import torch
from torch._subclasses import FakeTensor

Array = np.ndarray[Any, np.dtype[Any]]
Duplicates = Literal["refuse", "sum"]

SIZE_LIMIT = 2**31  # every size and index must fit int32


def check_size(name: str, value: SupportsIndex) -> int:
    """`value` as an int if it is an integer from 1 to 2**31 - 1; else TypeError or ValueError."""
    if isinstance(value, bool):
        raise TypeError(f"Expected {name} to be an integer, got {value}")
    try:
        size = operator.index(value)
    except TypeError:
        raise TypeError(f"Expected {name} to be an integer, got {value!r}") from None
    if not 1 <= size < SIZE_LIMIT:
        raise ValueError(f"Expected {name} from 1 to 2**31 - 1, got {size}")
    return size


def image_of(
    shape: tuple[int, int], channels: int, channels_first: bool
) -> tuple[tuple[int, ...], bool]:
    """in_shape and channels_first of a Connectivity on such images; one channel has no place."""
    if channels == 1:
        return shape, False
    return ((channels, *shape) if channels_first else (*shape, channels)), channels_first


def as_numpy(values: Any) -> Array:
    """An array of the values; an error where some are missing."""
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        first = [int(i[0]) for i in np.ma.getmaskarray(values).nonzero()]
        raise ValueError(f"Expected no missing values, got a masked array, masked at {first}")
    if not isinstance(values, torch.Tensor):
        return np.asarray(values)
    if isinstance(values, FakeTensor) or values.is_meta or values.layout is not torch.strided:
        kind = "FakeTensor" if isinstance(values, FakeTensor) else f"tensor on {values.device}"
        raise TypeError(f"Expected a dense tensor with values, got a {values.layout} {kind}")
    try:
        array: Array = values.detach().cpu().numpy()
    except TypeError:
        raise TypeError(
            f"Expected a tensor of a dtype that numpy has, got {values.dtype}"
        ) from None
    return array


def integers(name: str, values: Any) -> Array:
    """A one-dimensional array of some integer type; no copy where none is needed."""
    array = as_numpy(values)
    if array.size == 0 and not hasattr(values, "dtype"):
        array = array.astype(np.int64)  # an empty list has no type of its own
    if array.dtype.kind not in "iu":
        raise TypeError(f"Expected {name} of an integer type, got {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"Expected {name} to be one-dimensional, got shape {list(array.shape)}")
    return array


def pointer_array(name: str, values: Any, item: str, end: int, end_name: str) -> Array:
    """An int32 copy of a valid pointer array."""
    pointer = integers(name, values)
    if not 2 <= pointer.size <= SIZE_LIMIT:
        raise ValueError(f"Expected {name} to have 2 to 2**31 entries, got {pointer.size}")
    if pointer[0] != 0:
        raise ValueError(f"Expected {name} to start at 0, got {pointer[0]}")
    falls = pointer[1:] < pointer[:-1]
    if falls.any():
        i = int(falls.argmax())
        raise ValueError(
            f"Expected {name} not to decrease, got {pointer[i]} then {pointer[i + 1]} at {item} {i}"
        )
    if pointer[-1] != end:
        raise ValueError(f"Expected {name} to end at the {end_name}, {end}, got {pointer[-1]}")
    return pointer.astype(np.int32)


def column_array(columns: Array, crow: Array, in_features: int) -> Array:
    """An int32 copy of valid column indices."""
    if columns.size == 0:
        return columns.astype(np.int32)
    if columns.min() < 0 or columns.max() >= in_features:
        i = int(((columns < 0) | (columns >= in_features)).argmax())
        row = int(np.searchsorted(crow, i, side="right")) - 1
        raise ValueError(f"Expected columns in [0, {in_features}), got {columns[i]} in row {row}")
    columns = columns.astype(np.int32)
    falls = columns[1:] <= columns[:-1]
    inner = crow[(crow > 0) & (crow < columns.size)]
    falls[inner - 1] = False  # a new row may start anywhere
    if falls.any():
        i = int(falls.argmax())
        row = int(np.searchsorted(crow, i, side="right")) - 1
        what = "a duplicate" if columns[i] == columns[i + 1] else "unsorted"
        raise ValueError(
            "Expected columns to increase strictly within a row, "
            f"got {columns[i]} then {columns[i + 1]} ({what}) in row {row}"
        )
    return columns


def constant_step(pointer: Array) -> int | None:
    step = int(pointer[1])
    return step if (np.diff(pointer) == step).all() else None


def image_shape(
    shape: Sequence[int] | None, in_features: int, channels_first: bool
) -> tuple[int, ...] | None:
    if shape is None:
        if channels_first:
            raise ValueError("Expected in_shape (C, H, W) with channels_first, got None")
        return None
    sizes = tuple(check_size("every size in in_shape", size) for size in shape)
    allowed = (3,) if channels_first else (2, 3)
    if len(sizes) not in allowed or math.prod(sizes) != in_features:
        expected = "(C, H, W)" if channels_first else "(H, W) or (H, W, C)"
        raise ValueError(f"Expected in_shape {expected} with product {in_features}, got {sizes}")
    return sizes


def soma_pointer(rows: int, soma_ptr: Any, dendrites_per_soma: SupportsIndex | None) -> Any:
    if soma_ptr is not None:
        if dendrites_per_soma is not None:
            raise ValueError("Expected soma_ptr or dendrites_per_soma, got both")
        return soma_ptr
    if rows >= SIZE_LIMIT:
        raise ValueError(f"Expected fewer than 2**31 dendrites, got {rows}")
    step = 1 if dendrites_per_soma is None else check_size("dendrites_per_soma", dendrites_per_soma)
    if rows % step:
        raise ValueError(f"Expected dendrites_per_soma to divide {rows} dendrites, got {step}")
    return np.arange(0, rows + 1, step)


def check_duplicates(value: object) -> None:
    if value not in ("refuse", "sum"):
        raise ValueError(f"Expected duplicates='refuse' or 'sum', got {value!r}")
