"""The .npz file behind `Connectivity.save` and `Connectivity.load`."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ._replace import replaced
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
_UNREADABLE = (
    EOFError, IndexError, KeyError, OSError, RuntimeError, TypeError, ValueError,
    zipfile.BadZipFile, zlib.error,
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
    with open(path, "rb") as file:
        try:
            archive = np.load(file, allow_pickle=False)
            found = str(archive["format"]), int(archive["version"])
            if found[0] != _FORMAT or found[1] > _FORMAT_VERSION:
                raise ValueError(f"its format is {found[0]!r}, version {found[1]}")
            if not set(archive.files) <= _NAMES:  # a damaged name: what it names would be lost
                raise ValueError(f"it holds {sorted(set(archive.files) - _NAMES)}")
            return build(**_arguments(archive))
        except _UNREADABLE as error:
            expected = "Expected a file written by Connectivity.save"
            raise ValueError(f"{expected}, got {os.fspath(path)}: {error}") from error


def _arguments(archive: Any) -> dict[str, Any]:
    return {
        "crow_indices": archive["crow_indices"],
        "col_indices": archive["col_indices"],
        "soma_ptr": archive["soma_ptr"],
        "in_features": int(archive["in_features"]),
        "in_shape": archive["in_shape"].tolist() or None,
        # older files have none
        "channels_first": "channels_first" in archive and bool(archive["channels_first"]),
        "labels": from_json(archive["labels"].tobytes().decode()) if "labels" in archive else None,
    }


def _bytes(labels: Labels) -> Array:
    return np.frombuffer(to_json(labels).encode(), np.uint8)
