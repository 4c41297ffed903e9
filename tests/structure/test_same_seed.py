"""A promise: the same seed gives the same network in every version of this package.

The values come from the first version of each rule. Do not change them to make a test pass. numpy
itself promises less (NEP 19): a later numpy may change a stream, and with it these networks.
"""

from __future__ import annotations

import hashlib
import inspect
from functools import partial
from typing import Any

import numpy as np
import pytest

from dendrite_kernels import Connectivity, centres, connectivity, models

random, all_to_all = connectivity.random, connectivity.all_to_all
local, spread = connectivity.local_receptive_fields, connectivity.global_receptive_fields
constant = partial(random, constant_fan_in=True)


def digest(networks: list[Connectivity]) -> str:
    pointers_and_columns = [a for c in networks for a in (c.crow_indices, c.col_indices)]
    data = np.concatenate([a.numpy() for a in pointers_and_columns]).astype("<i4").tobytes()
    return hashlib.sha256(data).hexdigest()[:12]


# What is called twice with one generator of seed 5, the first columns, the digest of both networks.
DRAWS: list[tuple[partial[Connectivity], list[int], str]] = [
    (
        partial(random, 784, 20, 16, 12),
        [0, 149, 155, 200],
        "7f2e147881f3",
    ),  # K <= N / 50: numpy's other method
    (partial(random, 784, 20, 16, 16), [0, 90, 192, 345], "6b169c3b0aa4"),
    (partial(constant, 784, 20, 16, 16), [17, 35, 42, 102], "76b2fc306d56"),
    (
        partial(constant, 784, 640, 16, 16),
        [17, 35, 42, 102],
        "b87b3babc76f",
    ),  # more than one chunk: 10,240 rows, 4,096 each
    (
        partial(constant, 784, 20, 16, 40),
        [50, 120, 121, 164],
        "519bdd2278e7",
    ),  # K * K > N: permutations, 83 rows a chunk
    (partial(local, (28, 28), 20, 16, 5), [497, 525, 552, 553], "45d0366a89af"),
    (
        partial(local, (28, 28), 100, 16, 16),
        [467, 468, 470, 496],
        "c4fd989f2535",
    ),  # 1,600 rows, 1,337 a chunk
    (
        partial(local, (9, 14), 20, 16, 16, channels=3, channels_first=True),
        [56, 57, 58, 70],
        "c9e47943afde",
    ),
    (partial(spread, (28, 28), 100, 16, 16), [414, 416, 417, 442], "c30a159ca9bc"),
    (partial(spread, (9, 14), 20, 4, 16, channels=3), [126, 127, 128, 129], "753be8ccfbfb"),
    (
        partial(local, (9, 14), 20, 16, 16, centres=centres.random_limited(6)),
        [65, 66, 67, 68],
        "cdac67429079",
    ),
    (
        partial(local, (9, 14), 20, 16, 16, centres=centres.semirandom()),
        [79, 91, 92, 93],
        "6a3c5e0fa20f",
    ),
    (partial(local, (9, 14), 20, 16, 16, centres=centres.serial(2)), [0, 1, 2, 3], "7128eba887f6"),
    (
        partial(spread, (9, 14), 20, 16, 16, centres=centres.semirandom(0.4)),
        [18, 20, 31, 32],
        "4d18919396e7",
    ),
]


@pytest.mark.parametrize(("rule", "columns", "expected"), DRAWS)
def test_draws(rule: partial[Connectivity], columns: list[int], expected: str) -> None:
    rng = np.random.default_rng(5)
    networks = [rule(seed=rng), rule(seed=rng)]
    assert networks[0].col_indices[: len(columns)].tolist() == columns
    assert digest(networks) == expected


# kind and the digest of the connectivities of two layers, seed 5.
NETWORKS = {
    "dANN-R": "5352a1e0e12d",
    "dANN-LRF": "619b1f1bee10",
    "sANN-GRF": "f42843b7b5c2",
    "vANN-GRF": "ab927e70c114",
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_networks(kind: Any) -> None:
    model = models.build(kind, (28, 28), 32, 4, 16, 10, layers=2, seed=5)
    layers = [m.connectivity for m in model if hasattr(m, "connectivity")]
    assert digest(layers) == NETWORKS[kind]


def test_every_rule_that_draws_is_pinned() -> None:
    rules = [
        f
        for name, f in inspect.getmembers(connectivity, inspect.isfunction)
        if not name.startswith("_") and "seed" in inspect.signature(f).parameters
    ]
    assert {rule.func for rule, *_ in DRAWS} == set(rules)
    assert any(rule.keywords.get("constant_fan_in") for rule, *_ in DRAWS)
    of_centres = {
        name
        for name, f in inspect.getmembers(centres, inspect.isfunction)
        if not name.startswith("_") and f.__module__ == centres.__name__
    }
    used = [rule.keywords["centres"] for rule, *_ in DRAWS if "centres" in rule.keywords]
    assert {f.func.__name__.removeprefix("_") for f in used} == of_centres
