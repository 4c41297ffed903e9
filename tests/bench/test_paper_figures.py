"""Figures and the report: what is drawn and written is what the results say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from bench import plots
from bench.paper import embeddings, figures
from bench.paper.embeddings import Embedding
from bench.paper.figures import (
    efficiency,
    embedding,
    nodes,
    robustness,
    settings,
    size,
    style,
    weights,
)
from bench.paper.measures import ENTROPY_BIN, WEIGHT_BIN
from bench.paper.report_page import report
from bench.paper.result import Result
from bench.paper.run import Run
from bench.paper.statistics import FAMILIES
from bench.paper.training import Outcome

COLORS = {kind: look.color for kind, look in style.LOOKS.items()}


def measures(start: int) -> dict[str, Any]:
    """Histograms that begin at bin `start`, all else constant."""
    stage = {"min": -0.1, "max": 0.3, "skewness": 0.0, "kurtosis": float(start)}
    stage |= {"histogram": {"start": start, "counts": [1, 3]}}
    node = {
        "entropy": {"mean": float(start), "histogram": {"start": start, "counts": [2, 2]}},
        "selectivity": {"histogram": [0, 3, 1]},
    }
    names = {"synapses": stage, "cables": stage, "dendrites": node, "somas": node}
    return {"layers": [names], "output": stage}


def result(kind: Any, dendrites: int, accuracy: float, loss: float, **options: Any) -> Result:
    options = {"data": "fmnist", "somas": 32, "epochs": 3, **options}
    run = Run(kind=kind, dendrites=dendrites, **options)
    parameters = 1000 * dendrites * (10 if kind == "vANN" else 1)
    history = {"val_loss": [1.0, 0.5, 0.7]}
    outcome = Outcome(parameters, parameters, history, 2, loss, accuracy / 100, seconds=1.5)
    return Result(run, outcome, measures(FAMILIES.index(kind)))


def grid() -> list[Result]:
    """Two families, three sizes, two trials; accuracy 80 + dendrites (less 1 for vANN) +- 1."""
    return [
        result(kind, d, 80 + d - (kind == "vANN") + t, 1 / d + 0.1 * t, trial=trial)
        for kind in ("dANN-LRF", "vANN")
        for d in (1, 2, 4)
        for trial, t in enumerate((-1, 1))
    ]


def lines(axes: Axes, color: str) -> Iterator[tuple[list[float], list[float]]]:
    for line in axes.get_lines():
        x, y = list(line.get_xdata()), list(line.get_ydata())
        if len(x) > 1 and to_hex(str(line.get_color())) == to_hex(color):
            yield x, y


def heights(axes: Axes) -> list[float]:
    return [patch.get_height() for patch in axes.patches]


def texts(axes: Axes) -> str:
    return " ".join(text.get_text() for text in axes.texts)


def test_every_family_has_a_look_of_its_own() -> None:
    assert set(style.LOOKS) == set(FAMILIES)
    assert len(set(style.LOOKS.values())) == len(FAMILIES)


def test_size() -> None:
    """Means, also of the best so far, and the dashed line of the best vANN."""
    figure = size.draw([*grid(), result("dANN-LRF", 8, 50, 9.0)])
    by_parameters, _, by_dendrites, _ = figure.axes
    points, steps = lines(by_parameters, COLORS["dANN-LRF"])
    assert points[0] == steps[0] == [1000, 2000, 4000, 8000]
    assert points[1] == pytest.approx([81, 82, 84, 50])
    assert steps[1] == pytest.approx([81, 82, 84, 84])
    *_, dashed = lines(by_parameters, COLORS["vANN"])
    assert dashed[1] == pytest.approx([83, 83])
    (by_d,) = lines(by_dendrites, COLORS["dANN-LRF"])
    assert by_d == ([1, 2, 4, 8], pytest.approx([81, 82, 84, 50]))
    assert "dANN-LRF" in size.seen(grid())
    assert "84 %" in size.seen(grid())


def test_size_of_loss() -> None:
    _, loss, *_ = size.draw(grid()).axes
    points, steps = lines(loss, COLORS["dANN-LRF"])
    assert points[1] == steps[1] == pytest.approx([1, 0.5, 0.25])


def test_efficiency() -> None:
    """dANN-LRF reaches vANN's 83 % with D=4 only, and its loss with D=4."""
    matched, _, scores, loss_scores = efficiency.draw(grid()).axes
    sizes = {line.get_color(): line.get_ydata()[0] for line in matched.get_lines()}
    assert sizes == {COLORS["dANN-LRF"]: 4000, COLORS["vANN"]: 40000}
    k = {"dANN-LRF": 4000 * 2, "vANN": 40000 * 2}  # the least validation loss: epoch 2
    f = {kind: np.log10(v) / np.log10(1000 * 2) for kind, v in k.items()}
    assert heights(scores) == pytest.approx([0.84 / f["dANN-LRF"], 0.83 / f["vANN"]])
    assert heights(loss_scores) == pytest.approx([0.25 * f["dANN-LRF"], 0.25 * f["vANN"]])
    assert "dANN-LRF reaches the accuracy of the best vANN with 4,000 parameters" in (
        efficiency.seen(grid())
    )


