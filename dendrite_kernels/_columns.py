"""Columns of a table of edges: labels as numbers, weights with their dtype."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, ValuesView
from typing import Any, NamedTuple

import numpy as np
import torch

from ._validate import Array, as_numpy


class Column(NamedTuple):
    """Labels as numbers, which count the distinct ones in order of appearance."""

    names: list[Hashable]
    codes: Array  # [edges]


def numbered(name: str, values: Any) -> Column:
    """Labels of any kind as numbers; missing ones refused."""
    if isinstance(values, (str, bytes, set, frozenset)) or not isinstance(values, Iterable):
        raise TypeError(f"Expected {name} to be a sequence of labels, got {type(values).__name__}")
    if hasattr(values, "dtype"):
        values = as_numpy(values)  # a matrix of a struct of polars
    shape = getattr(values, "shape", (0,))
    if len(shape) != 1:
        raise ValueError(f"Expected {name} to be one-dimensional, got shape {list(shape)}")
    if isinstance(values, np.ndarray) and values.dtype.kind in "iufU":
        column = _numbered_array(values)
    else:
        try:
            column = _numbered_objects(list(values))
        except TypeError as error:
            raise TypeError(f"Expected hashable labels in {name}: {error}") from error
    for code, label in enumerate(column.names):
        if isinstance(label, torch.Tensor):  # equal ones would be different labels
            raise TypeError(f"Expected labels in {name}, got {label} among them: use tolist()")
        if _missing(label):
            row = int((column.codes == code).argmax())
            raise ValueError(f"Expected no missing value in {name}, got {label} in row {row}")
    return column


def _numbered_array(values: Array) -> Column:
    names, first, codes = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(first)
    return Column(names[order].tolist(), inverse(order)[codes])


def _numbered_objects(values: list[Any]) -> Column:
    code: defaultdict[Any, int] = defaultdict()
    code.default_factory = code.__len__  # of a new label
    codes = np.fromiter(map(code.__getitem__, values), np.int64, len(values))
    plain = (np.number, np.bool_, np.str_)
    return Column([label.item() if isinstance(label, plain) else label for label in code], codes)


def _missing(value: Any) -> bool:
    # pandas.NA compares as neither true nor false; NaN and NaT differ from themselves.
    return value is None or type(value).__name__ == "NAType" or bool(value != value)


def weights(values: Any) -> tuple[Array, torch.dtype]:
    """The weights [edges] and the dtype that they get."""
    if isinstance(values, torch.Tensor) and values.dtype in (torch.bfloat16, torch.float16):
        raise TypeError(f"Expected weight of float32, float64 or integers, got {values.dtype}")
    if isinstance(values, (Iterator, ValuesView)):  # numpy would take one for a single object
        values = list(values)
    array = as_numpy(values)
    if array.ndim != 1:
        raise ValueError(f"Expected weight to be one-dimensional, got shape {list(array.shape)}")
    missing = np.isnan(array) if array.dtype.kind == "f" else np.zeros(array.shape, np.bool_)
    if array.dtype.kind == "O":
        missing = np.array([_missing(value) for value in array], np.bool_)
    if missing.any():
        row = int(missing.argmax())
        raise ValueError(f"Expected no missing value in weight, got {array[row]} in row {row}")
    typed = hasattr(values, "dtype")
    if typed and array.dtype in (np.float32, np.float64):
        return array, torch.float32 if array.dtype == np.float32 else torch.float64
    if array.dtype.kind in "iu" or (array.dtype.kind == "f" and not typed):
        return array.astype(np.float64), torch.get_default_dtype()
    raise TypeError(f"Expected weight of float32, float64 or integers, got {array.dtype}")


def inverse(order: Array) -> Array:
    """inverse[order[i]] == i"""
    result = np.empty_like(order)
    result[order] = np.arange(order.size)
    return result
