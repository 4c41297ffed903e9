"""The .npz file behind `Connectivity.save` and `Connectivity.load`."""

from __future__ import annotations

import io
import os
import struct
import tokenize
import zipfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import numpy as np

from ._replace import check_regular, replaced
from ._validate import Array
from .labels import Labels, from_json, to_json

if TYPE_CHECKING:
    from .structure import Connectivity

T = TypeVar("T")

_FORMAT = "dendrite_kernels.Connectivity"
_FORMAT_VERSION = 1
_NAMES = {
    "format", "version", "in_features", "in_shape", "channels_first", "crow_indices", "col_indices",
    "soma_ptr", "labels",
}  # fmt: skip
_LONGEST_HEADER = 1000  # of an array, in characters; numpy writes about 120, and parses them
_UNREADABLE = (
    EOFError, KeyError, OSError, OverflowError, RuntimeError, SyntaxError, TypeError, ValueError,
    struct.error, tokenize.TokenError, zipfile.BadZipFile,
)  # fmt: skip


def write(c: Connectivity, path: str | os.PathLike[str]) -> None:
    """See `Connectivity.save`."""
    shape = [] if c.in_shape is None else list(c.in_shape)
    labels: dict[str, Any] = {} if c.labels is None else {"labels": _bytes(c.labels)}
    with replaced(path) as temporary, open(temporary, "xb") as file:
        np.savez(
            file,
            # The optional ones first: a damaged length in the archive's directory hides what comes
            # after it, and one of the others is missed.
            channels_first=np.array(c.channels_first),
            **labels,
            format=np.array(_FORMAT),
            version=np.array(_FORMAT_VERSION),
            in_features=np.array(c.in_features),
            in_shape=np.array(shape, np.int64),
            crow_indices=c.crow_indices.numpy(),
            col_indices=c.columns,
            soma_ptr=c.soma_ptr.numpy(),
        )


def read(path: str | os.PathLike[str], build: Callable[..., T]) -> T:
    """What `build` makes of the arguments of a Connectivity; see `Connectivity.load`."""
    check_regular(path)
    with open(path, "rb") as file:
        try:
            arrays = _arrays(file)
            found = str(arrays["format"]), int(arrays["version"])
            if found != (_FORMAT, _FORMAT_VERSION):
                raise ValueError(f"its format is {found[0]!r}, version {found[1]}")
            if not arrays.keys() <= _NAMES:  # a damaged name: what it names would be lost
                raise ValueError(f"it holds {sorted(arrays.keys() - _NAMES)}")
            return build(**_arguments(arrays))
        except _UNREADABLE as error:
            expected = "Expected a file written by Connectivity.save"
            raise ValueError(f"{expected}, got {os.fspath(path)}: {error}") from error


def _arrays(file: BinaryIO) -> dict[str, Array]:
    """All of an archive, in memory no larger than the file.

    numpy's reader takes compressed entries and makes room for what a header claims: a small file
    could fill the memory.
    """
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        names = [entry.filename.removesuffix(".npy") for entry in entries]
        if len(set(names)) < len(names):
            raise ValueError("it holds several arrays of one name")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("its arrays are compressed")
        if sum(entry.file_size for entry in entries) > os.fstat(file.fileno()).st_size:
            raise ValueError("its arrays are larger than the file")
        return {
            name: _array(archive.read(entry)) for name, entry in zip(names, entries, strict=True)
        }


def _array(data: bytes) -> Array:
    """The array of an .npy file, without a copy."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"it holds an array of version {version}")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file, _LONGEST_HEADER)
    values: Array = np.frombuffer(data, dtype, offset=file.tell())  # which takes no objects
    return values.reshape(shape)


def _arguments(arrays: dict[str, Array]) -> dict[str, Any]:
    return {
        "crow_indices": arrays["crow_indices"],
        "col_indices": arrays["col_indices"],
        "soma_ptr": arrays["soma_ptr"],
        "in_features": arrays["in_features"].item(),
        "in_shape": arrays["in_shape"].tolist() or None,
        # older files have none
        "channels_first": "channels_first" in arrays and bool(arrays["channels_first"]),
        "labels": from_json(arrays["labels"].tobytes().decode()) if "labels" in arrays else None,
    }


def _bytes(labels: Labels) -> Array:
    return np.frombuffer(to_json(labels).encode(), np.uint8)
