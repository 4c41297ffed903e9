"""Readers and loaders, against files written here and, where there are any, real ones."""

from __future__ import annotations

import gzip
import io
import itertools
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from bench.paper import datasets
from bench.paper.readers import CIFAR10_TEST, CIFAR10_TRAIN, read_cifar10, read_idx, read_jpeg_npz

Array = np.ndarray[Any, np.dtype[Any]]

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_real_data = [
    pytest.mark.realdata,
    pytest.mark.skipif(not REAL.is_dir(), reason="no ../shared/data beside the checkout"),
]


def images(n: int, *shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def labels(n: int, classes: int = 10) -> Array:
    return (np.arange(n) % classes).astype(np.uint8)


def idx(array: Array) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx_set(folder: Path, train: str, test: str, ending: str = "-idx{}-ubyte.gz") -> Array:
    """A set of 12 + 6 images of 4x3, returned as [18, 4, 3]."""
    folder.mkdir(parents=True, exist_ok=True)
    x, y = images(18, 4, 3), labels(18)
    for part, chosen in ((train, slice(12)), (test, slice(12, None))):
        for what, array in (("images", x[chosen]), ("labels", y[chosen])):
            name = f"{part}-{what}" + ending.format(array.ndim)
            content = idx(array)
            (folder / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    return x


def write_npz(path: Path, **changes: Array) -> dict[str, Array]:
    arrays = {
        "x_train": images(20, 5, 4),
        "y_train": labels(20),
        "x_test": images(10, 5, 4, seed=1),
        "y_test": labels(10),
    } | changes
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return arrays


class Python2Pickler(pickle._Pickler):  # the pickler in Python, whose parts can be replaced
    """Writes strings and bytes alike as Python 2's str, as the official batches have them."""

    def _save_str(self, value: str | bytes) -> None:
        raw = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)  # type: ignore[attr-defined]
        self.memoize(value)  # type: ignore[attr-defined]

    dispatch: ClassVar[dict[type, Any]] = pickle._Pickler.dispatch | {
        str: _save_str,
        bytes: _save_str,
    }


def python2_pickle(value: object) -> bytes:
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue().replace(b"numpy._core.", b"numpy.core.")


def python3_pickle(value: object) -> bytes:
    return pickle.dumps(value, protocol=4)


def write_cifar10(
    folder: Path, dump: Callable[[object], bytes] = python2_pickle
) -> tuple[Array, Array]:
    """Six batches of two images each; x [12, 3072] as stored (channel by channel), y [12]."""
    folder.mkdir(parents=True, exist_ok=True)
    x, y = images(12, 3072), labels(12)
    for i, name in enumerate((*CIFAR10_TRAIN, CIFAR10_TEST)):
        part = slice(2 * i, 2 * i + 2)
        batch = {b"batch_label": b"some", b"labels": y[part].tolist(), b"data": x[part]}
        (folder / name).write_bytes(dump(batch))
    return x, y


def test_digits_are_bundled_images_resized() -> None:
    data = datasets.load("digits")
    assert data.x_train.shape == (1442, 784)
    assert data.x_test.shape == (355, 784)
    assert (data.in_shape, data.channels, data.classes) == ((28, 28), 1, 10)
    assert data.x_train.min() == 0
    assert data.x_train.max() == 1
    assert "scikit-learn" in data.source
    assert "28x28" in data.source
    assert np.bincount(data.y_test).min() >= 34  # every class is tested


def test_digits_keep_their_picture() -> None:
    from sklearn.datasets import load_digits

    x = datasets.load("digits").x_test[0].reshape(4, 7, 4, 7).mean((1, 3))  # blocks of 7x7 pixels
    bundle = load_digits()
    fifth_zero = bundle.images[np.flatnonzero(bundle.target == 0)[4]] / 16
    original = fifth_zero.reshape(4, 2, 4, 2).mean((1, 3))  # the same blocks, of 2x2 pixels
    np.testing.assert_allclose(x, original, atol=0.1)


def test_npz(tmp_path: Path) -> None:
    arrays = write_npz(tmp_path / "own.npz")
    data = datasets.load("own", tmp_path)
    np.testing.assert_array_equal(data.x_train, arrays["x_train"].reshape(20, 20) / np.float32(255))
    np.testing.assert_array_equal(data.y_test, arrays["y_test"])
    assert data.x_train.dtype.name == "float32"
    assert data.y_train.dtype.name == "int64"
    assert (data.in_shape, data.channels, data.source) == ((5, 4), 1, "own.npz")


def test_npz_with_channels(tmp_path: Path) -> None:
    x = images(20, 5, 4, 3)
    write_npz(tmp_path / "own.npz", x_train=x, x_test=x[:10])
    data = datasets.load("own", tmp_path)
    assert (data.in_shape, data.channels, data.x_train.shape) == ((5, 4), 3, (20, 60))
    assert data.x_train[7, (2 * 4 + 3) * 3 + 1] == x[7, 2, 3, 1] / np.float32(255)  # channels last


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": images(20, 5, 4).astype(float)}, "got float64"),
        ({"x_train": images(20, 20)}, r"Expected uint8 images .* got uint8 \(20, 20\)"),
        ({"x_test": images(10, 4, 5)}, r"of one shape in own.npz \(test\)"),
        ({"x_train": images(0, 5, 4), "y_train": labels(0)}, r"\(0, 5, 4\)"),
        ({"y_train": labels(19)}, r"Expected 20 labels.*got uint8 \(19,\)"),
        ({"y_test": np.full(10, -1)}, "integers from 0"),
        ({"y_test": np.ones(10)}, "got float64"),
    ],
)
def test_bad_arrays(tmp_path: Path, changes: dict[str, Array], message: str) -> None:
    write_npz(tmp_path / "own.npz", **changes)
    with pytest.raises(ValueError, match=message):
        datasets.load("own", tmp_path)


