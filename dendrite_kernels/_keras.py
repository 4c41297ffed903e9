"""Dense layers from Keras files: HDF5 (whole model or weights, Keras 2 and 3) and .keras."""

from __future__ import annotations

import io
import itertools
import json
import lzma
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from ._replace import check_regular

Array = np.ndarray[Any, np.dtype[Any]]
Dense = tuple[str, Array, Array | None]  # name, kernel [inputs, outputs], bias [outputs]
_KERAS_3 = ("layers", "_layer_checkpoint_dependencies")  # where its weight files hold layers
_HARMLESS = ("InputLayer", "Flatten", "Dropout")
_FLOATS = (np.float16, np.float32, np.float64)
_MOST_PACKED = 100  # times as large as its file may a model be: masked kernels pack well
_UNREADABLE = (
    AttributeError, EOFError, KeyError, OSError, OverflowError, RuntimeError, TypeError,
    json.JSONDecodeError, lzma.LZMAError, struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def read_dense(path: str | os.PathLike[str], negative_slope: float) -> list[Dense]:
    """The dense layers of a file, from input to output.

    Args:
        path: of the file.
        negative_slope: of the leaky ReLU that must follow each but the last, where a file tells.

    Raises:
        ImportError: h5py is missing.
        ValueError: no such file, or layers that a chain of dense layers does not stand for; arrays
            that lie in other files, or are together 100 times as large as this one.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError("Keras files need h5py: pip install 'dendrite-kernels[keras]'") from error
    try:
        source: Any = os.fspath(path)
        config: Any = None
        check_regular(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                config = json.loads(_unpacked(archive, "config.json", path))
                source = io.BytesIO(_unpacked(archive, "model.weights.h5", path))
        with h5py.File(source, "r") as file:
            read = _Arrays(file, os.path.getsize(path))
            config = json.loads(file.attrs.get("model_config", "null")) or config
            order = [] if config is None else _dense_names(config, negative_slope)
            root = file.get("model_weights", file)
            is_2 = "layer_names" in root.attrs
            found = list(_keras_2(root, read) if is_2 else _keras_3(root, order, read))
    except _UNREADABLE as error:
        expected = f"Expected a .keras or HDF5 file of Keras, got {os.fspath(path)}"
        raise ValueError(f"{expected}: {error!r}") from error
    if not found:
        raise ValueError(f"Expected dense layers in {os.fspath(path)}, got none")
    for (below, kernel, _), (name, above, _) in itertools.pairwise(found):
        if kernel.shape[1] != above.shape[0]:
            raise ValueError(
                f"Expected a kernel of {kernel.shape[1]} inputs, the outputs of {below}, "
                f"got {above.shape[0]} for {name}"
            )
    return found


def _unpacked(archive: zipfile.ZipFile, name: str, path: str | os.PathLike[str]) -> bytes:
    """An entry, if it is no zip bomb."""
    size, most = archive.getinfo(name).file_size, _MOST_PACKED * os.path.getsize(path)
    if size > most:
        raise ValueError(f"Expected at most {most} bytes in {name} of {path}, got {size}")
    return archive.read(name)


class _Arrays:
    """Reads arrays of numbers. A dataset may claim any size, or name another file."""

    def __init__(self, file: Any, size: int) -> None:
        self.file, self.left = file, _MOST_PACKED * size

    def __call__(self, name: str, item: Any) -> Array:
        if item.file != self.file or item.external or item.is_virtual:
            raise ValueError(f"Expected the arrays of {name} in the file, got one in another")
        if item.dtype not in _FLOATS:
            raise ValueError(f"Expected arrays of floats for {name}, got {item.dtype}")
        self.left -= item.nbytes
        if self.left < 0:
            raise ValueError(
                f"Expected arrays at most {_MOST_PACKED} times as large as the file, "
                f"got {list(item.shape)} for {name}"
            )
        array: Array = item[()]
        return array


def _dense_names(config: Any, negative_slope: float) -> list[str]:
    """Of a model's dense layers, if it computes just these and the leaky ReLU behind each."""
    if config["class_name"] not in ("Sequential", "Functional", "Model"):
        raise ValueError(f"Expected a Sequential or Functional model, got {config['class_name']}")
    behind: dict[str, list[float | str]] = {"the input": []}  # each dense layer: what else there is
    for layer in config["config"]["layers"]:
        kind, name = layer["class_name"], layer["config"].get("name")
        if len(layer.get("inbound_nodes") or ()) > 1:
            raise ValueError(f"Expected each layer to be used once, got {name} again")
        if kind == "Dense":
            behind[name] = []
        activation = _activation(layer)
        if kind not in _HARMLESS and activation != "linear":
            behind[next(reversed(behind))].append(activation)
    names = list(behind)
    for name, found in behind.items():
        if name == names[0]:
            expected, fits = "nothing", not found
        elif name == names[-1]:
            expected, fits = "nothing or softmax", found in ([], ["softmax"])
        else:
            expected = f"a leaky ReLU of negative_slope {negative_slope}"
            fits = len(found) == 1 and _same(found[0], negative_slope)
        if not fits:
            raise ValueError(f"Expected {expected} behind {name}, got {found}")
    return names[1:]


def _same(slope: float | str, expected: float) -> bool:
    return isinstance(slope, float) and math.isclose(slope, expected, rel_tol=1e-6)  # float32


def _activation(described: Any) -> float | str:
    """The slope below 0 of a layer or function; the name of one that is no leaky ReLU."""
    if not isinstance(described, dict):
        slopes: dict[Any, Any] = {None: "linear", "relu": 0.0, "leaky_relu": 0.2}
        return slopes.get(described, described)  # type: ignore[no-any-return]
    kind, options = described["class_name"], described["config"]
    if kind in ("Dense", "Activation"):
        return _activation(options.get("activation"))
    if kind == "LeakyReLU":
        return float(options["alpha" if "alpha" in options else "negative_slope"])
    if kind == "ReLU" and options.get("max_value") is None and not options.get("threshold"):
        return float(options.get("negative_slope") or 0)
    return "softmax" if kind == "Softmax" else str(kind)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _keras_2(root: Any, read: _Arrays) -> Iterator[Dense]:
    for name in map(_text, root.attrs["layer_names"]):
        group = root[name]
        labels = list(map(_text, group.attrs["weight_names"]))
        kinds = [label.rpartition("/")[2].partition(":")[0] for label in labels]
        if labels:
            yield _as_dense(name, kinds, [group[label] for label in labels], read)


def _keras_3(root: Any, order: list[str], read: _Arrays) -> Iterator[Dense]:
    holder: Any = next((root[name] for name in _KERAS_3 if name in root), {})
    stored = {name: _variables(holder[name]) for name in holder}
    names = [name for name in stored if re.fullmatch(r"dense(_\d+)?", name)]  # of class Dense
    names = order if order and all(name in stored for name in order) else _by_number(names)
    others = [name for name in stored if stored[name] and name not in names]
    if others:
        raise ValueError(f"Expected dense layers, got weights of {others}")
    for name in names:
        kinds = [{"vars/0": "kernel", "vars/1": "bias"}.get(key, key) for key in stored[name]]
        yield _as_dense(name, kinds, list(stored[name].values()), read)


def _variables(group: Any) -> dict[str, Any]:
    """The datasets that a layer holds, by place, but the generators of dropout."""
    found: dict[str, Any] = {}

    def visit(place: str, item: Any) -> None:
        if hasattr(item, "dtype") and not place.startswith("seed_generator/"):
            found[place] = item

    group.visititems(visit)
    return found


def _by_number(names: Any) -> list[str]:
    """dense, dense_1, ..., dense_10: the order in which Keras numbered them."""

    def number(name: str) -> int:
        found = re.fullmatch(r".*?_(\d+)", name)
        return int(found[1]) if found else 0

    return sorted(names, key=lambda name: (number(name), name))


def _as_dense(name: str, kinds: list[str], weights: list[Any], read: _Arrays) -> Dense:
    shapes = [list(weight.shape) for weight in weights]
    if kinds not in (["kernel"], ["kernel", "bias"]) or len(shapes[0]) != 2:
        raise ValueError(f"Expected dense layers, got {name} with {kinds} of shapes {shapes}")
    if shapes[1:] not in ([], [shapes[0][1:]]):
        raise ValueError(f"Expected a bias {shapes[0][1:]} for {name}, got {shapes[1]}")
    return name, read(name, weights[0]), read(name, weights[1]) if len(weights) > 1 else None
