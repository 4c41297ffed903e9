"""Fuzz targets: bytes into every loader. What comes out is valid, or one of its errors does."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import tempfile
import zipfile
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import dendrite_kernels as dk
from dendrite_kernels import Connectivity, interop, labels, packing
from tests.networks import small
from tests.nn.test_interop_formats import keras_network, write

FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-"))
FILE = FOLDER / "file"


def check(c: Connectivity) -> None:
    """What a loader returns passes the checks of the class once more."""
    arrays = c.crow_indices, c.col_indices, c.soma_ptr
    assert all(a.dtype == torch.int32 for a in arrays)
    image = c.in_shape, c.channels_first
    assert Connectivity(*arrays, c.in_features, *image, c.labels) == c


def check_model(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, (dk.DendriticLayer, dk.SparseLinear)):
            check(module.connectivity)
            assert next(module.parameters()).numel() == module.connectivity.nnz


def mixed() -> nn.Sequential:
    return nn.Sequential(
        dk.DendriticLayer(small()), nn.Linear(2, 4), dk.SparseLinear(small(), bias=False)
    )


def npz(data: bytes) -> None:
    FILE.write_bytes(data)
    with contextlib.suppress(ValueError):
        check(Connectivity.load(FILE))


def npz_seed(c: Connectivity) -> bytes:
    c.save(FILE)
    return FILE.read_bytes()


def model(data: bytes) -> None:
    FILE.write_bytes(data)
    with contextlib.suppress(ValueError):
        check_model(dk.load(FILE))


def model_seed(module: nn.Module) -> bytes:
    dk.save(module, FILE)
    return FILE.read_bytes()


def header(data: bytes) -> None:
    """The JSON in the header of such a file, beside good tensors."""
    text = data.decode(errors="replace")
    save_file(mixed().state_dict(), FILE, {"dendrite_kernels": text})
    with contextlib.suppress(ValueError):
        check_model(dk.load(FILE))


def header_seed(module: nn.Module) -> bytes:
    data = model_seed(module)
    size = int.from_bytes(data[:8], "little")
    text: str = json.loads(data[8 : 8 + size])["__metadata__"]["dendrite_kernels"]
    return text.encode()


def packed(data: bytes) -> None:
    """With the right checksum, which would stop the fuzzer."""
    nnz, body = data[:1], bytearray(data[1:])
    if len(body) >= 24:
        struct.pack_into("<q", body, 16, zlib.crc32(body[24:]))
    with contextlib.suppress(ValueError):
        check(
            packing.unpack(torch.frombuffer(body or bytearray(1), dtype=torch.uint8), *nnz or [0])
        )


def packed_seed(c: Connectivity) -> bytes:
    return bytes([c.nnz, *packing.pack(c).tolist()])


def names(data: bytes) -> None:
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        labels.checked(labels.from_json(data.decode()), (2, 2, 2))


def pickled(data: bytes) -> None:
    """The pickle in a file of torch.save, read with weights_only: no connectivity unchecked."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in (("data.pkl", data), ("version", b"3\n"), ("byteorder", b"little")):
            archive.writestr(f"archive/{name}", content)
    file.seek(0)
    try:
        found = torch.load(file, weights_only=True)
    except Exception:  # whatever torch says
        return
    if isinstance(found, Connectivity):
        check(found)


def pickled_seed(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    with zipfile.ZipFile(file) as archive:
        return archive.read("archive/data.pkl")


def keras(data: bytes) -> None:
    FILE.write_bytes(data)
    with contextlib.suppress(ValueError):
        check_model(interop.from_keras(FILE))


def keras_seed(form: str) -> bytes:
    write(FILE, form, keras_network(True)[1])
    return FILE.read_bytes()
