"""What is wrong with a compiled module of this package, said before Python loads it."""

from __future__ import annotations

import os
import struct
from importlib.machinery import EXTENSION_SUFFIXES, all_suffixes

PACKAGE = os.path.dirname(os.path.dirname(__file__))


def is_built(name: str) -> bool:
    """Whether `_cpu` or `_cuda` lies in the package.

    Raises:
        ImportError: it is for another Python, or its file was cut short.
    """
    files = [file for file in os.listdir(PACKAGE) if file.startswith(f"{name}.")]
    ours = [file for file in files if file.removeprefix(name) in all_suffixes()]
    if files and not ours:
        raise ImportError(
            f"Expected {name}{EXTENSION_SUFFIXES[0]} for this Python, got {', '.join(files)} in "
            f"{PACKAGE}: install the package again with this Python"
        )
    for file in ours:
        if not _is_whole(os.path.join(PACKAGE, file)):
            raise ImportError(
                f"Expected a whole file, got {os.path.join(PACKAGE, file)}, which was cut short: "
                "install the package again"
            )
    return bool(files)


def _is_whole(path: str) -> bool:
    """False for an ELF file (64-bit, little-endian) that ends before its table of sections: the
    system would load it and end the process by a bus error.
    """
    with open(path, "rb") as file:
        head = file.read(64)
    if len(head) < 64 or head[:6] != b"\x7fELF\x02\x01":
        return True  # the system says itself what is wrong
    (start,) = struct.unpack_from("<Q", head, 40)
    size, count = struct.unpack_from("<HH", head, 58)
    return os.path.getsize(path) >= int(start + size * count)
