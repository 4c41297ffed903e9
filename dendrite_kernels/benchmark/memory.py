"""Peak memory of a piece of work: resident pages of a fresh process, as Linux counts them."""

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
    """Call `function` in a new interpreter, where no earlier work hides its peak.

    Errors come back as they were raised.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


class PeakMemory:
    """Growth of the peak of resident memory, in MiB; None where the system does not tell.

    The peak is the kernel's high-water mark of this process (VmHWM), not ru_maxrss: that one
    survives exec, so a child would start with its parent's peak. Writing 5 to clear_refs resets the
    mark; where that is not allowed the growth over an older, higher peak is a lower bound.
    """

    def __init__(self) -> None:
        self.forget_peak()
        self._start = _status_mib("VmRSS")

    def forget_peak(self) -> None:
        """Start a new peak from what is resident now; the start of the growth stays."""
        gc.collect()
        _return_free_heap()
        with contextlib.suppress(OSError):  # then growth() is the docstring's lower bound
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> float | None:
        """All that was resident at the peak, the process's code included."""
        return _status_mib("VmHWM")

    def growth(self) -> float | None:
        peak = self.peak()
        return None if peak is None or self._start is None else max(0.0, peak - self._start)


def _return_free_heap() -> None:
    """Hand freed pages back (glibc), else work that reuses them would seem to need none."""
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
