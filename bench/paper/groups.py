"""Which runs are trained as one network, and what a training costs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from bench.paper.run import Run

MOST_TRIALS = 5  # in a group: each has a copy of the training images

# Of a network that is trained with its other trials, on images of 28 x 28 pixels. The mechanism: a
# step of a small network is Python and Adam, which a group pays once. With more parameters the
# kernels take the time, and a group's do not fit the cache of a core. Figures: docs/paper.md.
MOST_PARAMETERS = 40_000
_PIXELS = 784

# What a step costs besides its parameters, as so many parameters: a step of dANN-R takes 0.77 ms at
# S=32 D=1 and 4.24 ms at S=512 D=32, which has 278,000 parameters more, on one thread.
_FIXED = 60_000

_DENSE_INPUTS = ("pdANN", "psANN", "vANN")


def group(runs: Iterable[Run]) -> list[list[Run]]:
    """Runs that differ only in their trial, in groups where these train faster as one network.

    A group is decided by the runs alone, so that results do not depend on the machine.
    """
    groups: list[list[Run]] = []
    open_groups: dict[Run, list[Run]] = {}
    for run in dict.fromkeys(runs):
        alike = replace(run, trial=0)
        found = open_groups.get(alike)
        if found is None or len(found) == MOST_TRIALS or not joins(run):
            found = open_groups[alike] = []
            groups.append(found)
        found.append(run)
    return groups


def joins(run: Run) -> bool:
    """Whether several trials of this run are trained as one network."""
    possible = run.dropout == 0 and run.patience is None and not run.twin  # see trials.can_join
    return possible and parameters(run, _PIXELS) <= MOST_PARAMETERS


def cost(run: Run, inputs: int, samples: int) -> float:
    """Relative cost of a run on so many samples: parameters, and what every step costs."""
    assert run.epochs is not None
    return (_FIXED + parameters(run, inputs)) * samples * run.epochs


def parameters(run: Run, inputs: int) -> int:
    """About as many as the network has, without its output layer.

    Source: docs/equations.md, section 7.
    """
    rows, total = run.dendrites * run.somas, 0
    for _ in range(run.layers):
        dense_inputs = run.twin or run.kind in _DENSE_INPUTS
        dense_somas = run.twin or run.kind.startswith("vANN")
        total += rows * (inputs if dense_inputs else run.synapses)
        total += rows * (run.somas if dense_somas else 1)
        inputs = run.somas
    return total
