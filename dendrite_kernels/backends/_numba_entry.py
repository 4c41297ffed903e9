"""From Python source to machine code that torch's thread pool, or CPython, can call."""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numba
from numba.core import types

from . import _numba_tasks
from ._numba_kernels import JOB
from ._numba_token import Spec

_SIGNATURE = types.void(types.int64, types.int64, JOB)
_SOURCES = (
    "_numba_token.py",
    "_numba_vector.py",
    "_numba_operations.py",
    "_numba_kernels.py",
    "_numba_backward.py",
    "_numba_tasks.py",
)
_compiled: dict[tuple[str, Spec], Any] = {}
_lock = threading.Lock()
_uncached: str | None = None  # why compiled code is not kept on disk, None as long as it is


def address(task: str, spec: Spec) -> int:
    """Of the native function that does tasks [begin, end) of a job; compiled at the first call."""
    key = task, spec
    if key not in _compiled:
        with _lock:
            if key not in _compiled:
                # Numba's cache tells entries apart by their code and what they close over: spec.
                make = getattr(_numba_tasks, f"{task}_tasks")
                _compiled[key] = compiled(make(replace(spec, build=_fingerprint())), _SIGNATURE)
    function: int = _compiled[key].address
    return function


def cache_state() -> str:
    """Whether compiled code is kept for later processes."""
    return "on" if _uncached is None else f"off: {_uncached}"


def compiled(entry: Callable[..., Any], signature: Any) -> Any:
    """Load from Numba's cache or compile; without the cache where that cannot be had: a read-only
    installation and an unwritable home, a full disk, a damaged file.
    """
    global _uncached
    options = {"boundscheck": False, "error_model": "numpy"}
    if _uncached is None:
        try:
            return numba.cfunc(signature, cache=True, **options)(entry)
        except Exception as error:
            _uncached = f"{type(error).__name__}: {error}"
    return numba.cfunc(signature, **options)(entry)


@functools.cache
def _fingerprint() -> str:
    """Of the sources: Numba's cache looks only at the file of the outermost function."""
    folder = Path(__file__).parent
    digest = hashlib.blake2b(digest_size=8)
    for name in _SOURCES:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()