def test_efficiency_without_a_dense_network() -> None:
    """The article's stands in for it; 84 % does not reach that."""
    results = [r for r in grid() if r.run.kind != "vANN"]
    figure = efficiency.draw(results)
    assert "(the article's)" in figure.axes[0].get_title("left")
    assert "not reached" in texts(figure.axes[0])
    assert "not trained: dANN-R, dANN-GRF, pdANN, vANN" in figure.get_supxlabel()
    digits = [Result(replace(r.run, data="digits"), r.outcome) for r in results]
    assert "no vANN was trained" in texts(efficiency.draw(digits).axes[0])


def test_weights() -> None:
    """Two trials with counts 1 and 3 in the bins that begin with the family's number."""
    figure = weights.draw(grid())
    number = FAMILIES.index("vANN")
    (stairs,) = figure.axes[1].patches
    values, edges, _ = stairs.get_data()  # type: ignore[attr-defined]
    assert values == pytest.approx([0.25 / WEIGHT_BIN, 0.75 / WEIGHT_BIN])
    assert edges == pytest.approx(WEIGHT_BIN * (number + np.arange(3)))
    assert [axes.get_title("left") for axes in figure.axes[:2]] == ["dANN-LRF", "vANN"]
    assert f"kurtosis {number}" in texts(figure.axes[1])
    assert f"highest in vANN ({number})" in weights.seen(grid())


def test_histograms_of_trials_are_added() -> None:
    start, counts = weights.added(
        [{"start": 2, "counts": [1, 1]}, {"start": -1, "counts": [5]}, {"start": 0, "counts": []}]
    )
    assert (start, counts.tolist()) == (-1, [5, 0, 0, 1, 1])


def test_nodes() -> None:
    figure = nodes.draw(grid())
    entropy, _, selectivity, _ = figure.axes
    number = FAMILIES.index("dANN-LRF")
    (line,) = lines(entropy, COLORS["dANN-LRF"])
    assert line[0] == pytest.approx([ENTROPY_BIN * (number + 0.5), ENTROPY_BIN * (number + 1.5)])
    assert line[1] == pytest.approx([0.5 / ENTROPY_BIN] * 2)
    (line,) = lines(selectivity, COLORS["vANN"])
    assert line[1] == pytest.approx([0, 0.75, 0.25])


def test_embedding() -> None:
    run = grid()[0].run
    rng = np.random.default_rng(0)
    points = [(float(x), float(y)) for x, y in rng.normal(size=(9, 2))]
    both = [Embedding(replace(run, kind=kind), stage, points, [0, 1, 2] * 3, score, 0.9, 0.8)
            for kind, score in (("dANN-LRF", 0.3), ("vANN", -0.2))
            for stage in ("dendrites", "somas")]  # fmt: skip
    figure = embedding.draw(both)
    assert np.allclose(figure.axes[3].collections[0].get_offsets(), points)
    assert heights(figure.axes[4]) == pytest.approx([0.3, 0.3, -0.2, -0.2])
    assert "farthest apart in the somas of dANN-LRF (silhouette 0.30)" in embedding.seen(both)


