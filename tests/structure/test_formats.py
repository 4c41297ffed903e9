"""A Connectivity from and to scipy matrices and masks; several as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch

from dendrite_kernels.structure import Connectivity
from tests.networks import small

Array = np.ndarray[Any, np.dtype[Any]]


def from_mask(rows: int, inputs: int, density: float, seed: int = 0) -> Connectivity:
    rng = np.random.default_rng(seed)
    return Connectivity.from_mask(rng.random((rows, inputs)) < density)


@pytest.mark.parametrize("form", ["csr", "csc", "coo", "lil", "dok", "bsr"])
@pytest.mark.parametrize("kind", [scipy.sparse.csr_array, scipy.sparse.csr_matrix])
def test_scipy_round_trip(form: str, kind: Callable[..., Any]) -> None:
    mask = np.random.default_rng(1).random((12, 7)) < 0.3
    m = kind(mask * 2.5).asformat(form)
    c = Connectivity.from_scipy(m, dendrites_per_soma=3)
    expected = mask
    if form == "bsr":  # stores whole blocks, zeros too
        csr = m.tocsr()
        expected = scipy.sparse.csr_array((np.ones(m.nnz), csr.indices, csr.indptr), mask.shape)
        expected = expected.toarray() != 0
    assert np.array_equal(c.to_mask().numpy(), expected)
    assert c.num_somas == 4
    back = c.to_scipy()
    assert back.dtype == np.float32
    assert np.array_equal(back.toarray(), expected.astype(np.float32))
    assert Connectivity.from_scipy(back, dendrites_per_soma=3) == c


def test_to_scipy_values() -> None:
    c = small()
    weight = torch.arange(5.0, dtype=torch.float64, requires_grad=True)
    expected = [[0, 0, 0, 1], [0, 0, 0, 0], [2, 3, 4, 0]]
    m = c.to_scipy(weight)
    assert m.toarray().tolist() == expected
    m.data[:], m.indices[:], m.indptr[:] = 9, 0, 0  # belongs to the caller
    assert c == small()
    assert weight[1] == 1
    with pytest.raises(ValueError, match=r"Expected data of shape \[5\], got \[4\]"):
        c.to_scipy(np.zeros(4))


def test_from_scipy_keeps_stored_zeros_and_sorts_a_copy() -> None:
    m = scipy.sparse.csr_array((np.array([1.0, 0.0, 2.0]), [3, 0, 1], [0, 2, 3]), shape=(2, 4))
    c = Connectivity.from_scipy(m)
    assert c.col_indices.tolist() == [0, 3, 1]
    assert m.indices.tolist() == [3, 0, 1]
    assert m.data.tolist() == [1, 0, 2]


def test_from_scipy_errors() -> None:
    twice = scipy.sparse.coo_array((np.ones(3), ([0, 1, 1], [2, 0, 0])), shape=(2, 3))
    with pytest.raises(ValueError, match="Expected no duplicate entries, got 1"):
        Connectivity.from_scipy(twice)
    assert twice.nnz == 3
    twice_csr = scipy.sparse.csr_array((np.ones(2), [1, 1], [0, 2]), shape=(1, 3))
    with pytest.raises(ValueError, match="got 1: duplicates="):
        Connectivity.from_scipy(twice_csr)
    with pytest.raises(TypeError, match=r"Expected a scipy.sparse matrix, got ndarray"):
        Connectivity.from_scipy(np.ones((2, 2)))
    with pytest.raises(ValueError, match="Expected duplicates='refuse' or 'sum', got 'first'"):
        Connectivity.from_scipy(twice, duplicates="first")  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["coo", "csr", "csc"])
def test_from_scipy_sums_duplicates(form: str) -> None:
    once = scipy.sparse.coo_array((np.ones(4), ([0, 1, 1, 1], [2, 3, 0, 3])), shape=(2, 4))
    rows, values, pointer = [2, 3, 0, 3], np.ones(4), [0, 1, 4]
    m = {
        "coo": once,
        "csr": scipy.sparse.csr_array((values, rows, pointer), shape=(2, 4)),
        "csc": scipy.sparse.csc_array((values, [1, 0, 1, 1], [0, 1, 1, 2, 4]), shape=(2, 4)),
    }[form]
    c = Connectivity.from_scipy(m, duplicates="sum")
    assert c == Connectivity.from_csr([0, 1, 3], [2, 0, 3], 4)
    assert m.nnz == 4  # as it was
    with pytest.raises(ValueError, match='got 1: duplicates="sum" makes one'):
        Connectivity.from_scipy(m)


@pytest.mark.parametrize("form", ["coo", "csr", "csc", "lil", "dok"])
def test_from_scipy_and_from_edges_agree_on_zeros_and_duplicates(form: str) -> None:
    row, column, weight = [0, 0, 0, 1, 1], [2, 0, 2, 1, 0], [1.0, 0.0, -1.0, 0.0, 3.0]
    m = scipy.sparse.coo_array((weight, (row, column)), shape=(2, 4)).asformat(form)
    if form == "coo":
        with pytest.raises(ValueError, match="Expected no duplicate entries, got 1"):
            Connectivity.from_scipy(m)
    with pytest.raises(ValueError, match="duplicates="):
        Connectivity.from_edges(column, row, weight=weight, inputs=4)
    edges, values = Connectivity.from_edges(column, row, None, weight, inputs=4, duplicates="sum")
    assert values.tolist() == [0, 0, 3, 0]  # what is 0, or cancels, stays a synapse
    assert Connectivity.from_scipy(m, duplicates="sum") == edges


def test_from_scipy_refuses_blocks_stored_twice() -> None:
    blocks = (np.ones((2, 1, 2)), [0, 0], [0, 2])
    m = scipy.sparse.bsr_array(blocks, shape=(1, 4))
    with pytest.raises(ValueError, match='got 2: duplicates="sum" makes one'):
        Connectivity.from_scipy(m)
    assert Connectivity.from_scipy(m, duplicates="sum").col_indices.tolist() == [0, 1]


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor, lambda m: m.tolist()])
@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (7, 2), (5, 300)])
def test_mask_round_trip(kind: Callable[[Array], Any], shape: tuple[int, int]) -> None:
    mask = np.random.default_rng(3).random(shape) < 0.4
    c = Connectivity.from_mask(kind(mask), soma_ptr=[0, shape[0]])
    assert torch.equal(c.to_mask(), torch.from_numpy(mask))
    assert c.num_somas == 1
    for row in range(shape[0]):
        begin, end = c.crow_indices[row : row + 2]
        assert c.col_indices[begin:end].tolist() == np.flatnonzero(mask[row]).tolist()


def test_from_mask_errors() -> None:
    with pytest.raises(TypeError, match="Expected a boolean mask, got dtype float32"):
        Connectivity.from_mask(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"shape \[R, N\], got shape \[4\]"):
        Connectivity.from_mask(np.ones(4, bool))
    with pytest.raises(ValueError, match="in_features from 1"):
        Connectivity.from_mask(np.ones((4, 0), bool))
    with pytest.raises(TypeError, match=r"values, got a torch\.sparse_coo tensor on cpu"):
        Connectivity.from_mask(torch.ones(2, 2, dtype=torch.bool).to_sparse())
    masked = np.ma.masked_array(np.ones((2, 3), bool), [[0, 0, 0], [0, 1, 0]])
    with pytest.raises(ValueError, match=r"no missing values, got .* masked at \[1, 1\]"):
        Connectivity.from_mask(masked)
    assert Connectivity.from_mask(masked[:1]).nnz == 3


def test_from_mask_refuses_a_transposed_mask() -> None:
    mask = np.ones((64, 784), bool)
    assert Connectivity.from_mask(mask, in_features=784).in_features == 784
    expected = (
        r"Expected a mask \[R, 784\], got \[784, 64\]: Keras kernels are \[inputs, outputs\], "
    )
    with pytest.raises(ValueError, match=f"^{expected}transpose it$"):
        Connectivity.from_mask(mask.T, in_features=784)
    with pytest.raises(ValueError, match=r"^Expected a mask \[R, 783\], got \[64, 784\]$"):
        Connectivity.from_mask(mask, in_features=783)
    with pytest.raises(TypeError, match=r"in_features to be an integer, got 784\.0"):
        Connectivity.from_mask(mask, in_features=784.0)  # type: ignore[arg-type]


def test_stack() -> None:
    a, b = small(), from_mask(6, 4, 0.5)
    c = Connectivity.stack([a, b, a])
    assert torch.equal(c.to_mask(), torch.cat([a.to_mask(), b.to_mask(), a.to_mask()]))
    assert c.soma_ptr.tolist() == [0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 12]
    assert Connectivity.stack([a]) == a
    with pytest.raises(ValueError, match=r"same in_features, got \[4, 5\]"):
        Connectivity.stack([a, from_mask(1, 5, 1)])
    with pytest.raises(ValueError, match="Expected at least one Connectivity"):
        Connectivity.stack([])
    with pytest.raises(TypeError, match="Expected Connectivity objects, got int"):
        Connectivity.stack([a, 3])  # type: ignore[list-item]


def test_stack_keeps_a_common_in_shape() -> None:
    a = Connectivity.from_csr([0, 1], [0], 4, in_shape=(2, 2))
    b = Connectivity.from_csr([0, 1], [0], 4, in_shape=(4, 1))
    assert Connectivity.stack([a, a]).in_shape == (2, 2)
    assert Connectivity.stack([a, b]).in_shape is None
    assert Connectivity.block_diagonal([a, a]).in_shape is None
    first = Connectivity.from_csr([0, 1], [0], 4, in_shape=(4, 1, 1), channels_first=True)
    last = Connectivity.from_csr([0, 1], [0], 4, in_shape=(4, 1, 1))
    assert Connectivity.stack([first, first]).channels_first
    assert Connectivity.stack([first, last]).in_shape is None


def test_block_diagonal() -> None:
    a, b = small(), from_mask(6, 5, 0.5)
    c = Connectivity.block_diagonal(iter([a, b]))
    expected = torch.zeros(9, 9, dtype=torch.bool)
    expected[:3, :4], expected[3:, 4:] = a.to_mask(), b.to_mask()
    assert torch.equal(c.to_mask(), expected)
    assert c.in_features == 9
    assert c.num_somas == 8
    with pytest.raises(ValueError, match="Expected at least one"):
        Connectivity.block_diagonal([])
