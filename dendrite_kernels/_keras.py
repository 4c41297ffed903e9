"""Dense layers from Keras files: HDF5 (whole model or weights, Keras 2 and 3) and .keras."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import re
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Dense = tuple[str, Array, Array | None]  # name, kernel [inputs, outputs], bias [outputs]
_KERAS_3 = ("layers", "_layer_checkpoint_dependencies")  # where its weight files hold layers
_HARMLESS = ("InputLayer", "Flatten", "Dropout")
_UNREADABLE = (
    AttributeError, KeyError, OSError, RuntimeError, TypeError, json.JSONDecodeError,
    zipfile.BadZipFile,
)  # fmt: skip


def read_dense(path: str | os.PathLike[str], negative_slope: float) -> list[Dense]:
    """The dense layers of a file, from input to output.

    Args:
        path: of the file.
        negative_slope: of the leaky ReLU that must follow each but the last, where a file tells.

    Raises:
        ImportError: h5py is missing.
        ValueError: no such file, or layers that a chain of dense layers does not stand for.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError("Keras files need h5py: pip install 'dendrite-kernels[keras]'") from error
    try:
        source: Any = os.fspath(path)
        config: Any = None
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                config = json.loads(archive.read("config.json"))
                source = io.BytesIO(archive.read("model.weights.h5"))
        with h5py.File(source, "r") as file:
            config = json.loads(file.attrs.get("model_config", "null")) or config
            order = [] if config is None else _dense_names(config, negative_slope)
            root = file.get("model_weights", file)
            found = list(_keras_2(root) if "layer_names" in root.attrs else _keras_3(root, order))
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


def _keras_2(root: Any) -> Iterator[Dense]:
    for name in map(_text, root.attrs["layer_names"]):
        group = root[name]
        labels = list(map(_text, group.attrs["weight_names"]))
        kinds = [label.rpartition("/")[2].partition(":")[0] for label in labels]
        if labels:
            yield _as_dense(name, kinds, [group[label][()] for label in labels])


def _keras_3(root: Any, order: list[str]) -> Iterator[Dense]:
    holder: Any = next((root[name] for name in _KERAS_3 if name in root), {})
    stored = {name: _variables(holder[name]) for name in holder}
    names = [name for name in stored if re.fullmatch(r"dense(_\d+)?", name)]  # of class Dense
    names = order if order and all(name in stored for name in order) else _by_number(names)
    others = [name for name in stored if stored[name] and name not in names]
    if others:
        raise ValueError(f"Expected dense layers, got weights of {others}")
    for name in names:
        kinds = [{"vars/0": "kernel", "vars/1": "bias"}.get(key, key) for key in stored[name]]
        yield _as_dense(name, kinds, list(stored[name].values()))


def _variables(group: Any) -> dict[str, Array]:
    """What a layer holds, by place, but the generators of dropout."""
    found: dict[str, Array] = {}

    def visit(place: str, item: Any) -> None:
        if hasattr(item, "dtype") and not place.startswith("seed_generator/"):
            found[place] = item[()]

    group.visititems(visit)
    return found


def _by_number(names: Any) -> list[str]:
    """dense, dense_1, ..., dense_10: the order in which Keras numbered them."""

    def number(name: str) -> int:
        found = re.fullmatch(r".*?_(\d+)", name)
        return int(found[1]) if found else 0

    return sorted(names, key=lambda name: (number(name), name))


def _as_dense(name: str, kinds: list[str], weights: list[Array]) -> Dense:
    shapes = [list(weight.shape) for weight in weights]
    if kinds not in (["kernel"], ["kernel", "bias"]) or len(shapes[0]) != 2:
        raise ValueError(f"Expected dense layers, got {name} with {kinds} of shapes {shapes}")
    if shapes[1:] not in ([], [shapes[0][1:]]):
        raise ValueError(f"Expected a bias {shapes[0][1:]} for {name}, got {shapes[1]}")
    return name, weights[0], weights[1] if len(weights) > 1 else None
