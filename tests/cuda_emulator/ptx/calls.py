"""The C functions at the end of runtime.cpp, by ctypes."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class Library:
    """A module or library that build.py made."""

    def __init__(self, path: Path | str) -> None:
        self._functions = ctypes.CDLL(str(path))
        self._functions.ptx_report.restype = ctypes.c_char_p

    def announce(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Allow the next launch these (address, bytes) and nothing else."""
        numbers = [number for pair in ranges for number in pair]
        array = (ctypes.c_uint64 * len(numbers))(*numbers)
        if not self._functions.ptx_tensors(array, len(numbers) // 2):
            raise ValueError("Expected tensors that do not overlap, got others")

    def launch(self, name: str, blocks: int, threads: int, shared: int, parameter: bytes) -> None:
        """Run an entry point; `shared` is in bytes."""
        if not self._functions.ptx_launch(
            name.encode(), blocks, threads, ctypes.c_size_t(shared), parameter
        ):
            raise ValueError(f"Expected an entry point, got {name}")

    def set_order(self, order: int) -> None:
        """Of threads, as in emulator.h."""
        self._functions.ptx_set_order(order)

    def report(self) -> dict[str, Any]:
        """Launches by entry point, faults by kind, accesses in bytes."""
        report: dict[str, Any] = json.loads(self._functions.ptx_report())
        return report
