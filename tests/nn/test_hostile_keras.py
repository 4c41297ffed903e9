"""Hostile Keras files: HDF5 that claims or points elsewhere, and zip bombs."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dendrite_kernels import interop
from tests.nn.test_hostile_files import MIB, archived, little_memory

h5py = pytest.importorskip("h5py")


def keras_file(path: Path, change: Callable[[Any], object]) -> None:
    """Weights of three dense layers 2 -> 2 without biases; `change` gets the group of the first."""
    names = [b"dend_1", b"soma_1", b"out"]
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = names
        for name in names:
            group = file.create_group(name)
            group.attrs["weight_names"] = [b"kernel:0"]
            group["kernel:0"] = np.ones((2, 2), np.float32)
        change(file["dend_1"])


def instead(**options: Any) -> Callable[[Any], object]:
    def change(group: Any) -> None:
        del group["kernel:0"]
        group.create_dataset("kernel:0", **options)

    return change


def link(kind: str, *names: str) -> Callable[[Any], object]:
    def change(group: Any) -> None:
        del group["kernel:0"]
        group["kernel:0"] = getattr(h5py, kind)(*names)

    return change


def virtual(group: Any) -> None:
    del group["kernel:0"]
    layout = h5py.VirtualLayout((2, 2), np.float32)
    layout[:] = h5py.VirtualSource("other", "x", (2, 2))
    group.create_virtual_dataset("kernel:0", layout)


def attribute(name: str, value: Any, of_file: bool = True) -> Callable[[Any], object]:
    return lambda group: (group.file if of_file else group).attrs.__setitem__(name, value)


def leaky(slope: str) -> str:
    layer = '{"class_name": "LeakyReLU", "config": {"alpha": ' + slope + "}}"
    return '{"class_name": "Sequential", "config": {"layers": [' + layer + "]}}"


HDF5: dict[str, Callable[[Any], object]] = {
    "4 TiB that are not there": instead(shape=(2**20, 2**20), dtype="f4"),
    "1 GiB in pieces": instead(shape=(2, 2**27), dtype="f4", chunks=(1, 64)),
    "1 GiB of zeros, packed": instead(
        shape=(2, 2**27), dtype="f4", chunks=(2, 2**20), compression="gzip"
    ),
    "an array in another file": instead(shape=(2, 2), dtype="f4", external=[("other", 0, 16)]),
    "a link to another file": link("ExternalLink", "other", "/x"),
    "an array of parts of another file": virtual,
    "a link to itself": link("SoftLink", "/dend_1/kernel:0"),
    "text": instead(data=[[b"a", b"b"], [b"c", b"d"]]),
    "objects": instead(shape=(2, 2), dtype=h5py.string_dtype()),
    "integers": instead(data=np.ones((2, 2), np.int64)),
    "floats of other machines": instead(data=np.ones((2, 2), ">f4")),
    "no values": instead(data=h5py.Empty("f4")),
    "layers of no names": attribute("layer_names", 3),
    "names of no text": attribute("weight_names", [b"\xff:0"], of_file=False),
    "a deep model": attribute("model_config", "[" * 20_000),
    "a model that is a number": attribute("model_config", 7),
    "a slope of 400 digits": attribute("model_config", leaky("1" + "0" * 400)),
    "a slope of 5000 digits": attribute("model_config", leaky("1" * 5000)),
    "a slope that is NaN": attribute("model_config", leaky("NaN")),
}


@pytest.mark.parametrize("change", HDF5.values(), ids=HDF5)
def test_hostile_hdf5(
    change: Callable[[Any], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with h5py.File("other", "w") as file:
        file["x"] = np.ones((2, 2), np.float32)
    path = tmp_path / "file"
    keras_file(path, lambda group: None)
    interop.from_keras(path)
    keras_file(path, change)
    with little_memory(), pytest.raises(ValueError):  # noqa: PT011
        interop.from_keras(path)


def test_keras_zip_bombs(tmp_path: Path) -> None:
    path, zeros = tmp_path / "file", bytes(68 * MIB)
    for name in ("config.json", "model.weights.h5"):
        files = {"config.json": b"{}", "model.weights.h5": b"", name: zeros}
        path.write_bytes(archived(files, zipfile.ZIP_DEFLATED))
        with little_memory(), pytest.raises(ValueError, match=r"Expected at most .* bytes in"):
            interop.from_keras(path)
