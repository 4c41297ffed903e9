"""Connectivity: what it takes, keeps and gives back, against naive loops and scipy."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch

import dendrite_kernels as dk
from dendrite_kernels.structure import Connectivity

Array = np.ndarray[Any, np.dtype[Any]]


def from_mask(rows: int, inputs: int, density: float, seed: int = 0) -> Connectivity:
    rng = np.random.default_rng(seed)
    return Connectivity.from_mask(rng.random((rows, inputs)) < density)


def small() -> Connectivity:
    """3 dendrites (one empty) over 4 inputs, in 2 somas."""
    return Connectivity.from_csr([0, 2, 2, 5], [1, 3, 0, 1, 2], 4, soma_ptr=[0, 1, 3])


# Construction


def test_attributes() -> None:
    c = Connectivity.from_csr([0, 2, 4, 6, 8], [0, 2, 1, 2, 0, 1, 3, 5], 6, dendrites_per_soma=2)
    assert (c.in_features, c.num_dendrites, c.num_somas, c.nnz) == (6, 4, 2, 8)
    assert c.density == 8 / 24
    assert (c.fan_in, c.dendrites_per_soma, c.in_shape, c.is_dense) == (2, 2, None, False)
    assert c.soma_ptr.tolist() == [0, 2, 4]
    for tensor in (c.crow_indices, c.col_indices, c.soma_ptr):
        assert tensor.dtype == torch.int32
        assert tensor.is_contiguous()
        assert tensor.device.type == "cpu"


def test_attributes_that_vary() -> None:
    c = small()
    assert c.fan_in is None
    assert c.dendrites_per_soma is None
    assert Connectivity.from_mask(np.ones((2, 3), bool)).is_dense
    empty = Connectivity.from_csr([0, 0], [], 1)
    assert (empty.nnz, empty.fan_in, empty.density, empty.is_dense) == (0, 0, 0.0, False)
    somas_without_dendrites = Connectivity.from_csr([0, 1], [0], 1, soma_ptr=[0, 0, 1, 1])
    assert somas_without_dendrites.num_somas == 3
    assert Connectivity.from_csr([0, 1, 1], [0], 1).dendrites_per_soma == 1


@pytest.mark.parametrize(
    "kind",
    [
        list,
        lambda v: np.array(v, np.int64),
        lambda v: np.array(v, np.uint64),
        lambda v: np.array(v, np.int8),
        lambda v: torch.tensor(v, dtype=torch.int32),
        lambda v: np.repeat(np.array(v), 2)[::2],
    ],
)
def test_from_csr_accepts_any_integers(kind: Callable[[list[int]], Any]) -> None:
    arrays = [kind(v) for v in ([0, 2, 2, 5], [1, 3, 0, 1, 2], [0, 1, 3])]
    assert Connectivity.from_csr(arrays[0], arrays[1], 4, soma_ptr=arrays[2]) == small()


def test_inputs_are_copied() -> None:
    crow, col = np.array([0, 1, 2], np.int32), np.array([0, 1], np.int32)
    soma = torch.tensor([0, 2], dtype=torch.int32)
    c = Connectivity.from_csr(crow, torch.from_numpy(col), 2, soma_ptr=soma)
    crow[:], col[:], soma[:] = 7, 7, 7
    assert c == Connectivity.from_csr([0, 1, 2], [0, 1], 2, soma_ptr=[0, 2])


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"crow": []}, ValueError, r"crow_indices to have 2 .* entries, got 0"),
    ({"crow": [0]}, ValueError, r"crow_indices to have 2 .* entries, got 1"),
    ({"crow": [1, 2, 2, 5]}, ValueError, r"crow_indices to start at 0, got 1"),
    ({"crow": [0, 3, 2, 5]}, ValueError, r"crow_indices not to decrease, got 3 then 2 at row 1"),
    ({"crow": [0, 2, 2, 4]}, ValueError, r"end at the length of col_indices, 5, got 4"),
    ({"crow": [0, 2, 2, 2**32 + 5]}, ValueError, r"5, got 4294967301"),
    ({"crow": [[0, 2], [2, 5]]}, ValueError, r"one-dimensional, got shape \[2, 2\]"),
    ({"crow": [0.0, 2.0, 2.0, 5.0]}, TypeError, r"crow_indices of an integer type, got float64"),
    ({"col": [1, 3, 0, 1, 4]}, ValueError, r"columns in \[0, 4\), got 4 in row 2"),
    ({"col": [-1, 3, 0, 1, 2]}, ValueError, r"columns in \[0, 4\), got -1 in row 0"),
    ({"col": [1, 3, 0, 1, 2**32 + 2]}, ValueError, r"\[0, 4\), got 4294967298 in row 2"),
    ({"col": [1, 3, 0, 2, 1]}, ValueError, r"got 2 then 1 \(unsorted\) in row 2"),
    ({"col": [3, 3, 0, 1, 2]}, ValueError, r"got 3 then 3 \(a duplicate\) in row 0"),
    ({"col": [True, False, True, True, True]}, TypeError, r"integer type, got bool"),
    ({"col": torch.ones(5)}, TypeError, r"col_indices of an integer type, got float32"),
    ({"in_features": 0}, ValueError, r"in_features from 1 to 2\*\*31 - 1, got 0"),
    ({"in_features": -3}, ValueError, r"got -3"),
    ({"in_features": 2**31}, ValueError, r"got 2147483648"),
    ({"in_features": 4.0}, TypeError, r"in_features to be an integer, got 4.0"),
    ({"in_features": True}, TypeError, r"in_features to be an integer, got True"),
    ({"soma_ptr": [0, 2]}, ValueError, r"soma_ptr to end at the number of dendrites, 3, got 2"),
    ({"soma_ptr": [0, 2, 1, 3]}, ValueError, r"soma_ptr not to decrease, got 2 then 1 at soma 1"),
    ({"soma_ptr": [3]}, ValueError, r"soma_ptr to have 2 .* entries, got 1"),
    ({"dendrites_per_soma": 2}, ValueError, r"dendrites_per_soma to divide 3 dendrites, got 2"),
    ({"dendrites_per_soma": 0}, ValueError, r"dendrites_per_soma from 1 .* got 0"),
    ({"soma_ptr": [0, 3], "dendrites_per_soma": 3}, ValueError, r"got both"),
    ({"in_shape": (2, 3)}, ValueError, r"product 4, got \(2, 3\)"),
    ({"in_shape": (4,)}, ValueError, r"in_shape \(H, W\) or \(H, W, C\) .* got \(4,\)"),
    ({"in_shape": (-2, -2)}, ValueError, r"in_shape from 1 .* got -2"),
    (
        {"in_shape": (2, 2), "channels_first": True}, ValueError,
        r"in_shape \(C, H, W\) with product 4, got \(2, 2\)",
    ),
    ({"channels_first": True}, ValueError, r"in_shape \(C, H, W\) with channels_first, got None"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good: dict[str, Any] = {"crow": [0, 2, 2, 5], "col": [1, 3, 0, 1, 2], "in_features": 4}
    Connectivity.from_csr(**good)
    with pytest.raises(error, match=f"Expected .*{message}"):
        Connectivity.from_csr(**(good | change))


def test_row_boundaries_may_fall_anywhere() -> None:
    # Empty rows first, between and last must not hide or invent an unsorted pair.
    c = Connectivity.from_csr([0, 0, 1, 1, 1, 3, 3], [5, 0, 5], 6)
    assert c.to_mask().sum(1).tolist() == [0, 1, 0, 0, 2, 0]
    with pytest.raises(ValueError, match="got 5 then 0 \\(unsorted\\) in row 4"):
        Connectivity.from_csr([0, 0, 0, 0, 0, 3, 3], [4, 5, 0], 6)


def test_immutable() -> None:
    c = small()
    with pytest.raises(AttributeError, match="immutable"):
        c.nnz = 3
    with pytest.raises(AttributeError, match="immutable"):
        c.something_new = 3
    with pytest.raises(AttributeError, match="immutable"):
        del c.nnz
    assert c.nnz == 5


# Other formats


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
    with pytest.raises(ValueError, match=r"got 1 then 1 \(a duplicate\) in row 0"):
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
    with pytest.raises(ValueError, match="duplicate"):
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
    with pytest.raises(ValueError, match=r"got 0 then 0 \(a duplicate\) in row 0"):
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


# Value semantics


def test_equality_and_hash() -> None:
    a = small()
    assert a == small()
    assert hash(a) == hash(small())
    assert len({a, small()}) == 1
    different = [
        Connectivity.from_csr([0, 2, 2, 5], [1, 3, 0, 1, 2], 5, soma_ptr=[0, 1, 3]),
        Connectivity.from_csr([0, 2, 2, 5], [1, 3, 0, 1, 2], 4, soma_ptr=[0, 2, 3]),
        Connectivity.from_csr([0, 2, 2, 5], [1, 3, 0, 1, 3], 4, soma_ptr=[0, 1, 3]),
        Connectivity.from_csr([0, 2, 3, 5], [1, 3, 0, 1, 2], 4, soma_ptr=[0, 1, 3]),
        Connectivity.from_csr([0, 2, 2, 5, 5], [1, 3, 0, 1, 2], 4, soma_ptr=[0, 1, 4]),
    ]
    for other in different:
        assert a != other
        assert hash(a) != hash(other)
    assert a != "a"
    shaped = Connectivity.from_csr([0, 2, 2, 5], [1, 3, 0, 1, 2], 4, [0, 1, 3], in_shape=(2, 2))
    assert a == shaped  # in_shape is an annotation
    assert hash(a) == hash(shaped)


def test_digest_is_the_same_in_every_process() -> None:
    assert small().digest == "4a12dc24987667ab83401b555e695394"


def test_copies_share_the_object() -> None:
    c = small()
    assert copy.copy(c) is c
    assert copy.deepcopy({"a": [c]})["a"][0] is c


def test_torch_loads_it_with_weights_only() -> None:
    c = Connectivity.from_csr([0, 1], [5], 12, in_shape=(3, 2, 2), channels_first=True)
    file = io.BytesIO()
    torch.save({"hyper_parameters": {"connectivity": c}}, file)
    file.seek(0)
    back = torch.load(file, weights_only=True)["hyper_parameters"]["connectivity"]
    assert back == c
    assert (back.in_shape, back.channels_first) == (c.in_shape, True)


def test_index_tensors_of_a_used_layer_can_be_pickled() -> None:
    """Backends mark them; the mark stays behind."""
    c = Connectivity.from_csr([0, 1, 2], [5, 0], 12, dendrites_per_soma=1)
    layer = dk.DendriticLayer(c)
    layer(torch.randn(3, 12)).sum().backward()
    file = io.BytesIO()
    torch.save(c.col_indices, file)
    file.seek(0)
    for back in (
        torch.load(file, weights_only=True),
        pickle.loads(pickle.dumps(c.col_indices)),
        copy.deepcopy(c.col_indices),
    ):
        assert torch.equal(back, c.col_indices)
        twin = Connectivity(c.crow_indices, back, c.soma_ptr, 12)
        assert torch.equal(dk.SparseLinear(twin).connectivity.col_indices, back)


def test_index_tensors_are_ordinary_under_inference_mode(tmp_path: Path) -> None:
    """Others may not be saved for backward, in a training that comes later."""
    path = tmp_path / "c"
    with torch.inference_mode():
        c = Connectivity.from_csr([0, 2, 3], [0, 1, 1], 2)
        c.save(path)
        back = Connectivity.load(path)
    for each in (c, back, pickle.loads(pickle.dumps(c))):
        tensors = each.crow_indices, each.col_indices, each.soma_ptr
        assert not any(t.is_inference() for t in tensors)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickle(protocol: int) -> None:
    c = Connectivity.from_csr([0, 2, 4], [0, 2, 1, 3], 4, dendrites_per_soma=2, in_shape=(2, 2))
    fresh = len(pickle.dumps(c, protocol))
    c.cached("big", lambda: np.zeros(10_000))
    assert c.transposed is c.transposed
    data = pickle.dumps(c, protocol)
    assert len(data) == fresh  # caches stay behind
    back = pickle.loads(data)
    assert back == c
    assert back is not c
    assert back.in_shape == (2, 2)
    assert back.cached("big", lambda: 3) == 3
    assert np.array_equal(back.transposed.slot, c.transposed.slot)


def test_repr() -> None:
    text = repr(Connectivity.from_csr([0, 2, 4], [0, 2, 1, 3], 4, in_shape=(2, 2)))
    for part in ("in_features=4", "num_dendrites=2", "nnz=4", "fan_in=2", "in_shape=(2, 2))"):
        assert part in text
    assert "density=0.5" in text


# Cache


def test_cached_runs_the_factory_once_across_threads() -> None:
    c = small()
    calls: list[int] = []
    start = threading.Barrier(8)

    def factory() -> object:
        calls.append(1)
        time.sleep(0.02)
        return object()

    def ask(_: int) -> object:
        start.wait()
        return c.cached(("device", 0), factory)

    with ThreadPoolExecutor(8) as pool:
        values = set(pool.map(ask, range(8)))
    assert len(calls) == 1
    assert len(values) == 1


def test_cached_keys_objects_and_failures() -> None:
    c = small()
    assert c.cached("outer", lambda: c.cached("inner", lambda: 1) + 1) == 2
    assert c.cached("inner", lambda: 5) == 1
    assert c.cached("none", lambda: None) is None
    with pytest.raises(RuntimeError, match="once"):
        c.cached("failing", lambda: (_ for _ in ()).throw(RuntimeError("once")))
    assert c.cached("failing", lambda: "then fine") == "then fine"
    assert small().cached("inner", lambda: 7) == 7


@pytest.mark.parametrize(("inputs", "dtype"), [(65536, np.uint16), (65537, np.int32)])
def test_columns(inputs: int, dtype: type) -> None:
    c = Connectivity.from_csr([0, 2], [0, inputs - 1], inputs)
    assert c.columns.dtype == dtype
    assert c.columns.tolist() == [0, inputs - 1]
    assert c.columns is c.columns
    with pytest.raises(ValueError, match="read-only"):
        c.columns[0] = 1


# Files


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "network.bin"  # exactly this name, no .npz added
    for c in (
        Connectivity.from_csr([0, 2, 2, 5], [1, 3, 0, 1, 2], 4, [0, 0, 3], in_shape=(2, 2, 1)),
        Connectivity.from_csr([0, 0], [], 1),
        Connectivity.from_csr([0, 1], [70_000], 70_001),
        Connectivity.from_csr([0, 1], [5], 12, in_shape=(3, 2, 2), channels_first=True),
    ):
        c.save(path)  # replaces what is there
        back = Connectivity.load(str(path))
        assert back == c
        assert (back.in_shape, back.channels_first) == (c.in_shape, c.channels_first)
        assert [p.name for p in tmp_path.iterdir()] == ["network.bin"]


def test_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.npz"
    small().save(path)

    def full_disk(file: Any, **arrays: Any) -> None:
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(OSError, match="no space"):
        from_mask(3, 3, 1).save(path)
    assert Connectivity.load(path) == small()
    assert len(list(tmp_path.iterdir())) == 1


def test_load_rejects_other_files(tmp_path: Path) -> None:
    path = tmp_path / "c.npz"
    small().save(path)
    saved = path.read_bytes()
    good = dict(np.load(path))

    def rejected(message: str) -> None:
        with pytest.raises(ValueError, match=f"(?s)written by Connectivity.save, got .*{message}"):
            Connectivity.load(path)

    def write(**change: Any) -> None:
        np.savez(path, **(good | change))

    path.write_bytes(b"")
    rejected("")
    path.write_text("plain text")
    rejected("")
    path.write_bytes(saved[: len(saved) // 2])
    rejected("")
    path.write_bytes(saved.replace(good["col_indices"].tobytes(), b"\1" * 10))
    rejected("CRC")
    with open(path, "wb") as file:
        np.save(file, np.arange(3))
    rejected("")
    np.savez(path, weight=np.zeros(3))
    rejected("format")
    write(version=2)
    rejected("version 2")
    write(format="something.else")
    rejected("something.else")
    write(crow_indices=np.array([{"a": 1}], object))
    rejected("allow_pickle")
    write(col_indices=np.array([1, 3, 0, 1, 9]))
    rejected(r"columns in \[0, 4\), got 9 in row 2")
    np.savez(path, **{name: array for name, array in good.items() if name != "soma_ptr"})
    rejected("soma_ptr")
    path.write_bytes(saved)
    assert Connectivity.load(path) == small()
    path.unlink()
    with pytest.raises(FileNotFoundError):
        Connectivity.load(path)
