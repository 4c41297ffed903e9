"""Statistics of results against numbers worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from math import log10, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from bench.paper.analysis import analyse
from bench.paper.article import PUBLISHED, Cell, Published, compare, dense_target, published
from bench.paper.result import Result
from bench.paper.run import Run
from bench.paper.statistics import (
    Summary,
    best,
    best_scores,
    by_configuration,
    compare_families,
    efficiency,
    families,
    parameters_to_match,
    plain,
    sequential,
    summaries,
    summary,
    varied,
)
from bench.paper.training import Outcome


def result(
    kind: Any,
    accuracy: float,
    loss: float = 1.0,
    *,
    size: int = 1000,
    least: int = 0,
    data: str = "fmnist",
    dendrites: int = 4,
    somas: int = 128,
    **options: Any,
) -> Result:
    """accuracy: in percent; least: the epoch with the least validation loss, counted from 0."""
    run = Run(data, kind, dendrites, somas, **options)
    val_loss = [2.0] * least + [1.0] + [1.5] * 3
    outcome = Outcome(size, size, {"val_loss": val_loss}, 3, loss, accuracy / 100, seconds=2.0)
    return Result(run, outcome)


def trials(kind: Any, accuracies: Sequence[float], **options: Any) -> list[Result]:
    return [result(kind, a, trial=i, **options) for i, a in enumerate(accuracies)]


def test_summary_by_hand() -> None:
    found = summary([1.0, 2.0, 6.0])
    assert (found.mean, found.n) == (3.0, 3)
    assert found.sd == pytest.approx(sqrt(7))  # (4 + 1 + 9) / 2
    half = 4.302652729911275 * sqrt(7) / sqrt(3)  # t of 97.5 % with 2 degrees of freedom
    assert (found.low, found.high) == (pytest.approx(3 - half), pytest.approx(3 + half))
    assert summary([5.0]) == Summary(5.0, None, 1)


def test_trials_of_a_configuration_are_together() -> None:
    results = [
        *trials("vANN", [80, 82]),
        *trials("dANN-R", [90, 91, 92]),
        result("vANN", 1, size=5, dendrites=1),
    ]
    groups = by_configuration(reversed(results))
    assert [(run.kind, run.dendrites, len(of)) for run, of in groups.items()] == [
        ("dANN-R", 4, 3),
        ("vANN", 1, 1),
        ("vANN", 4, 2),
    ]
    assert families(results) == ["dANN-R", "vANN"]
    means = summaries(results, "accuracy")
    assert [means[run].mean for run in groups] == pytest.approx([91, 1, 81])


def test_only_the_articles_protocol_is_plain() -> None:
    usual = result("dANN-R", 50, epochs=3, trial=4)
    options: list[dict[str, Any]] = [
        {"noise": 0.5}, {"layers": 2}, {"dropout": 0.1}, {"lr": 0.1}, {"batch": 64},
        {"patience": 3}, {"twin": True}, {"synapses": 8}, {"task": "sequential"},
    ]  # fmt: skip
    others = [result("dANN-R", 50, **option) for option in options]
    assert plain([usual, *others]) == [usual]
    assert sequential([usual, *others]) == [others[-1]]


def test_the_best_is_the_best_mean() -> None:
    """One lucky trial does not decide, nor a single one beside several; nor a loss of NaN."""
    lucky, steady = trials("vANN", [99, 60], dendrites=1), trials("vANN", [85, 86], dendrites=2)
    assert best([*lucky, *steady], "accuracy")["vANN"].dendrites == 2
    single = result("vANN", 99, loss=0.1, dendrites=8)
    assert best([single, *lucky, *steady], "accuracy")["vANN"].dendrites == 2
    broken = result("vANN", 0, loss=float("nan"), dendrites=16)
    assert best([single, broken], "loss")["vANN"].dendrites == 8
    assert best([broken], "loss") == {}


def test_efficiency_by_hand() -> None:
    """k = 100 * 1, 1000 * 10 and 1000 * 1: log10 k = 2, 4, 3; f = 1, 2, 1.5."""
    results = [
        result("dANN-R", 80, 0.5, size=100),
        result("vANN", 90, 0.4, size=1000, least=9),
        result("pdANN", 90, 0.4, size=1000),
        result("vANN", 70, 0.3, size=1000, data="mnist"),
    ]
    assert efficiency(results, "accuracy") == pytest.approx([0.8, 0.45, 0.6, 0.7])
    assert efficiency(results, "loss") == pytest.approx([0.5, 0.8, 0.6, 0.3])
    scores = best_scores(results[:3], "accuracy")
    assert {kind: one.mean for kind, one in scores.items()} == pytest.approx(
        {"dANN-R": 0.8, "vANN": 0.45, "pdANN": 0.6}
    )
    noisy = result("dANN-R", 10, size=10, noise=0.5)  # it counts for the least k of the data set
    assert efficiency([*results[:3], noisy], "accuracy")[0] == pytest.approx(0.8 / (2 / log10(10)))


def test_parameters_to_match_by_hand() -> None:
    """The smallest size that reaches it, also where a larger one falls back below it."""
    results = [
        result("dANN-R", 70, 0.9, size=100, dendrites=1),
        result("dANN-R", 85, 0.5, size=200, dendrites=2),
        result("dANN-R", 79, 0.7, size=400, dendrites=4),
        result("dANN-R", 90, 0.3, size=800, dendrites=8),
        result("dANN-GRF", 60, 0.9, size=100),
        *trials("vANN", [79, 81], loss=0.4, size=5000),
    ]
    assert parameters_to_match(results, "accuracy", 80) == {
        "dANN-R": 200, "dANN-GRF": None, "vANN": 5000,
    }  # fmt: skip
    assert parameters_to_match(results, "loss", 0.4)["dANN-R"] == 800
    assert dense_target(results, "accuracy") == (80.0, True)
    assert dense_target(results[:4], "accuracy") == (89.288, False)
    assert dense_target([], "loss") is None


def test_families_are_compared_by_welch_with_correction() -> None:
    a, b, c = [90.0, 91, 92], [80.0, 85, 90], [89.0, 91, 93]
    results = [*trials("dANN-R", a), *trials("pdANN", b), *trials("vANN", c), result("dANN-GRF", 1)]
    found = compare_families(results, "accuracy")
    assert [(one.a, one.b) for one in found] == [
        ("dANN-R", "pdANN"),
        ("dANN-R", "vANN"),
        ("pdANN", "vANN"),
    ]
    assert found[0].difference == pytest.approx(6)
    t = 6 / sqrt(1 / 3 + 25 / 3)  # the difference over its standard error
    freedom = (1 / 3 + 25 / 3) ** 2 / ((1 / 3) ** 2 / 2 + (25 / 3) ** 2 / 2)
    assert found[0].p == pytest.approx(2 * stats.t.sf(t, freedom))
    ps = np.array([one.p for one in found])
    order = np.argsort(ps)
    expected = np.minimum.accumulate((ps[order] * 3 / np.arange(1, 4))[::-1])[::-1]
    assert [found[i].q for i in order] == pytest.approx(expected.tolist())
    assert compare_families(trials("vANN", c), "accuracy") == []


def test_one_field_varies_and_nothing_else() -> None:
    small = [result("vANN", 80 - 10 * s, noise=s, dendrites=1) for s in (0.0, 0.5)]
    large = [
        result("vANN", 90 - 10 * s, noise=s, dendrites=2, trial=t)
        for s in (0.0, 0.5, 1.0)
        for t in (0, 1)
    ]
    other = result("vANN", 95, dendrites=4)  # larger, and better, but never with noise
    deep = result("vANN", 10, dendrites=2, noise=0.25, layers=2)
    found = varied([*large, other, *small, deep], "noise")
    assert list(found) == ["vANN"]
    assert list(found["vANN"]) == [0.0, 0.5, 1.0]
    assert all(
        r.run.dendrites == 2 and r.run.layers == 1 for rs in found["vANN"].values() for r in rs
    )
    assert [len(rs) for rs in found["vANN"].values()] == [2, 2, 2]
    assert varied([other], "noise") == {}


# The article


def test_the_articles_numbers() -> None:
    """Against the tables as they were noted from the article."""
    cells = {
        ("fmnist", "dANN-LRF", "accuracy"): (90.256, 0.224),
        ("cifar10", "vANN", "accuracy"): (49.082, 1.209),
        ("mnist", "dANN-GRF", "loss"): (0.0471, None),
        ("fmnist", "vANN", "loss"): (0.4040, 0.0066),
        ("emnist", "pdANN", "accuracy"): (84.121, 0.188),
        ("kmnist", "dANN-R", "loss"): (0.5068, None),
    }
    for (data, kind, metric), expected in cells.items():
        found = published(data, kind, metric)  # type: ignore[arg-type]
        assert found is not None
        assert (found.mean, found.sd) == expected
    ordered = published("fmnist", "vANN", "loss", "sequential")
    assert ordered is not None
    assert ordered.mean == 313
    assert published("emnist-balanced", "vANN", "accuracy") == published(
        "emnist", "vANN", "accuracy"
    )
    assert published("digits", "vANN", "accuracy") is None
    assert len(PUBLISHED) == 25 + 25 + 8 + 6


def test_a_cell_by_hand() -> None:
    results = [
        *trials("dANN-R", [89, 91], somas=512),
        *trials("dANN-R", [86, 87, 88]),
        result("dANN-R", 99, noise=0.5),
        result("dANN-R", 57, task="sequential"),
    ]
    cells = {(c.article.task, c.article.dendrites): c for c in compare(results)
             if c.ours is not None and c.article.metric == "accuracy"}  # fmt: skip
    assert len(cells) == 3
    grid = cells["shuffled", None]
    assert grid.article == Published("fmnist", "dANN-R", "accuracy", 89.612, 0.087)
    assert grid.run is not None
    assert grid.ours is not None
    assert (grid.run.somas, grid.ours.mean, grid.ours.n) == (512, pytest.approx(90), 2)
    assert grid.difference == pytest.approx(90 - 89.612)
    assert grid.deviations == pytest.approx((90 - 89.612) / sqrt((2 + 0.087**2) / 2))
    fixed = cells["shuffled", 4]
    assert fixed.ours is not None
    assert fixed.ours.mean == pytest.approx(87)  # D=4, S=128, not the best of the grid
    assert cells["sequential", None].deviations is None  # one trial, which has no deviation
    assert Cell(grid.article).difference is None
    assert replace(grid, article=replace(grid.article, sd=None)).deviations is None


def test_analysis_file(tmp_path: Path) -> None:
    results = [
        result("dANN-R", 89, 0.7, size=500),
        result("dANN-R", 91, 0.9, size=500, trial=1),
        result("vANN", 88, 0.5, size=5000),
        result("vANN", 89, 0.6, size=5000, trial=1),
        result("vANN", 50, noise=1.0),
        result("pdANN", 50, data="digits"),
    ]
    (path,) = analyse(results, tmp_path)
    content = json.loads(path.read_text())
    assert set(content["data"]) == {"digits", "fmnist"}
    fmnist = content["data"]["fmnist"]
    assert len(fmnist["configurations"]) == 3
    assert fmnist["configurations"][0]["accuracy"]["mean"] == pytest.approx(90)
    assert fmnist["configurations"][0]["trials"] == [0, 1]
    runs = [configuration["run"] for configuration in fmnist["configurations"]]
    assert runs[0] == {"kind": "dANN-R", "dendrites": 4, "somas": 128, "epochs": runs[0]["epochs"]}
    assert [run.get("noise") for run in runs].count(1.0) == 1
    assert fmnist["accuracy"]["parameters_to_match_vANN"] == {"dANN-R": 500, "vANN": 5000}
    assert fmnist["accuracy"]["best"]["vANN"]["somas"] == 128
    assert len(fmnist["loss"]["comparisons"]) == 1
    articles = {
        (cell["article"]["kind"], cell["article"]["metric"], cell["article"]["dendrites"]): cell
        for cell in content["article"]
    }
    assert articles["dANN-R", "accuracy", None]["difference"] == pytest.approx(
        90 - 89.612, rel=1e-4
    )
    assert content["environment"]["cpu"]
    assert analyse([], tmp_path / "none")[0].exists()
