"""The CUDA backend: not part of this version; says so instead of computing elsewhere."""

from __future__ import annotations

from typing import Any


def unavailable() -> str | None:
    return (
        "this version of dendrite_kernels has no CUDA kernels; move the layer and its input to the"
        " CPU, or choose use_backend('reference'), which is dense and slow"
    )


def info() -> dict[str, Any]:
    return {}
