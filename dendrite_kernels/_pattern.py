"""The pattern (crow, columns, N) of a scipy.sparse matrix or a mask, and the way back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np

from ._validate import SIZE_LIMIT, Array, Duplicates, as_numpy, check_duplicates, check_size

if TYPE_CHECKING:
    from .structure import Connectivity

Pattern = tuple[Array, Array, int]


def of_scipy(m: Any, duplicates: Duplicates) -> Pattern:
    """See `Connectivity.from_scipy`."""
    check_duplicates(duplicates)
    if not all(hasattr(m, name) for name in ("tocsr", "nnz", "format")):
        raise TypeError(
            f"Expected a scipy.sparse matrix, got {type(m).__name__} (from_mask takes arrays)"
        )
    if len(m.shape) != 2:
        raise ValueError(f"Expected a matrix of shape [R, N], got shape {list(m.shape)}")
    csr = m.tocsr()
    stored = m.nnz if m.format == "coo" else csr.nnz  # the conversion of COO sums duplicates
    if not csr.has_canonical_format:
        csr = csr.copy()
        csr.sum_duplicates()  # and sorts
    if duplicates == "refuse" and csr.nnz != stored:
        raise ValueError(
            f"Expected no duplicate entries, got {stored - csr.nnz}: "
            'duplicates="sum" makes one synapse of those in one place'
        )
    return csr.indptr, csr.indices, m.shape[1]


def of_mask(mask: Any, in_features: SupportsIndex | None) -> Pattern:
    """See `Connectivity.from_mask`."""
    array = as_numpy(mask)
    if array.dtype != np.bool_:
        raise TypeError(f"Expected a boolean mask, got dtype {array.dtype}")
    if array.ndim != 2:
        raise ValueError(f"Expected a mask of shape [R, N], got shape {list(array.shape)}")
    if in_features is not None:
        _check_inputs(array.shape, check_size("in_features", in_features))
    crow = np.zeros(array.shape[0] + 1, np.int64)
    np.cumsum(np.count_nonzero(array, axis=1), out=crow[1:])
    if crow[-1] >= SIZE_LIMIT:
        raise ValueError(f"Expected fewer than 2**31 synapses, got {crow[-1]}")
    return crow, np.nonzero(array)[1], array.shape[1]


def _check_inputs(shape: tuple[int, ...], in_features: int) -> None:
    rows, columns = shape
    if columns != in_features:
        hint = ": Keras kernels are [inputs, outputs], transpose it" if rows == in_features else ""
        raise ValueError(f"Expected a mask [R, {in_features}], got {list(shape)}{hint}")


def to_scipy(c: Connectivity, data: Any) -> Any:
    """See `Connectivity.to_scipy`."""
    try:
        from scipy.sparse import csr_array
    except ImportError as error:
        raise ImportError("to_scipy needs scipy: pip install 'dendrite-kernels[scipy]'") from error
    values = np.ones(c.nnz, np.float32) if data is None else np.array(as_numpy(data))
    if values.shape != (c.nnz,):
        raise ValueError(f"Expected data of shape [{c.nnz}], got {list(values.shape)}")
    col, crow = c.col_indices.numpy().copy(), c.crow_indices.numpy().copy()
    return csr_array((values, col, crow), shape=(c.num_dendrites, c.in_features))


def to_mask(c: Connectivity) -> Array:
    """See `Connectivity.to_mask`."""
    mask = np.zeros((c.num_dendrites, c.in_features), np.bool_)
    rows = np.repeat(np.arange(c.num_dendrites), np.diff(c.crow_indices.numpy()))
    mask[rows, c.col_indices.numpy()] = True
    return mask


def synapses_of(crow: Array, rows: Array) -> Array:
    """CSR positions of the synapses of `rows`, row after row: int64."""
    lengths = (crow[rows + 1] - crow[rows]).astype(np.int64)
    ends = np.cumsum(lengths)
    synapses: Array = np.arange(lengths.sum()) + np.repeat(crow[rows] - (ends - lengths), lengths)
    return synapses
