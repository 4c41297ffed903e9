"""Who computes: one module per backend with the same few functions, never chosen silently.

cpp: C++ on the CPU. numba: the same on a machine without a compiler. cuda: NVIDIA GPUs.
reference: plain PyTorch, slow, dense, on any device.
"""

from __future__ import annotations

import importlib
import platform
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Literal, get_args

import torch

from .protocol import Backend

BackendName = Literal["cpp", "cuda", "numba", "reference"]
_NAMES = get_args(BackendName)
_BY_DEVICE = {"cpu": ("cpp", "numba"), "cuda": ("cuda",)}  # best first
_SERVES = {"cpp": "cpu", "numba": "cpu", "cuda": "cuda"}  # reference serves every device


class BackendUnavailable(RuntimeError):
    """The backend that was asked for, or every one for a device, cannot serve; says why."""


def _module(name: str) -> Any:
    return importlib.import_module(f".{name}", __name__)


def __getattr__(name: str) -> Any:
    """`dk.backends.numba` and its like, imported when first asked for."""
    if name in _NAMES:
        return _module(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _require(name: str) -> Backend:
    backend: Backend = _module(name)
    reason = backend.unavailable()
    if reason is not None:
        raise BackendUnavailable(f"Expected backend {name!r} to be available, got: {reason}")
    return backend


chosen: ContextVar[str | None] = ContextVar("chosen", default=None)  # by use_backend


class use_backend:
    """Choose the backend for all later calls of this thread; as a context manager, until its end.

    A context variable: other threads and asyncio tasks choose for themselves, and one that starts
    later begins with the default. A backward pass runs on the backend of its forward pass.

    Args:
        name: "cpp", "cuda", "numba" or "reference"; None: the best one for each tensor's device.

    Raises:
        ValueError: no such backend.
        BackendUnavailable: it cannot serve here; the message says why.
    """

    def __init__(self, name: BackendName | None) -> None:
        if name is not None:
            if name not in _NAMES:
                raise ValueError(f"Expected a backend of {list(_NAMES)}, got {name!r}")
            _require(name)
        self._previous = chosen.get()
        chosen.set(name)

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        chosen.set(self._previous)


# By device, not by its type: the name of a type is made anew each time, in half a microsecond.
_selected: dict[tuple[str | None, torch.device], Backend] = {}


def select(device: torch.device) -> Backend:
    """The chosen backend, or the best one for the device; raises rather than fall back unasked."""
    wanted = chosen.get()
    key = wanted, device
    found = _selected.get(key)
    if found is None:
        found = _selected[key] = _select(wanted, device.type)
    return found


def _select(wanted: str | None, device: str) -> Backend:
    if wanted is not None:
        if _SERVES.get(wanted, device) != device:
            raise BackendUnavailable(
                f"Expected tensors on {_SERVES[wanted]} for backend {wanted!r}, got {device}"
            )
        return _require(wanted)
    if device not in _BY_DEVICE:
        raise BackendUnavailable(
            f"Expected tensors on one of {sorted(_BY_DEVICE)}, got {device};"
            " use_backend('reference') serves any device, slowly"
        )
    reasons = []
    for name in _BY_DEVICE[device]:
        reason = _module(name).unavailable()
        if reason is None:
            return _require(name)
        reasons.append(f"{name}: {reason}")
    raise BackendUnavailable(
        f"Expected a backend for {device} tensors, got none. " + "; ".join(reasons)
    )


def backend_info() -> dict[str, dict[str, Any]]:
    """What each backend can do here: available, reason if not, ISA, threads, versions."""
    report = {}
    for name in _NAMES:
        backend: Backend = _module(name)
        reason = backend.unavailable()
        details = backend.info() if reason is None else {}
        report[name] = {"available": reason is None, "reason": reason, **details}
        report[name]["torch"] = torch.__version__
        report[name]["platform"] = platform.platform()
    return report
