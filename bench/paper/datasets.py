"""Image data sets by name, from files of the user, as arrays.

Nothing is downloaded.

digits          8x8 handwritten digits that come with scikit-learn, resized to 28x28
mnist fmnist kmnist emnist emnist-{balanced,byclass,bymerge,letters,digits,mnist} cifar10
any other name  NAME.npz with x_train, y_train, x_test, y_test
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench.paper.readers import (
    CIFAR10_TEST,
    CIFAR10_TRAIN,
    RawImages,
    read_cifar10,
    read_idx,
    read_jpeg_npz,
    read_npz,
)

KNOWN = "digits, mnist, fmnist, kmnist, emnist, cifar10 or the stem of an npz"
EMNIST_SPLITS = ("balanced", "byclass", "bymerge", "letters", "digits", "mnist")
# torchvision's folder of each data set
IDX_FOLDERS = {"mnist": "MNIST", "fmnist": "FashionMNIST", "kmnist": "KMNIST"}
DIGITS_SOURCE = (
    "scikit-learn's bundled handwritten digits, resized from 8x8 to 28x28 (bilinear); "
    "every fifth image of a class is a test image"
)


@dataclass(frozen=True)
class ImageData:
    """A data set in memory: x float32 [n, H*W*C] in 0..1 (channels last), y int64 [n]."""

    name: str
    x_train: NDArray[np.float32]
    y_train: NDArray[np.int64]
    x_test: NDArray[np.float32]
    y_test: NDArray[np.int64]
    in_shape: tuple[int, int]
    channels: int
    source: str

    @property
    def classes(self) -> int:
        return int(max(self.y_train.max(), self.y_test.max())) + 1


class _Candidate(NamedTuple):
    """One way in which a data set may be stored on disk."""

    files: tuple[tuple[Path, ...], ...]  # the alternative names of every file
    read: Callable[[list[Path]], RawImages]  # takes one path for every file


def load(name: str = "digits", root: str | Path | None = None) -> ImageData:
    """The data set `name`, read from the files in `root` ("digits" needs none).

    Raises FileNotFoundError with the names of all files that were looked for, and ValueError for a
    damaged file. IDX images of EMNIST are stored column by column and are transposed here; npz
    files are not changed. Labels 1..26 of EMNIST letters become 0..25.
    """
    if name == "digits":
        return _image_data(name, _read_digits(), DIGITS_SOURCE)
    if Path(name).name != name:
        raise ValueError(f"Expected {KNOWN}, got {name!r}: folders belong into --data-root")
    if root is None:
        raise ValueError(
            f"Expected --data-root, a folder that holds the files of {name!r}, got none. "
            f"Data sets: {KNOWN}; only digits needs no files"
        )
    folder = Path(root).expanduser()
    candidates = _candidates(name, folder)
    for candidate in candidates:
        found = [
            next((path for path in names if path.is_file()), None) for names in candidate.files
        ]
        paths = [path for path in found if path is not None]
        if len(paths) == len(found):
            source = ", ".join(str(path.relative_to(folder)) for path in paths)
            return _image_data(name, candidate.read(paths), source)
    raise FileNotFoundError(_what_was_looked_for(name, folder, candidates))


def from_arrays(
    x_train: Any, y_train: Any, x_test: Any, y_test: Any, name: str = "arrays"
) -> ImageData:
    """A data set of your own: uint8 images [n, H, W] or [n, H, W, C], integer labels [n] from 0."""
    raw = RawImages(*(np.asarray(array) for array in (x_train, y_train, x_test, y_test)))
    return _image_data(name, raw, "arrays in memory")


def _candidates(name: str, root: Path) -> list[_Candidate]:
    """All places and formats of data set `name`, in the order in which they are tried."""
    candidates = [_Candidate(((root / f"{name}.npz",),), lambda paths: read_npz(paths[0]))]
    if name == "cifar10":
        candidates.append(
            _Candidate(((root / "cifar10_jpeg.npz",),), lambda paths: read_jpeg_npz(paths[0]))
        )
        for folder in (root / "cifar-10-batches-py", root):
            files = tuple((folder / file,) for file in (*CIFAR10_TRAIN, CIFAR10_TEST))
            candidates.append(_Candidate(files, lambda paths: read_cifar10(paths[0].parent)))
    elif name in IDX_FOLDERS:
        for folder in (
            root / IDX_FOLDERS[name] / "raw",
            root / IDX_FOLDERS[name],
            root / name,
            root,
        ):
            candidates.append(_Candidate(_idx_files(folder, "train", "t10k"), _read_idx_set))
    elif name.split("-")[0] == "emnist":
        part = name.partition("-")[2] or "balanced"  # as in the paper
        if part not in EMNIST_SPLITS:
            raise ValueError(f"Expected emnist-{{{','.join(EMNIST_SPLITS)}}}, got {name!r}")
        reader = _read_emnist_letters if part == "letters" else _read_emnist
        for folder in (root / "EMNIST" / "raw", root / "EMNIST", root / "gzip", root):
            candidates.append(
                _Candidate(
                    _idx_files(folder, f"emnist-{part}-train", f"emnist-{part}-test"), reader
                )
            )
    return candidates


def _idx_files(folder: Path, train: str, test: str) -> tuple[tuple[Path, ...], ...]:
    """The four IDX files with their official or dotted names, gzipped or not."""
    contents = (("images", 3), ("labels", 1))
    return tuple(
        tuple(
            folder / f"{part}-{what}{dot}idx{ndim}-ubyte{gz}"
            for dot, gz in itertools.product("-.", ("", ".gz"))
        )
        for part in (train, test)
        for what, ndim in contents
    )


def _read_idx_set(paths: list[Path]) -> RawImages:
    return RawImages(*(read_idx(path) for path in paths))


def _read_emnist(paths: list[Path]) -> RawImages:
    raw = _read_idx_set(paths)
    for path, x in ((paths[0], raw.x_train), (paths[2], raw.x_test)):
        if x.ndim != 3:
            raise ValueError(f"Expected images [n, H, W] in {path}, got shape {x.shape}")
    return raw._replace(
        x_train=raw.x_train.transpose(0, 2, 1), x_test=raw.x_test.transpose(0, 2, 1)
    )


def _read_emnist_letters(paths: list[Path]) -> RawImages:
    raw = _read_emnist(paths)
    return raw._replace(
        y_train=raw.y_train.astype(np.int64) - 1, y_test=raw.y_test.astype(np.int64) - 1
    )


def _read_digits() -> RawImages:
    from scipy.ndimage import zoom
    from sklearn.datasets import load_digits

    bundle = load_digits()
    resized = zoom(
        bundle.images / 16.0, (1, 3.5, 3.5), order=1, mode="nearest", grid_mode=True
    )  # 0..16 -> 0..1
    x = np.rint(resized * 255).astype(np.uint8)  # [1797, 28, 28]
    y = bundle.target
    test = np.concatenate([np.flatnonzero(y == digit)[4::5] for digit in range(10)])
    return RawImages(np.delete(x, test, axis=0), np.delete(y, test), x[test], y[test])


def _image_data(name: str, raw: RawImages, source: str) -> ImageData:
    image_shape = raw.x_train.shape[1:]
    for part, x, y in (("train", raw.x_train, raw.y_train), ("test", raw.x_test, raw.y_test)):
        if x.dtype != np.uint8 or x.ndim not in (3, 4) or x.shape[1:] != image_shape or x.size == 0:
            expected = "uint8 images [n, H, W] or [n, H, W, C] of one shape"
            raise ValueError(f"Expected {expected} in {source} ({part}), got {x.dtype} {x.shape}")
        if not np.issubdtype(y.dtype, np.integer) or y.shape != x.shape[:1] or y.min() < 0:
            expected = f"{len(x)} labels, integers from 0"
            got = f"{y.dtype} {y.shape}" + (f" from {y.min()}" if y.size else "")
            raise ValueError(f"Expected {expected} in {source} ({part}), got {got}")
    last = max(raw.y_train.max(), raw.y_test.max())
    if len(unseen := np.setdiff1d(np.arange(last + 1), raw.y_train)):
        raise ValueError(
            f"Expected every label from 0 to {last} among the training images of {source}, "
            f"got none of {unseen[:5].tolist()}"
        )
    return ImageData(
        name=name,
        x_train=_scaled(raw.x_train),
        y_train=raw.y_train.astype(np.int64),
        x_test=_scaled(raw.x_test),
        y_test=raw.y_test.astype(np.int64),
        in_shape=(image_shape[0], image_shape[1]),
        channels=image_shape[2] if len(image_shape) == 3 else 1,
        source=source,
    )


def _scaled(x: NDArray[Any]) -> NDArray[np.float32]:
    scaled = x.reshape(len(x), -1).astype(np.float32)
    scaled /= 255
    return scaled


def _what_was_looked_for(name: str, root: Path, candidates: list[_Candidate]) -> str:
    lines = [
        f"No files of data set {name!r} in --data-root {root}"
        + ("" if root.is_dir() else " (no such folder)")
        + f". Data sets: {KNOWN}. Looked for:"
    ]
    for candidate in candidates:
        missing = [names for names in candidate.files if not any(path.is_file() for path in names)]
        here = len(candidate.files) - len(missing)
        lines.append(
            f"  in {candidate.files[0][0].parent}"
            + (f" ({here} of {len(candidate.files)} found)" if here else "")
        )
        lines += ["    " + " | ".join(path.name for path in names) for names in missing]
    return "\n".join(lines)
