"""Readers of the file formats of image data sets: uint8 images, integer labels.

They raise ValueError "Expected ... got ..." with the name of a file that is damaged or has another
format, and FileNotFoundError for a missing file. No code in a file is executed: npz files are read
without pickle, and the pickles of CIFAR-10 with an unpickler that accepts only arrays.
"""

from __future__ import annotations

import gzip
import io
import itertools
import math
import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

CIFAR10_TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
CIFAR10_TEST = "test_batch"

_DAMAGED = (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error)


class RawImages(NamedTuple):
    """Images as they are in the files: x uint8 [n, H, W] or [n, H, W, C], y integers [n]."""

    x_train: NDArray[np.uint8]
    y_train: NDArray[np.integer[Any]]
    x_test: NDArray[np.uint8]
    y_test: NDArray[np.integer[Any]]


def read_npz(path: Path) -> RawImages:
    """Arrays x_train, y_train, x_test, y_test of one npz file."""
    arrays = _npz_arrays(path, RawImages._fields)
    return RawImages(*(arrays[key] for key in RawImages._fields))


def read_jpeg_npz(path: Path) -> RawImages:
    """Images stored as JPEG bytes: `bytes_`, `offsets_` [n + 1] and `y_` for train and test.

    Needs Pillow. Decoded in one thread: decoding such small images needs the GIL most of the time,
    so threads only wait for each other (60,000 images of 32x32: 6 s, with 4 threads 9 s).
    """
    keys = [f"{part}_{split}" for split in ("train", "test") for part in ("bytes", "offsets", "y")]
    arrays = _npz_arrays(path, keys)
    x_train, x_test = (
        _decode_jpegs(path, arrays[f"bytes_{s}"], arrays[f"offsets_{s}"]) for s in ("train", "test")
    )
    return RawImages(x_train, arrays["y_train"], x_test, arrays["y_test"])


def _npz_arrays(path: Path, keys: list[str] | tuple[str, ...]) -> dict[str, NDArray[Any]]:
    with path.open("rb"):  # a missing file stays a FileNotFoundError
        pass
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array")
        with archive:
            missing = [key for key in keys if key not in archive.files]
            if missing:
                raise ValueError(
                    f"it lacks {', '.join(missing)} and has {', '.join(archive.files) or 'nothing'}"
                )
            return {key: archive[key] for key in keys}
    except _DAMAGED as error:
        raise ValueError(
            f"Expected an npz archive with {', '.join(keys)} in {path}, got: {error}"
        ) from error


def _decode_jpegs(
    path: Path, data: NDArray[np.uint8], offsets: NDArray[np.integer[Any]]
) -> NDArray[np.uint8]:
    from PIL import Image

    buffer = data.tobytes()
    bounds = [int(offset) for offset in offsets]
    if len(bounds) < 2 or bounds != sorted(bounds) or bounds[0] < 0 or bounds[-1] > len(buffer):
        raise ValueError(
            f"Expected ascending offsets within {len(buffer)} JPEG bytes in {path}, got {offsets}"
        )
    images = []
    for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
        try:
            with Image.open(io.BytesIO(buffer[start:stop])) as image:
                images.append(np.asarray(image))
        except OSError as error:
            raise ValueError(
                f"Expected a JPEG image at index {i} of {path}, got: {error}"
            ) from error
    try:
        return np.stack(images)
    except ValueError as error:
        raise ValueError(f"Expected JPEG images of one size in {path}, got: {error}") from error


def read_idx(path: Path) -> NDArray[np.uint8]:
    """An IDX file of unsigned bytes; its first bytes, not its name, say whether it is gzipped."""
    content = path.read_bytes()
    try:
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except _DAMAGED as error:
        raise ValueError(f"Expected gzipped IDX data in {path}, got: {error}") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        magic = content[:4].hex(" ")
        raise ValueError(f"Expected IDX unsigned bytes (00 00 08 ..) in {path}, got {magic!r}")
    ndim = content[3]
    header = 4 + 4 * ndim
    if len(content) < header:
        raise ValueError(
            f"Expected an IDX header of {header} bytes in {path}, got {len(content)} bytes"
        )
    shape = struct.unpack(f">{ndim}I", content[4:header])
    size = len(content) - header
    if size != math.prod(shape):
        raise ValueError(
            f"Expected {math.prod(shape)} bytes for shape {shape} in {path}, got {size}"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def read_cifar10(folder: Path) -> RawImages:
    """The Python batches of CIFAR-10 in one folder: data_batch_1 .. data_batch_5, test_batch."""
    parts = [_cifar10_batch(folder / name) for name in CIFAR10_TRAIN]
    x_test, y_test = _cifar10_batch(folder / CIFAR10_TEST)
    x_train = np.concatenate([x for x, _ in parts])
    y_train = np.concatenate([y for _, y in parts])
    return RawImages(x_train, y_train, x_test, y_test)


def _cifar10_batch(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.integer[Any]]]:
    try:
        with path.open("rb") as file:
            batch = _ArrayUnpickler(file, encoding="bytes").load()
        data, labels = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"])
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(f"Expected a CIFAR-10 python batch in {path}, got: {error!r}") from error
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        raise ValueError(f"Expected uint8 data [n, 3072] in {path}, got {data.dtype} {data.shape}")
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles containers, numbers, strings and numpy arrays, and refuses all else."""

    _ALLOWED: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a CIFAR-10 batch")
        return self._ALLOWED[module, name]
