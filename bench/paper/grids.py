"""The sweeps of the article by name: functions of a data set and a number of trials.

Source: Chavlis & Poirazi (2025), Methods and supplement; docs/equations.md, section 8. Where the
article trains all sizes of a dense family, a few that a laptop can train stand for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import product

from bench.paper.run import Run
from dendrite_kernels.models import Kind

DENDRITES = (1, 2, 4, 8, 16, 32, 64)
SOMAS = (32, 64, 128, 256, 512)
SIGMAS = (0.0, 0.25, 0.5, 0.75, 1.0)
LAYERS = (1, 2, 3, 4, 6, 8, 10)
DROPOUTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)

DENDRITIC: tuple[Kind, ...] = ("dANN-R", "dANN-LRF", "dANN-GRF")
FAMILIES: tuple[Kind, ...] = (*DENDRITIC, "pdANN", "vANN")

Size = tuple[int, int]  # dendrites, somas
FIXED: Size = (4, 128)
LARGE: Size = (32, 512)  # the best size of the dendritic families, or close to it
DENSE: tuple[Size, ...] = ((1, 128), (4, 128), (16, 64), (4, 512))


def dendritic(data: str, trials: int) -> list[Run]:
    """random and receptive fields at all 35 sizes"""
    return _runs(data, DENDRITIC, product(DENDRITES, SOMAS), trials)


def table1(data: str, trials: int) -> list[Run]:
    """the five families: dendritic ones at D=32 S=512, pdANN and vANN at four small sizes"""
    dense = _runs(data, ("pdANN", "vANN"), DENSE, trials)
    return _runs(data, DENDRITIC, [LARGE], trials) + dense


def fixed(data: str, trials: int) -> list[Run]:
    """the published single sizes: dANN-R D=1 S=128 for mnist, dANN-R and vANN D=4 S=128 else"""
    if data == "mnist":
        return _runs(data, ("dANN-R",), [(1, 128)], trials)
    return _runs(data, ("dANN-R", "vANN"), [FIXED], trials)


def noise(data: str, trials: int) -> list[Run]:
    """five families at D=4 S=128, with noise of five strengths"""
    return _each(_runs(data, FAMILIES, [FIXED], trials), noise=SIGMAS)


def sequential(data: str, trials: int) -> list[Run]:
    """one class after the other: the families at the sizes of table1"""
    return [
        replace(run, task="sequential", epochs=None)  # None: twice as many as for table1
        for run in table1(data, trials)
    ]


def depth(data: str, trials: int) -> list[Run]:
    """1 to 10 layers: dendritic families and vANN at D=4 S=128"""
    return _each(_runs(data, (*DENDRITIC, "vANN"), [FIXED], trials), layers=LAYERS)


def dropout(data: str, trials: int) -> list[Run]:
    """dropout of 0 to 0.5: dendritic families and vANN at D=4 S=128"""
    return _each(_runs(data, (*DENDRITIC, "vANN"), [FIXED], trials), dropout=DROPOUTS)


def learning_rate(data: str, trials: int) -> list[Run]:
    """learning rates of 0.0001 to 0.01: dendritic families and vANN at D=4 S=128"""
    return _each(_runs(data, (*DENDRITIC, "vANN"), [FIXED], trials), lr=LEARNING_RATES)


def branching(data: str, trials: int) -> list[Run]:
    """64 synapses of a soma on 1 to 16 dendrites: dendritic families at S=128"""
    return [
        replace(run, dendrites=dendrites, synapses=64 // dendrites)
        for run in _runs(data, DENDRITIC, [FIXED], trials)
        for dendrites in (1, 2, 4, 8, 16)
    ]


def early_stopping(data: str, trials: int) -> list[Run]:
    """at most 100 epochs, patience 10: dendritic families and vANN at D=4 S=128"""
    runs = _runs(data, (*DENDRITIC, "vANN"), [FIXED], trials)
    return [replace(run, epochs=100, patience=10) for run in runs]


def quick(data: str, trials: int) -> list[Run]:
    """a bit of everything in minutes: small sizes, and 2 epochs of anything but digits"""
    epochs = 30 if data == "digits" else 2
    plain = _runs(data, DENDRITIC, product((1, 4, 16), (32, 128)), trials)
    plain += _runs(data, ("pdANN", "vANN"), product((1, 4), (32, 128)), trials)
    one_size = _runs(data, FAMILIES, [(4, 32)], trials)
    runs = plain + _each(one_size, noise=SIGMAS) + _each(one_size, task=["sequential"])
    return [replace(run, epochs=epochs) for run in dict.fromkeys(runs)]


Grid = Callable[[str, int], list[Run]]
GRIDS: dict[str, Grid] = {
    grid.__name__.replace("_", "-"): grid
    for grid in (
        dendritic, table1, fixed, noise, sequential, depth, dropout, learning_rate,
        early_stopping, branching, quick,
    )
}  # fmt: skip


def subset(runs: Sequence[Run], step: int) -> list[Run]:
    """Those with every `step`-th number of dendrites and of somas, unchanged otherwise.

    They are runs of the full sweep, which goes on from their results.
    """
    dendrites = sorted({run.dendrites for run in runs})[::step]
    somas = sorted({run.somas for run in runs})[::step]
    return [run for run in runs if run.dendrites in dendrites and run.somas in somas]


def _runs(data: str, kinds: Iterable[Kind], sizes: Iterable[Size], trials: int) -> list[Run]:
    return [
        Run(data, kind, dendrites, somas, trial=trial)
        for kind, (dendrites, somas), trial in product(kinds, sizes, range(trials))
    ]


def _each(runs: Iterable[Run], **values: Iterable[object]) -> list[Run]:
    """Every run with every value of one field."""
    ((name, options),) = values.items()
    return [replace(run, **{name: value}) for run, value in product(runs, options)]  # type: ignore[arg-type]
