"""Connectivity: what it takes, keeps and gives back, against naive loops."""

from __future__ import annotations

import copy
import io
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dendrite_kernels as dk
from dendrite_kernels.structure import Connectivity
from tests.networks import small

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


def test_cached_keeps_what_a_signal_handler_made_meanwhile() -> None:
    """Numba's plans hold the addresses of cached arrays: one that is in use must not go."""
    c = small()
    inner: list[object] = []

    def factory() -> object:
        if not inner:
            inner.append(None)
            inner[0] = c.cached("key", factory)
        return object()

    assert c.cached("key", factory) is inner[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_cached_in_a_child_forked_while_another_thread_makes_a_value() -> None:
    c = small()
    begun, forked = threading.Event(), threading.Event()

    def factory() -> int:
        begun.set()
        forked.wait()
        return 1

    with ThreadPoolExecutor(1) as pool:
        value = pool.submit(c.cached, "key", factory)
        begun.wait()
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # ends a child that waits for the lock
            os._exit(c.cached("key", lambda: 7))
        forked.set()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert value.result() == 1


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


def test_files_of_earlier_states_load(tmp_path: Path) -> None:
    """As commit 557428a wrote them: without channels_first and labels."""
    path = tmp_path / "old.npz"
    np.savez(
        path,
        format=np.array("dendrite_kernels.Connectivity"),
        version=np.array(1),
        in_features=np.array(4),
        in_shape=np.array([2, 2], np.int64),
        crow_indices=np.array([0, 2, 2, 3], np.int32),
        col_indices=np.array([1, 3, 0], np.uint16),
        soma_ptr=np.array([0, 0, 3], np.int32),
    )
    back = Connectivity.load(path)
    assert back == Connectivity.from_csr([0, 2, 2, 3], [1, 3, 0], 4, [0, 0, 3])
    assert (back.in_shape, back.channels_first, back.labels) == ((2, 2), False, None)


def test_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.npz"
    small().save(path)

    def full_disk(file: Any, **arrays: Any) -> None:
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(OSError, match="no space"):
        Connectivity.from_mask(np.ones((3, 3), bool)).save(path)
    assert Connectivity.load(path) == small()
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        ("missing/c.npz", FileNotFoundError),
        ("file/c.npz", NotADirectoryError),
        ("folder", IsADirectoryError),
    ],
)
def test_errors_name_the_path_given(place: str, kind: type[OSError], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    path = tmp_path / place
    with pytest.raises(kind) as caught:
        small().save(path)
    assert (caught.value.filename, caught.value.filename2) == (str(path), None)
    assert len(list(tmp_path.iterdir())) == 2


def test_saving_writes_where_a_link_leads_and_keeps_permissions(tmp_path: Path) -> None:
    path, link = tmp_path / "c.npz", tmp_path / "link"
    small().save(path)
    path.chmod(0o640)
    link.symlink_to(path)
    other = Connectivity.from_mask(np.ones((3, 3), bool))
    other.save(link)
    assert link.is_symlink()
    assert Connectivity.load(path) == other
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(OSError, match="Expected a regular file, got another kind") as caught:
        small().save(path)
    assert caught.value.filename == str(path)
    assert path.is_fifo()


def test_names_may_be_as_long_as_the_system_takes(tmp_path: Path) -> None:
    path = tmp_path / ("c" * 250)
    small().save(path)
    assert Connectivity.load(path) == small()


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
    rejected("OBJECT")
    write(col_indices=np.array([1, 3, 0, 1, 9]))
    rejected(r"columns in \[0, 4\), got 9 in row 2")
    np.savez(path, **{name: array for name, array in good.items() if name != "soma_ptr"})
    rejected("soma_ptr")
    path.write_bytes(saved)
    assert Connectivity.load(path) == small()
    path.unlink()
    with pytest.raises(FileNotFoundError):
        Connectivity.load(path)
