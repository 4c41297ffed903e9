"""Every loader of files against hostile ones: an error that it documents, in little memory."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import dendrite_kernels as dk
from dendrite_kernels import Connectivity, interop
from tests.fuzz.loaders import check, check_model, keras_seed, mixed, model_seed, npz_seed
from tests.networks import small

pytest.importorskip("h5py")
resource = pytest.importorskip("resource")
MIB = 1 << 20


class Loader(NamedTuple):
    good: Callable[[], bytes]
    read: Callable[[Path], Any]
    check: Callable[[Any], None]
    step: int  # 1 where each byte tells: HDF5 files are long, and mostly zeros


def labelled() -> Connectivity:
    return Connectivity.from_edges(["a", "b", "a"], [1, 1, 2], ["x", "x", "y"])


LOADERS = {
    "Connectivity.load": Loader(lambda: npz_seed(labelled()), Connectivity.load, check, 1),
    "dk.load": Loader(lambda: model_seed(mixed()), dk.load, check_model, 1),
    "from_keras": Loader(lambda: keras_seed("keras 2 model"), interop.from_keras, check_model, 23),
}
few_bytes_or_all = pytest.mark.parametrize("step", [19, pytest.param(1, marks=pytest.mark.slow)])
each_loader = pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)


@few_bytes_or_all
@each_loader
def test_files_cut_short(loader: Loader, step: int, tmp_path: Path) -> None:
    path, good = tmp_path / "file", loader.good()
    for end in range(0, len(good), loader.step * step):
        path.write_bytes(good[:end])
        with pytest.raises(ValueError, match="Expected a"):
            loader.read(path)


@few_bytes_or_all
@pytest.mark.parametrize("name", ["Connectivity.load", "dk.load"])
def test_one_bit_of_a_byte(name: str, step: int, tmp_path: Path) -> None:
    """Refused, or what comes out is valid. Not of HDF5 files: some make libhdf5 loop for ever."""
    loader = LOADERS[name]
    path, good = tmp_path / "file", loader.good()
    for i in range(0, len(good), step):
        damaged = bytearray(good)
        damaged[i] ^= 1 << i % 8
        path.write_bytes(damaged)
        with contextlib.suppress(ValueError):
            loader.check(loader.read(path))


@each_loader
def test_paths_that_lead_to_no_file(loader: Loader, tmp_path: Path) -> None:
    """A pipe would block for ever, a device has no end."""
    loop, pipe = tmp_path / "loop", tmp_path / "pipe"
    loop.symlink_to(loop)
    os.mkfifo(pipe)
    missing = tmp_path / "link"
    missing.symlink_to(tmp_path / "missing")
    for path in (tmp_path, loop, pipe, missing, Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises((OSError, ValueError)):
            loader.read(path)
    (tmp_path / "missing").write_bytes(loader.good())
    loader.check(loader.read(missing))


# Files that claim what is not there, and zip bombs


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """64 MiB more than this process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + 64 * MIB
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def npy(shape: Any, payload: bytes = b"", header: str | None = None) -> bytes:
    """The bytes of an .npy file of int32, whatever its header says."""
    said = {"descr": "<i4", "fortran_order": False, "shape": shape}
    text = (repr(said) if header is None else header).encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + payload


def entries(**changed: Any) -> dict[str, bytes]:
    """The files in the archive of a connectivity; arrays or bytes in place of some."""
    with zipfile.ZipFile(io.BytesIO(npz_seed(small()))) as archive:
        found = {name: archive.read(name) for name in archive.namelist()}
    for name, value in changed.items():
        file = io.BytesIO()
        if isinstance(value, bytes):
            file.write(value)
        else:
            np.save(file, value)
        found[f"{name}.npy"] = file.getvalue()
    return found


def archived(
    files: dict[str, bytes], method: int = zipfile.ZIP_STORED, twice: str | None = None
) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method, compresslevel=1) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        if twice is not None:
            with pytest.warns(UserWarning, match="Duplicate name"):
                archive.writestr(twice, files[twice])
    return file.getvalue()


def bomb() -> bytes:
    zeros = bytes(68 * MIB)
    return archived(entries(col_indices=npy((17 * MIB,), zeros)), zipfile.ZIP_DEFLATED)


def claimed(size: int) -> bytes:
    """The directory says that the first entry is this long."""
    data = bytearray(archived(entries()))
    entry = data.index(b"PK\x01\x02")
    data[entry + 20 : entry + 28] = 2 * size.to_bytes(4, "little")
    return bytes(data)


