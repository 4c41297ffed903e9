"""Dense layers from Keras files: HDF5 (whole model or weights, Keras 2 and 3) and .keras."""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Dense = tuple[str, Array, Array | None]  # name, kernel [inputs, outputs], bias [outputs]
_KERAS_3 = ("layers", "_layer_checkpoint_dependencies")  # where its weight files hold layers


def read_dense(path: str | os.PathLike[str]) -> list[Dense]:
    """The dense layers of a file, from input to output.

    Raises:
        ImportError: h5py is missing.
        ValueError: no such file, or no dense layer in it.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError("Keras files need h5py: pip install dendrite-kernels[keras]") from error
    order: list[str] = []
    source: Any = os.fspath(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            order = _dense_names(json.loads(archive.read("config.json")))
            source = io.BytesIO(archive.read("model.weights.h5"))
    elif not h5py.is_hdf5(path):
        raise ValueError(f"Expected a .keras or HDF5 file, got {os.fspath(path)}")
    with h5py.File(source, "r") as file:
        root = file.get("model_weights", file)
        found = list(_keras_2(root) if "layer_names" in root.attrs else _keras_3(root, order))
    if not found:
        raise ValueError(f"Expected dense layers in {os.fspath(path)}, got none")
    return found


def _dense_names(config: Any) -> list[str]:
    layers = config.get("config", {}).get("layers", [])
    return [layer["config"]["name"] for layer in layers if layer["class_name"] == "Dense"]


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _keras_2(root: Any) -> Iterator[Dense]:
    for name in map(_text, root.attrs["layer_names"]):
        group = root[name]
        weights = [group[_text(weight)][()] for weight in group.attrs["weight_names"]]
        yield from _as_dense(name, weights)


def _keras_3(root: Any, order: list[str]) -> Iterator[Dense]:
    holder = next((root[name] for name in _KERAS_3 if name in root), None)
    if holder is None:
        return
    names = order if order and all(name in holder for name in order) else _by_number(holder)
    for name in names:
        variables = holder[name].get("vars", {})
        yield from _as_dense(name, [variables[key][()] for key in sorted(variables, key=int)])


def _by_number(names: Any) -> list[str]:
    """dense, dense_1, ..., dense_10: the order in which Keras numbered them."""

    def number(name: str) -> int:
        found = re.fullmatch(r".*?_(\d+)", name)
        return int(found[1]) if found else 0

    return sorted(names, key=lambda name: (number(name), name))


def _as_dense(name: str, weights: list[Array]) -> Iterator[Dense]:
    if not weights or weights[0].ndim != 2:
        return  # an input, an activation, dropout, ...
    yield name, weights[0], weights[1] if len(weights) > 1 else None