def test_robustness() -> None:
    results = [
        *grid(),
        *(
            result("vANN", 2, 60 - 20 * s, 1 + s, noise=s, trial=t)
            for s in (0.5, 1)
            for t in (0, 1)
        ),
        result("vANN", 2, 30, 200.0, task="sequential"),
        result("dANN-LRF", 2, 60, 2.0, task="sequential"),
    ]
    figure = robustness.draw(results)
    accuracy, loss, scores, loss_scores, ordered, ordered_loss = figure.axes
    (line,) = lines(accuracy, COLORS["vANN"])
    assert line == ([0, 0.5, 1], pytest.approx([81, 50, 40]))
    (line,) = lines(loss, COLORS["vANN"])
    assert line[1] == pytest.approx([0.5, 1.5, 2])
    f = np.log10(20_000 * 2) / np.log10(1000 * 2)  # the smallest network has 1,000 parameters
    (line,) = lines(scores, COLORS["vANN"])
    assert line[1] == pytest.approx([0.81 / f, 0.50 / f, 0.40 / f])
    (line,) = lines(loss_scores, COLORS["vANN"])
    assert line[1] == pytest.approx([0.5 * f, 1.5 * f, 2 * f])
    assert heights(ordered) == pytest.approx([60, 30])
    assert ordered_loss.get_yscale() == "log"
    assert "dANN-LRF reaches 60.0 %, vANN 30.0 %" in robustness.seen(results)


def test_settings() -> None:
    results = [*grid(), result("vANN", 4, 88, 0.2, layers=2), result("vANN", 1, 20, 2.0, lr=0.1)]
    figure = settings.draw(results)
    depth, dropout, rate, *_ = figure.axes
    (line,) = lines(depth, COLORS["vANN"])
    assert line == ([1, 2], pytest.approx([83, 88]))
    assert "not varied" in texts(dropout)
    (line,) = lines(rate, COLORS["vANN"])
    assert line == ([0.001, 0.1], pytest.approx([80, 20]))
    assert settings.seen(results) == (
        "Accuracy is highest at depth 2 (vANN); learning rate 0.001 (vANN)."
    )


@pytest.mark.parametrize("results", [[], grid()[:1], [replace(grid()[0], measures={})]])
def test_figures_of_few_results(results: list[Result]) -> None:
    for module in (size, efficiency, weights, nodes, robustness, settings):
        figure = module.draw(results)  # type: ignore[attr-defined]
        figure.canvas.draw()
        assert module.seen(results)  # type: ignore[attr-defined]
        if not results:
            assert any(axes.texts for axes in figure.axes), module
    embedding.draw([]).canvas.draw()


# The report


class Page:
    """The report as a tree; it is well-formed XML."""

    def __init__(self, path: Path) -> None:
        self.text = path.read_text(encoding="utf-8")
        self.root = ElementTree.fromstring(self.text.removeprefix("<!DOCTYPE html>\n"))

    def table(self, section: str, title: str) -> list[dict[str, str]]:
        """The rows of the table below these headings, by the names of their columns."""
        (part,) = (part for part in self.root.iter("section") if part[0].text == section)
        (place,) = (i for i, heading in enumerate(part) if heading.text == title)
        head, *rows = (["".join(c.itertext()) for c in row] for row in part[place + 1].iter("tr"))
        return [dict(zip(head, row, strict=True)) for row in rows]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, list[Path]]:
    folder = tmp_path_factory.mktemp("report")
    odd = [Result(replace(r.run, data="a<b>&'"), r.outcome) for r in grid()[:2]]
    paths = report([*grid(), *odd], folder)
    return Page(paths[-1]), paths


