"""The numbers that the article gives, and how ours differ from them.

Source: Chavlis & Poirazi (2025), Tables 1 and 2 and the text; means and standard deviations of five
trials. Accuracies are in percent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple

import dendrite_kernels as dk
from bench.paper.result import Result
from bench.paper.run import Run, Task
from bench.paper.statistics import (
    Metric,
    Summary,
    best,
    by_configuration,
    data_name,
    plain,
    sequential,
    summaries,
    summary,
    value,
)

TRIALS = 5
DATA = ("mnist", "fmnist", "kmnist", "emnist", "cifar10")
_ACCURACY: dict[dk.models.Kind, tuple[tuple[float, float], ...]] = {
    "dANN-R": ((98.090, .058), (89.612, .087), (91.076, .081), (82.745, .257), (52.458, .435)),
    "dANN-LRF": ((98.466, .106), (90.256, .224), (91.928, .064), (83.166, .089), (56.966, .980)),
    "dANN-GRF": ((98.576, .081), (90.182, .216), (90.046, .292), (83.779, .206), (56.998, .488)),
    "pdANN": ((98.466, .086), (90.184, .220), (90.610, .693), (84.121, .188), (60.120, .391)),
    "vANN": ((98.034, .274), (89.288, .365), (91.552, .663), (83.381, .268), (49.082, 1.209)),
}  # fmt: skip
_LOSS: dict[dk.models.Kind, tuple[float, ...]] = {
    "dANN-R": (.0644, .3245, .5068, 1.0591, 1.4612),
    "dANN-LRF": (.0483, .2975, .4374, .6105, 1.2684),
    "dANN-GRF": (.0471, .2947, .5757, .5605, 1.3398),
    "pdANN": (.0503, .2935, .4789, .5390, 1.2811),
    "vANN": (.0967, .4040, .8246, 2.0860, 2.0455),
}  # fmt: skip
# The only losses whose deviations are known here
_FMNIST_LOSS_SD: dict[dk.models.Kind, float] = {
    "dANN-R": .0028, "dANN-LRF": .0042, "dANN-GRF": .0052, "pdANN": .0043, "vANN": .0066,
}  # fmt: skip
_SEQUENTIAL: dict[dk.models.Kind, tuple[float, float, float]] = {  # accuracy, its sd, loss
    "dANN-R": (56.8, 1.7, 3.39),
    "dANN-LRF": (59.7, 1.5, 1.65),
    "dANN-GRF": (59.3, 1.3, 1.80),
    "vANN": (28.5, 9.5, 313.0),
}


@dataclass(frozen=True)
class Published:
    """A number of the article. dendrites, somas: None: those of the best network of the grid."""

    data: str
    kind: dk.models.Kind
    metric: Metric
    mean: float
    sd: float | None = None
    task: Task = "shuffled"
    dendrites: int | None = None
    somas: int | None = None

    @property
    def table(self) -> str:
        """The title of the table that it stands in."""
        if self.dendrites is not None:
            return "Networks of one size"
        order = "" if self.task == "shuffled" else ", class after class"
        return f"Test {self.metric}{order}"


PUBLISHED: tuple[Published, ...] = (
    *(
        Published(data, kind, "accuracy", *pair)
        for kind, row in _ACCURACY.items()
        for data, pair in zip(DATA, row, strict=True)
    ),
    *(
        Published(data, kind, "loss", mean, _FMNIST_LOSS_SD[kind] if data == "fmnist" else None)
        for kind, means in _LOSS.items()
        for data, mean in zip(DATA, means, strict=True)
    ),
    *(
        Published("fmnist", kind, "accuracy", accuracy, sd, "sequential")
        for kind, (accuracy, sd, _) in _SEQUENTIAL.items()
    ),
    *(
        Published("fmnist", kind, "loss", loss, None, "sequential")
        for kind, (_, _, loss) in _SEQUENTIAL.items()
    ),
    Published("fmnist", "dANN-R", "accuracy", 86.83, 0.18, dendrites=4, somas=128),
    Published("fmnist", "dANN-R", "loss", 0.365, 0.004, dendrites=4, somas=128),
    Published("fmnist", "vANN", "accuracy", 89.11, 0.62, dendrites=4, somas=128),
    Published("fmnist", "vANN", "loss", 0.401, 0.020, dendrites=4, somas=128),
    Published("mnist", "dANN-R", "accuracy", 93.28, dendrites=1, somas=128),
    Published("mnist", "dANN-R", "loss", 0.228, dendrites=1, somas=128),
)


def published(data: str, kind: str, metric: Metric, task: Task = "shuffled") -> Published | None:
    """The article's number for the best network of a family; None where it gives none here."""
    wanted = data_name(data), kind, metric, task
    return next(
        (
            cell
            for cell in PUBLISHED
            if (cell.data, cell.kind, cell.metric, cell.task) == wanted and cell.dendrites is None
        ),
        None,
    )


@dataclass(frozen=True)
class Cell:
    """A number of the article beside ours; run: the configuration that ours comes from."""

    article: Published
    run: Run | None = None
    ours: Summary | None = None

    @property
    def difference(self) -> float | None:
        """Ours minus the article's."""
        return None if self.ours is None else self.ours.mean - self.article.mean

    @property
    def deviations(self) -> float | None:
        """The difference in standard deviations of one trial, the root mean square of both.

        None where one is not known: ours alone, of few trials, may be near 0 by chance.
        """
        if self.difference is None or self.article.sd is None:
            return None
        if self.ours is None or self.ours.sd is None:
            return None
        return self.difference / sqrt((self.ours.sd**2 + self.article.sd**2) / 2)


def compare(results: Sequence[Result]) -> list[Cell]:
    """All numbers of the article; those that the results say nothing of have ours None."""
    return [_cell(article, results) for article in PUBLISHED]


def _cell(article: Published, results: Sequence[Result]) -> Cell:
    candidates = (sequential if article.task == "sequential" else plain)(results)
    own = [
        r
        for r in candidates
        if data_name(r.run.data) == article.data
        and r.run.kind == article.kind
        and article.dendrites in (None, r.run.dendrites)
        and article.somas in (None, r.run.somas)
    ]
    run = best(own, article.metric).get(article.kind)
    if run is None:
        return Cell(article)
    trials = by_configuration(own)[run]
    return Cell(article, run, summary([value(trial, article.metric) for trial in trials]))


class Target(NamedTuple):
    """What other families are to reach: the best vANN, and whether it is one of ours."""

    value: float
    ours: bool


def dense_target(results: Sequence[Result], metric: Metric) -> Target | None:
    """The best vANN of the results of one data set, or the article's where none was trained."""
    own = plain(results)
    run = best(own, metric).get("vANN")
    if run is not None:
        return Target(summaries(own, metric)[run].mean, True)
    article = published(own[0].run.data, "vANN", metric) if own else None
    return None if article is None else Target(article.mean, False)
