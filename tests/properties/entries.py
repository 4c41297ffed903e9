"""The table of properties, and how many of all cases each gets."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import hypothesis
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

import dendrite_kernels as dk
from tests.properties import layers, states, structures
from tests.properties.stateful import LayerMachine
from tests.properties.strategies import Draw

BACKENDS = "cpp", "numba", "reference"


class Entry(NamedTuple):
    """A property, which raises where it does not hold, or a machine whose steps do."""

    holds: Callable[[Draw], None] | type[RuleBasedStateMachine]
    share: int
    computes: bool = True  # on a backend


# A new feature is a row here.
ENTRIES = {
    "sparse_linear": Entry(layers.sparse_linear, 4),
    "dendritic_layer": Entry(layers.dendritic_layer, 6),
    "SparseLinear": Entry(layers.linear_module, 2),
    "DendriticLayer": Entry(layers.layer_module, 3),
    "DendriticTree": Entry(layers.tree, 3),
    "wrong calls": Entry(layers.mistakes, 1),
    "portable": Entry(layers.portable, 1, computes=False),
    "Connectivity": Entry(structures.construction, 2, computes=False),
    "from_edges": Entry(structures.edges, 1, computes=False),
    "save, pickle, pack": Entry(structures.kept, 1, computes=False),
    "stack, block_diagonal": Entry(structures.combination, 1, computes=False),
    "chain": Entry(structures.chain, 1, computes=False),
    "state of layers": Entry(states.state, 2),
    "state of trees": Entry(states.tree_state, 1),
    "masked dense": Entry(states.masked_dense, 1),
    "from_pruned, convert": Entry(states.pruned_linear, 1),
    "prune": Entry(states.pruned, 1, computes=False),
    "candidates, rewire, adopt": Entry(states.rewired, 2),
    "the life of a layer": Entry(LayerMachine, 2),
}


def run(name: str, total: int, seed: int) -> Counter[str]:
    """Try a property in its share of `total` cases; how many ran, by backend.

    The same seed gives the same cases.
    """
    entry = ENTRIES[name]
    report = dk.backend_info()
    backends = [b for b in BACKENDS if report[b]["available"]] if entry.computes else ["any"]
    cases = math.ceil(total * entry.share / sum(each.share for each in ENTRIES.values()))
    counts: Counter[str] = Counter()
    for i, backend in enumerate(backends):
        with dk.use_backend(backend if entry.computes else None):
            own = (cases + i) // len(backends)
            counts[backend] += _tried(entry.holds, own, f"{name} {backend} {seed}")
    return counts


def _tried(holds: Any, cases: int, seed: str) -> int:
    ran = 0
    settings = hypothesis.settings(
        max_examples=cases,
        stateful_step_count=20,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )

    @hypothesis.seed(seed)
    @settings
    @given(st.data())
    def try_one(data: st.DataObject) -> None:
        nonlocal ran
        holds(data.draw)
        ran += 1

    @hypothesis.seed(seed)
    def machine() -> RuleBasedStateMachine:
        nonlocal ran
        ran += 1
        made: RuleBasedStateMachine = holds()
        return made

    if not cases:
        return 0
    if isinstance(holds, type):
        run_state_machine_as_test(machine, settings=settings)
    else:
        try_one()
    return ran