def test_damaged_npz(tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    write_npz(path)
    whole = path.read_bytes()
    for content in (b"", b"not a zip", whole[:-200], whole[:90] + b"\x55" * 40 + whole[130:]):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"Expected an npz archive with x_train.*own\.npz, got"
        ):
            datasets.load("own", tmp_path)


def test_npz_without_a_key_or_with_a_pickle(tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", x_train=images(2, 3, 3))
    with pytest.raises(ValueError, match="lacks y_train, x_test, y_test"):
        datasets.load("own", tmp_path)
    write_npz(tmp_path / "own.npz", y_test=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="Object arrays cannot be loaded"):
        datasets.load("own", tmp_path)
    np.save(tmp_path / "own.npy", labels(3))
    (tmp_path / "own.npy").rename(tmp_path / "own.npz")
    with pytest.raises(ValueError, match="single array"):
        datasets.load("own", tmp_path)


@pytest.mark.parametrize(
    ("name", "folder", "ending"),
    [
        ("mnist", "", "-idx{}-ubyte.gz"),
        ("mnist", "MNIST/raw", "-idx{}-ubyte"),
        ("fmnist", "FashionMNIST/raw", "-idx{}-ubyte.gz"),
        ("kmnist", "kmnist", ".idx{}-ubyte"),
    ],
)
def test_idx_set(tmp_path: Path, name: str, folder: str, ending: str) -> None:
    x = write_idx_set(tmp_path / folder, "train", "t10k", ending)
    data = datasets.load(name, tmp_path)
    np.testing.assert_array_equal(data.x_train, x[:12].reshape(12, 12) / np.float32(255))
    np.testing.assert_array_equal(data.x_test, x[12:].reshape(6, 12) / np.float32(255))
    np.testing.assert_array_equal(data.y_test, labels(18)[12:])
    assert data.in_shape == (4, 3)


def test_emnist_is_turned_upright(tmp_path: Path) -> None:
    x = write_idx_set(tmp_path / "EMNIST" / "raw", "emnist-balanced-train", "emnist-balanced-test")
    data = datasets.load("emnist", tmp_path)
    assert data.in_shape == (3, 4)
    upright = x[:12].transpose(0, 2, 1).reshape(12, 12) / np.float32(255)
    np.testing.assert_array_equal(data.x_train, upright)


def test_emnist_letters_count_from_0(tmp_path: Path) -> None:
    write_idx_set(tmp_path, "emnist-letters-train", "emnist-letters-test")
    one_based = gzip.compress(idx(labels(12, 6) + np.uint8(1)))
    (tmp_path / "emnist-letters-train-labels-idx1-ubyte.gz").write_bytes(one_based)
    one_based = gzip.compress(idx(labels(6) + np.uint8(1)))
    (tmp_path / "emnist-letters-test-labels-idx1-ubyte.gz").write_bytes(one_based)
    data = datasets.load("emnist-letters", tmp_path)
    np.testing.assert_array_equal(data.y_train, labels(12, 6))
    with pytest.raises(ValueError, match=r"Expected emnist-\{balanced,.*got 'emnist-greek'"):
        datasets.load("emnist-greek", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expected IDX unsigned bytes"),
        (b"\x89PNG\r\n\x1a\n", "got '89 50 4e 47'"),
        (idx(images(2, 3, 3))[:10], "header of 16 bytes"),
        (idx(images(2, 3, 3))[:-1], r"Expected 18 bytes for shape \(2, 3, 3\).*got 17"),
        (idx(images(2, 3, 3)) + b"x", "got 19"),
        (struct.pack(">HBBIII", 0, 8, 3, 2**32 - 1, 2**32 - 1, 9), "got 0"),
        (struct.pack(">HBBI", 0, 13, 1, 1) + b"1234", "got '00 00 0d 01'"),
        (gzip.compress(idx(images(2, 3, 3)), mtime=0)[:-9], "Expected gzipped IDX data"),
        (b"\x1f\x8b garbage", "Expected gzipped IDX data"),
    ],
)
def test_damaged_idx(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "file-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_idx(tmp_path / "file-idx3-ubyte.gz")


@pytest.mark.parametrize(
    ("folder", "dump"), [("cifar-10-batches-py", python2_pickle), ("", python3_pickle)]
)
def test_cifar10_batches(tmp_path: Path, folder: str, dump: Callable[[object], bytes]) -> None:
    x, y = write_cifar10(tmp_path / folder, dump)
    data = datasets.load("cifar10", tmp_path)
    assert (data.in_shape, data.channels) == ((32, 32), 3)
    assert (data.x_train.shape, data.x_test.shape) == ((10, 3072), (2, 3072))
    np.testing.assert_array_equal(data.y_train, y[:10])
    for pixel, channel in itertools.product((0, 33, 1023), range(3)):
        stored = x[:10, channel * 1024 + pixel] / np.float32(255)
        np.testing.assert_array_equal(data.x_train[:, pixel * 3 + channel], stored)


class Evil:
    def __reduce__(self) -> Any:
        return print, ("a pickle ran code",)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (Evil(), "builtins.print has no place"),
        ({b"data": Evil(), b"labels": []}, "has no place"),
        ({b"labels": []}, "data"),
        ({b"data": images(2, 3000), b"labels": [0, 1]}, r"uint8 data \[n, 3072\]"),
        ([1, 2], "Expected a CIFAR-10 python batch"),
    ],
)
def test_bad_cifar10(
    tmp_path: Path, batch: object, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cifar10(tmp_path)
    (tmp_path / "data_batch_3").write_bytes(python3_pickle(batch))
    with pytest.raises(ValueError, match=message):
        read_cifar10(tmp_path)
    assert capsys.readouterr().out == ""


def test_truncated_cifar10(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    (tmp_path / "test_batch").write_bytes((tmp_path / "test_batch").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"Expected a CIFAR-10 python batch in .*test_batch, got"):
        datasets.load("cifar10", tmp_path)


def test_jpeg_npz(tmp_path: Path) -> None:
    from PIL import Image

    x = np.repeat(np.repeat(images(4, 4, 4, 3), 8, axis=1), 8, axis=2)  # smooth: JPEG keeps it
    files = []
    for image in x:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=95, subsampling=0)
        files.append(buffer.getvalue())
    arrays = {
        f"{key}_{part}": value
        for part in ("train", "test")
        for key, value in (
            ("bytes", np.frombuffer(b"".join(files), np.uint8)),
            ("offsets", np.cumsum([0, *map(len, files)])),
            ("y", labels(4)),
        )
    }
    np.savez(tmp_path / "cifar10_jpeg.npz", **arrays)  # type: ignore[arg-type]
    data = datasets.load("cifar10", tmp_path)
    assert np.abs(data.x_train - x.reshape(4, -1) / np.float32(255)).max() < 0.05
    arrays["offsets_test"] = arrays["offsets_test"] + 3
    np.savez(tmp_path / "cifar10_jpeg.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Expected ascending offsets within"):
        read_jpeg_npz(tmp_path / "cifar10_jpeg.npz")
    arrays["offsets_test"] = np.array([0, 5, 9])
    np.savez(tmp_path / "cifar10_jpeg.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Expected a JPEG image at index 0"):
        read_jpeg_npz(tmp_path / "cifar10_jpeg.npz")


def test_missing_data_names_what_was_looked_for_and_where(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        datasets.load("fmnist", tmp_path)
    message = str(error.value)
    for part in ("images-idx3", "labels-idx1"):
        assert f"train-{part}-ubyte.gz" in message
        assert f"t10k-{part}-ubyte" in message
    for place in (tmp_path, tmp_path / "FashionMNIST" / "raw"):
        assert f"in {place}" in message
    assert "fmnist.npz" in message


def test_partly_missing_data_names_only_what_is_missing(tmp_path: Path) -> None:
    write_cifar10(tmp_path / "cifar-10-batches-py")
    (tmp_path / "cifar-10-batches-py" / "data_batch_4").unlink()
    with pytest.raises(FileNotFoundError, match=r"5 of 6 found\)\n    data_batch_4\n  in "):
        datasets.load("cifar10", tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        datasets.load("cifar10", tmp_path / "nowhere")


def test_data_that_needs_a_folder_asks_for_it() -> None:
    with pytest.raises(ValueError, match=r"Expected --data-root, .* of 'mnist', got none"):
        datasets.load("mnist")


class TestRealData:
    pytestmark = needs_real_data

    @pytest.mark.parametrize(
        ("name", "mean", "deviation"), [("mnist", 0.1307, 0.3081), ("fmnist", 0.2860, 0.3530)]
    )
    def test_grey_sets(self, name: str, mean: float, deviation: float) -> None:
        data = datasets.load(name, REAL)
        assert (data.x_train.shape, data.x_test.shape) == ((60000, 784), (10000, 784))
        assert (data.classes, data.in_shape, data.source) == (10, (28, 28), f"{name}.npz")
        assert data.x_train.mean(dtype=np.float64) == pytest.approx(mean, abs=1e-4)
        assert data.x_train.std(dtype=np.float64) == pytest.approx(deviation, abs=1e-4)

    def test_idx_files_give_the_same_as_npz(self, tmp_path: Path) -> None:
        expected = datasets.load("mnist_mini", REAL)
        with np.load(REAL / "mnist_mini.npz") as arrays:
            for part, split in (("train", "train"), ("t10k", "test")):
                for what, key in (("images-idx3", "x"), ("labels-idx1", "y")):
                    content = gzip.compress(idx(arrays[f"{key}_{split}"]), 1)
                    (tmp_path / f"{part}-{what}-ubyte.gz").write_bytes(content)
        data = datasets.load("mnist", tmp_path)
        np.testing.assert_array_equal(data.x_train, expected.x_train)
        np.testing.assert_array_equal(data.y_test, expected.y_test)

    def test_first_cifar10_jpegs(self, tmp_path: Path) -> None:
        n, arrays = 500, {}
        with np.load(REAL / "cifar10_jpeg.npz") as archive:
            for part in ("train", "test"):
                offsets = archive[f"offsets_{part}"][: n + 1]
                arrays[f"offsets_{part}"] = offsets
                arrays[f"bytes_{part}"] = archive[f"bytes_{part}"][: offsets[-1]]
                arrays[f"y_{part}"] = archive[f"y_{part}"][:n]
        np.savez(tmp_path / "cifar10_jpeg.npz", **arrays)
        raw = read_jpeg_npz(tmp_path / "cifar10_jpeg.npz")
        assert raw.x_train.shape == raw.x_test.shape == (n, 32, 32, 3)
        means = raw.x_train.mean((0, 1, 2)) / 255
        np.testing.assert_allclose(means, [0.494, 0.485, 0.450], atol=2e-2)
        assert np.bincount(raw.y_train).tolist() == [50] * 10
