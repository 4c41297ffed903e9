"""The fuzz targets by name, with seeds that a fuzzer starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from torch import nn

import dendrite_kernels as dk
from dendrite_kernels import Connectivity
from tests.fuzz import binding, loaders, states
from tests.networks import small


class Target(NamedTuple):
    run: Callable[[bytes], None]  # raises what is a finding
    seeds: Callable[[], Iterator[bytes]]


def some() -> list[Connectivity]:
    """Of each form that files tell apart."""
    named = Connectivity.from_edges(["a", "b", "a"], [1, 1, 2], ["x", "x", "y"])
    image = dk.connectivity.local_receptive_fields((3, 2), 2, 2, 2, channels=2, seed=0)
    return [small(), named, image, dk.connectivity.all_to_all(3, 2, 2)]


def choices() -> Iterator[bytes]:
    """For targets that choose by bytes."""
    rng = np.random.default_rng(0)
    for size in (8, 24, 64):
        for _ in range(8):
            yield rng.bytes(size)


TARGETS = {
    "npz": Target(loaders.npz, lambda: map(loaders.npz_seed, some())),
    "model": Target(
        loaders.model, lambda: map(loaders.model_seed, (loaders.mixed(), states.tree(), nn.ReLU()))
    ),
    "header": Target(
        loaders.header, lambda: map(loaders.header_seed, (loaders.mixed(), nn.Softmax(1)))
    ),
    "packed": Target(loaders.packed, lambda: map(loaders.packed_seed, some())),
    "names": Target(loaders.names, lambda: iter([b'{"inputs": ["a", 1], "somas": null}'])),
    "pickled": Target(loaders.pickled, lambda: map(loaders.pickled_seed, [*some(), {"a": [1]}])),
    "keras": Target(
        loaders.keras, lambda: map(loaders.keras_seed, ("keras 2 model", "keras 3 numbered"))
    ),
    "state": Target(states.state, choices),
    "table": Target(states.table, choices),
    "binding": Target(binding.binding, choices),
}
