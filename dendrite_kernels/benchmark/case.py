"""A layer and a batch by their sizes, and the rules that draw its connectivity."""

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