class Evil:
    """Its pickle writes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.canary), "w")


ARCHIVES: dict[str, Callable[[], bytes]] = {
    "2**30 elements": lambda: archived(entries(col_indices=npy((2**30,)))),
    "2**40 elements": lambda: archived(entries(col_indices=npy((2**40,)))),
    "2**62 elements": lambda: archived(entries(col_indices=npy((2**62,)))),
    "2**70 elements": lambda: archived(entries(col_indices=npy((2**70,)))),
    "2**80 elements in two sizes": lambda: archived(entries(col_indices=npy((2**40, 2**40)))),
    "negative sizes": lambda: archived(entries(col_indices=npy((-1, -5), bytes(20)))),
    "sizes of no numbers": lambda: archived(entries(col_indices=npy((5.0,), bytes(20)))),
    "an array alone": lambda: npy((2**40,)),
    "an open header": lambda: archived(entries(soma_ptr=npy(0, header="{'descr': ("))),
    "an open text in a header": lambda: archived(entries(soma_ptr=npy(0, header="'''"))),
    "a wrong indent in a header": lambda: archived(entries(soma_ptr=npy(0, header=" \n  x\n y"))),
    "a deep header": lambda: archived(entries(soma_ptr=npy(0, header="(" * 900 + ")" * 900))),
    "a header of signs": lambda: archived(entries(soma_ptr=npy(0, header="-" * 9000 + "1"))),
    "no header": lambda: archived(entries(soma_ptr=b"")),
    "a header of version 9": lambda: archived(entries(soma_ptr=b"\x93NUMPY\x09\x00\x00\x00")),
    "sizes too many": lambda: archived(entries(in_shape=np.ones((2, 2), np.int64))),
    "sizes that are infinite": lambda: archived(entries(in_features=np.array(np.inf))),
    "sizes that are no integers": lambda: archived(entries(in_features=np.array(4.0))),
    "sizes as text": lambda: archived(entries(in_features=np.array("4"))),
    "several sizes": lambda: archived(entries(in_features=np.array([4, 4]))),
    "an infinite version": lambda: archived(entries(version=np.array(np.inf))),
    "a negative version": lambda: archived(entries(version=np.array(-1))),
    "pointers of two dimensions": lambda: archived(entries(crow_indices=np.zeros((2, 2), int))),
    "pointers as floats": lambda: archived(entries(crow_indices=np.array([0.0, 2, 2, 5]))),
    "falling pointers": lambda: archived(entries(crow_indices=np.array([0, 3, 2, 5]))),
    "falling pointers, unsigned": lambda: archived(entries(soma_ptr=np.array([0, 2**32, 3], "u8"))),
    "columns that repeat": lambda: archived(entries(col_indices=np.array([1, 1, 0, 1, 2]))),
    "columns below 0": lambda: archived(entries(col_indices=np.array([-1, 3, 0, 1, 2]))),
    "columns past 2**32": lambda: archived(entries(col_indices=np.array([1, 2**32 + 3, 0, 1, 2]))),
    "structured columns": lambda: archived(entries(col_indices=np.zeros(5, [("a", "i4")]))),
    "names of no JSON": lambda: archived(entries(labels=np.frombuffer(b"\xff{", np.uint8))),
    "names as a huge number": lambda: archived(
        entries(labels=np.frombuffer(b'{"inputs": [' + b"9" * 5000 + b"]}", np.uint8))
    ),
    "names twice": lambda: archived(
        entries(labels=np.frombuffer(b'{"inputs": null, "inputs": [1]}', np.uint8))
    ),
    "a name outside": lambda: archived({"../" + n: data for n, data in entries().items()}),
    "one more": lambda: archived(entries(more=np.zeros(3))),
    "a folder": lambda: archived({**entries(), "folder/": b""}),
    "an array twice": lambda: archived(entries(), twice="col_indices.npy"),
    "an array under two names": lambda: archived(
        {**entries(), "version": entries()["version.npy"]}
    ),
    "packed by deflate": lambda: archived(entries(), zipfile.ZIP_DEFLATED),
    "packed by bzip2": lambda: archived(entries(), zipfile.ZIP_BZIP2),
    "packed by lzma": lambda: archived(entries(), zipfile.ZIP_LZMA),
    "a zip bomb": bomb,
    "an entry of 4 GiB": lambda: claimed(2**32 - 2),
}  # fmt: skip


@pytest.mark.parametrize("make", ARCHIVES.values(), ids=ARCHIVES)
def test_hostile_archives(make: Callable[[], bytes], tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(make())
    with (
        little_memory(),
        pytest.raises(ValueError, match=r"Expected a file written by Connectivity\.save, got"),
    ):
        Connectivity.load(path)


def described(**model: Any) -> str:
    """The header of a file that holds a DendriticLayer, changed."""
    options = {name: getattr(mixed()[0], name) for name in dk.DendriticLayer.OPTIONS}
    found = {"type": "DendriticLayer", **options, **model}
    return json.dumps({"version": 2, "evaluating": [], "frozen": [], "model": found})


HEADERS = {
    "a slope of 400 digits": described(negative_slope=10**400),
    "a slope of 5000 digits": described().replace("0.1", "1" * 5000),
    "a slope that is NaN": described(negative_slope=float("nan")),
    "a slope that is infinite": described(negative_slope=float("inf")),
    "a deep model": '{"version": 2, "model": ' + '{"type": "Sequential", "children": {"0": ' * 9000,
    "a name that is no text": json.dumps(
        {"version": 2, "evaluating": [], "frozen": [[]], "model": json.loads(described())["model"]}
    ),
    "an activation of a list": described(activation=[]),
    "keys twice": described().replace('"version": 2', '"version": 2, "version": 3'),
}


@pytest.mark.parametrize("text", HEADERS.values(), ids=HEADERS)
def test_hostile_headers_of_layers(text: str, tmp_path: Path) -> None:
    path, state = tmp_path / "file", mixed()[0].state_dict()
    save_file(state, path, {"dendrite_kernels": described()})
    dk.load(path)
    save_file(state, path, {"dendrite_kernels": text})
    with pytest.raises(ValueError, match=r"Expected a file written by dendrite_kernels\.save, got"):
        dk.load(path)


@pytest.mark.parametrize("shape", [[2**62], [2**31, 2**31], [2**40, 0, 2**62], [-1], [5.0], None])
def test_safetensors_that_claim(shape: Any, tmp_path: Path) -> None:
    path = tmp_path / "file"
    data = model_seed(mixed())
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["0.synapse_weight"]["shape"] = shape
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    with little_memory(), pytest.raises(ValueError, match="Expected a file written by"):
        dk.load(path)
    with pytest.raises(Exception, match=r".*"), safe_open(path, "pt"):
        pass


def test_sizes_cost_no_memory_by_themselves(tmp_path: Path) -> None:
    """A layer on 2**31 - 1 inputs with one synapse."""
    path, c = tmp_path / "file", Connectivity.from_csr([0, 1], [7], 2**31 - 1)
    c.save(path)
    with little_memory():
        assert Connectivity.load(path) == c
    dk.save(dk.SparseLinear(c), path)
    with little_memory():
        assert dk.load(path).connectivity == c


# Code


def test_no_file_runs_code(tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", tmp_path / "file"
    pickled = pickle.dumps(Evil(canary))
    pickle.loads(pickled).close()
    canary.unlink()  # so this is what would be left

    objects = np.array([Evil(canary), None], object)
    files: list[bytes] = [pickled, archived(entries(format=objects)), archived({"x": pickled})]
    for name in ("col_indices", "labels", "more"):
        files.append(archived(entries(**{name: objects})))
    file = io.BytesIO()
    np.save(file, objects, allow_pickle=True)
    files.append(file.getvalue())
    file = io.BytesIO()
    torch.save(Evil(canary), file)
    files.append(file.getvalue())
    for data in files:
        path.write_bytes(data)
        for loader in LOADERS.values():
            with pytest.raises(ValueError, match="Expected a"):
                loader.read(path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    assert not canary.exists()


NEW_OBJECT = b"\x80\x02cdendrite_kernels.structure\nConnectivity\n)\x81"
SET_STATE = b"}(X\x03\x00\x00\x00nnzK\x05ub."


def test_pickles_set_no_attribute_of_a_connectivity(tmp_path: Path) -> None:
    """torch.load(weights_only=True) would: then kernels would trust what was never checked."""
    path = tmp_path / "file"
    torch.save(small(), path)
    assert torch.load(path, weights_only=True) == small()
    with zipfile.ZipFile(path) as archive:
        made = archive.read("file/data.pkl")
    for hostile in (NEW_OBJECT + SET_STATE, made[:-1] + SET_STATE):
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in (("data.pkl", hostile), ("version", b"3\n")):
                archive.writestr(f"file/{name}", data)
        with pytest.raises(pickle.UnpicklingError, match="Connectivity"):
            torch.load(path, weights_only=True)
