"""Peak memory of a function: resident pages of a fresh process, as Linux counts them."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")


def in_fresh_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call `function` in a new interpreter, so that earlier peaks do not hide its own.

    Exceptions are raised here, too.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


class PeakMemory:
    """Growth of the peak of resident memory, in MiB; None where the system does not report it.

    The peak is VmHWM of this process. ru_maxrss would be wrong: it survives exec, so a child would
    start with the peak of its parent. Writing 5 to clear_refs resets VmHWM. Where that is not
    allowed, an older peak may be higher, and the growth is a lower bound.
    """

    def __init__(self) -> None:
        self.forget_peak()
        self._start = _status_mib("VmRSS")

    def forget_peak(self) -> None:
        """Reset the peak to what is resident now; growth is still counted from the start."""
        gc.collect()
        _return_free_heap()
        with contextlib.suppress(OSError):  # then growth() is a lower bound
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> float | None:
        """All that was resident at the peak, the process's code included."""
        return _status_mib("VmHWM")

    def growth(self) -> float | None:
        peak = self.peak()
        return None if peak is None or self._start is None else max(0.0, peak - self._start)


def _return_free_heap() -> None:
    """Return freed pages to the system (glibc), so that reusing them counts as growth."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status_mib(field: str) -> float | None:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) / 1024 if found else None