def test_report_has_ours_and_the_articles_in_their_columns(written: Any) -> None:
    page, _ = written
    rows = {row["family"]: row for row in page.table("Beside the article", "Test accuracy")}
    assert set(rows) == {"dANN-LRF", "vANN"}
    row = rows["dANN-LRF"]
    assert row["article"] == "90.26 ± 0.22"
    assert row["ours"] == "84.00 ± 1.41"
    assert row["n"] == "2"
    assert row["95 % interval"] == "71.29 to 96.71"  # 12.706 * 1.414 / 1.414
    assert row["difference"] == "-6.26"
    assert row["in deviations"] == f"{-6.256 / np.sqrt((2 + 0.224**2) / 2):+.1f}"
    assert row["our network"] == "D=4, S=32, 3 epochs"
    assert "It is left out where one of them is not known" in page.text
    loss = {row["family"]: row for row in page.table("Beside the article", "Test loss")}["vANN"]
    assert (loss["article"], loss["ours"]) == ("0.4040 ± 0.0066", "0.2500 ± 0.1414")
    assert loss["difference"] == "-0.1540"


def test_report_has_our_own_tables_and_the_cost(written: Any) -> None:
    page, _ = written
    best = page.table("Data set fmnist", "The best network of each family")
    means = [(row["family"], row["mean"], row["parameters"]) for row in best]
    assert means == [
        ("dANN-LRF", "84.00 ± 1.41", "4,000"),
        ("vANN", "83.00 ± 1.41", "40,000"),
        ("dANN-LRF", "0.2500 ± 0.1414", "4,000"),
        ("vANN", "0.2500 ± 0.1414", "40,000"),
    ]
    cost = page.table("Cost", "Seconds of a training")
    assert [(row["data"], row["family"], row["runs"], row["all"]) for row in cost[1:]] == [
        ("fmnist", "dANN-LRF", "6", "9.0 s"),
        ("fmnist", "vANN", "6", "9.0 s"),
    ]
    assert {row["mean"] for row in cost} == {"1.5 s"}


def test_report_says_whose_machine_it_names(written: Any) -> None:
    page, _ = written
    (note,) = (p.text for p in page.root.iter("p") if "commit" in str(p.text) and p.get("class"))
    assert note.startswith("This page was written 20")
    assert "Where and when the trainings ran, and with which versions, is not recorded" in note


def test_report_needs_nothing_else(written: Any) -> None:
    page, _ = written
    for element in page.root.iter():
        assert element.tag not in ("script", "link", "iframe")
        for name in ("src", "href"):
            address = element.get(name)
            assert address is None or address.startswith("data:image/svg+xml;base64,")
    assert not re.search(r"url\(|@import|https?://", page.text)
    assert len(list(page.root.iter("img"))) == 2 * 7


def test_report_escapes_text(written: Any) -> None:
    page, _ = written
    assert "<b>" not in page.text
    assert any(heading.text == "Data set a<b>&'" for heading in page.root.iter("h2"))


def test_report_says_what_is_missing(written: Any) -> None:
    page, _ = written
    items = [item.text for item in page.root.iter("li")]
    assert "Data sets that were not trained: mnist, kmnist, emnist, cifar10." in items
    assert "fmnist, not trained: dANN-R, dANN-GRF, pdANN." in items
    assert "fmnist: 2 trials instead of 5." in items


def test_figures_are_written_in_both_formats(written: Any) -> None:
    _, paths = written
    names = {path.stem for path in paths if path.suffix == ".png"}
    assert names == {path.stem for path in paths if path.suffix == ".svg"}
    assert all(path.stat().st_size > 1000 for path in paths)
    assert "fmnist-2-size" in names


def test_the_same_results_give_the_same_svg(tmp_path: Path) -> None:
    first, second = (
        plots.save(settings.draw(grid()), tmp_path / name, "s")[1].read_bytes() for name in "ab"
    )
    assert first == second


def test_embeddings_of_the_folder_are_drawn(tmp_path: Path) -> None:
    run = grid()[0].run
    one = Embedding(run, "somas", [(0.0, 1.0), (2.0, 3.0)], [0, 1], 0.5, 0.9, 0.8)
    embeddings.write([one], tmp_path)
    drawn = {one.name: one for one in figures.draw_all(grid()[:1], tmp_path)}
    assert "On 2 test images" in drawn["fmnist-6-embedding"].seen
