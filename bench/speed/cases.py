"""The workloads that every speed figure of this package is measured on (float32)."""

from __future__ import annotations

from dendrite_kernels.benchmark.case import Case

CASES = {
    case.name: case
    for case in (
        Case("A", 128, 28, 28, 1, 256, 16, 16),  # the paper's layer
        Case("B", 128, 28, 28, 1, 512, 64, 16),
        Case("C", 128, 32, 32, 3, 512, 32, 48),
        Case("D", 256, 64, 64, 1, 4096, 16, 32),
        Case("W", 256, 128, 128, 1, 2048, 16, 32),  # wide: few synapses for each input
        Case("E1", 1, 28, 28, 1, 256, 16, 16),  # latency
        Case("E16", 16, 28, 28, 1, 256, 16, 16),
        Case("F", 4096, 28, 28, 1, 256, 16, 16),  # throughput
    )
}
GROUPS = {"E": ("E1", "E16")}


def find(names: list[str]) -> list[Case]:
    """Cases by name; E means both of its batches. ValueError for an unknown one."""
    chosen = [part for name in names for part in GROUPS.get(name, (name,))]
    for name in chosen:
        if name not in CASES:
            raise ValueError(f"Expected cases of {[*CASES, *GROUPS]}, got {name!r}")
    return [CASES[name] for name in dict.fromkeys(chosen)]
