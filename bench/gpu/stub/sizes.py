"""Tiny sizes for the emulator; as a plugin of pytest, the same for tests/gpu."""

from __future__ import annotations

import pytest

from bench.gpu import clock, memory, problem, timing
from dendrite_kernels.benchmark.case import Case

CASES = {
    "A": Case("A", 40, 6, 6, 1, 8, 4, 4),
    "B": Case("B", 33, 6, 6, 1, 8, 8, 4),
    "C": Case("C", 33, 4, 4, 3, 8, 4, 12),
    "D": Case("D", 70, 8, 8, 1, 16, 4, 8),
    "G": Case("G", 33, 9, 9, 1, 16, 4, 8),
}
NEEDS_A_DEVICE: tuple[str, ...] = ()


def shrink() -> None:
    problem.CASES.update(CASES)
    problem.ORACLE_BYTES = 1 << 16
    clock.SAMPLES = 3
    timing.COPIED = 1 << 20
    memory.FIRST, memory.LIMIT, memory.BUDGET_GB = 40, 200, 5e-4
    memory.BATCH, memory.DENDRITES = 9, 2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        module = getattr(item, "module", None)
        if hasattr(module, "SIZES"):
            module.SIZES.update({name: (33, 40, 6, 4, 5) for name in module.SIZES})
        if item.name in NEEDS_A_DEVICE:
            item.add_marker(pytest.mark.skip(reason="dry run: no device"))
