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
# Of tests/gpu: a replay that computes, a capture that the backend knows of, two devices, and a
# compiler for the device.
NEEDS_A_DEVICE = (
    "test_a_capture_without_a_warm_up_is_an_error",
    "test_a_training_step_replays_as_a_graph",
    "test_operands_on_two_devices_are_an_error",
    "test_autocast_of_another_device_changes_nothing",
)
COMPILED = ("tests.operators.test_torch_compile", "tests.operators.test_torch_export")


def shrink() -> None:
    problem.CASES.update(CASES)
    problem.ORACLE_BYTES = 1 << 16
    clock.SAMPLES, clock.MOST_CALLS = 3, 2
    timing.COPIED = 1 << 20
    memory.FIRST, memory.LIMIT, memory.BUDGET_GB = 40, 200, 5e-4
    memory.BATCH, memory.DENDRITES = 9, 2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        sizes = getattr(getattr(item, "module", None), "SIZES", {})
        sizes.update(dict.fromkeys(sizes, (33, 40, 6, 4, 5)))
        if "network='32-bit'" in item.name:
            item.add_marker(pytest.mark.skip(reason="dry run: takes the emulator minutes"))
        module = getattr(getattr(item, "function", None), "__module__", "")
        is_compiled = module in COMPILED or item.name.startswith("test_compiled")
        if item.name.partition("[")[0] in NEEDS_A_DEVICE or is_compiled:
            item.add_marker(pytest.mark.skip(reason="dry run: no device"))
