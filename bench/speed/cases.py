"""The workloads that every speed figure of this package is measured on (float32)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import dendrite_kernels as dk


@dataclass(frozen=True)
class Case:
    """B images of height x width x channels; S somas of D dendrites of K synapses."""

    name: str
    batch: int
    height: int
    width: int
    channels: int
    somas: int
    dendrites: int
    synapses: int

    @property
    def in_features(self) -> int:
        return self.height * self.width * self.channels

    @property
    def rows(self) -> int:
        return self.somas * self.dendrites

    def connectivity(self, kind: str, seed: int = 0) -> dk.Connectivity:
        return KINDS[kind](self, seed)

    def __str__(self) -> str:
        return (
            f"{self.name}: B={self.batch} N={self.in_features} S={self.somas} "
            f"D={self.dendrites} K={self.synapses}"
        )


def _constant(case: Case, seed: int) -> dk.Connectivity:
    return dk.connectivity.random(
        case.in_features, case.somas, case.dendrites, case.synapses, constant_fan_in=True, seed=seed
    )


def _variable(case: Case, seed: int) -> dk.Connectivity:
    return dk.connectivity.random(
        case.in_features, case.somas, case.dendrites, case.synapses, seed=seed
    )


def _local(case: Case, seed: int) -> dk.Connectivity:
    return dk.connectivity.local_receptive_fields(
        (case.height, case.width),
        case.somas,
        case.dendrites,
        case.synapses // case.channels,
        channels=case.channels,
        seed=seed,
    )


# random inputs with K for every dendrite; the paper's rule R, K on average; its rule LRF
KINDS: dict[str, Callable[[Case, int], dk.Connectivity]] = {
    "constant": _constant,
    "variable": _variable,
    "local": _local,
}

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
