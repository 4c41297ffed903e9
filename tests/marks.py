"""Marks of tests that need one backend, or those with kernels of their own."""

from __future__ import annotations

import pytest

import dendrite_kernels as dk

needs_cpp = pytest.mark.skipif(
    not dk.backend_info()["cpp"]["available"], reason="the C++ backend was not built"
)
needs_numba = pytest.mark.skipif(
    not dk.backend_info()["numba"]["available"], reason="the Numba backend is unavailable"
)
kernels = pytest.mark.parametrize("backend", ["cpp", "numba"], indirect=True)
