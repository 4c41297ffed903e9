"""Shared fixtures: the backends under test, poisoned memory, random networks."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler

import dendrite_kernels as dk

REQUIRED = set(filter(None, os.environ.get("DENDRITE_KERNELS_REQUIRE", "").split(",")))
_BACKEND_OF = {"cpu": "cpp", "cuda": "cuda"}


def pytest_report_header() -> list[str]:
    report = dk.backend_info()
    return [
        f"backend {name}: {'available' if entry['available'] else entry['reason']}"
        for name, entry in report.items()
    ]


def pytest_sessionstart() -> None:
    """Backends named in DENDRITE_KERNELS_REQUIRE must work: a broken build fails the run."""
    for extension in REQUIRED:
        dk.use_backend(_BACKEND_OF[extension])
    dk.use_backend(None)


@pytest.fixture(autouse=True, scope="session")
def two_threads() -> None:
    """Enough to run threaded code; on a shared machine more would wait for free cores."""
    torch.set_num_threads(2)


@pytest.fixture(params=["cpp", "numba", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on every backend; skips missing ones with the reason."""
    name: str = request.param
    entry = dk.backend_info()[name]
    if not entry["available"]:
        pytest.skip(f"backend {name}: {entry['reason']}")
    with dk.use_backend(name):
        yield name


@pytest.fixture
def inductor() -> None:
    """Skips if torch.compile finds no C++ compiler, which it needs for every backend."""
    try:
        cpp_builder.get_cpp_compiler()
    except InvalidCxxCompiler as error:
        pytest.skip(f"inductor: {error}".splitlines()[0])


def cpp_extension() -> Any:
    """The compiled module, or None where it was not built."""
    try:
        return importlib.import_module("dendrite_kernels._cpu")
    except ImportError:
        return None


def poison_memory() -> None:
    """Fill uninitialised tensors with NaN, to detect kernels that do not write all results."""
    extension = cpp_extension()
    if extension is not None:
        extension.poison_workspaces(True)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    was_filling = torch.utils.deterministic.fill_uninitialized_memory
    poison_memory()
    yield
    torch.use_deterministic_algorithms(was_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = was_filling


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
