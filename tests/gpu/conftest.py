"""Everything here needs an NVIDIA GPU and the extension _cuda; without them it is skipped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dendrite_kernels as dk

# cuBLAS needs this for deterministic algorithms, which the tests switch on to fill memory with NaN.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    entry = dk.backend_info()["cuda"]
    if entry["available"]:
        return
    for item in items:  # pytest passes those of the whole session
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(f"backend cuda: {entry['reason']}"))


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    was = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = was


@pytest.fixture
def backend() -> Iterator[str]:
    """The only backend with kernels for GPUs."""
    with dk.use_backend("cuda"):
        yield "cuda"
