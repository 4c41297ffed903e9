"""Everything here needs an NVIDIA GPU and the extension _cuda; without them it is skipped."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import dendrite_kernels as dk

# Deterministic algorithms, which poison uninitialised memory, ask this of cuBLAS.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def needs_cuda() -> None:
    entry = dk.backend_info()["cuda"]
    if not entry["available"]:
        pytest.skip(f"backend cuda: {entry['reason']}")


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    was = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = was
