"""The report of `make bench`: it shows what small measurements wrote, and says what is missing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from bench.questions import crossover, overhead
from bench.speed import cases, report, report_plots, roofline, run
from dendrite_kernels.benchmark import peers
from dendrite_kernels.benchmark.case import Case
from dendrite_kernels.benchmark.peers import OFFICIAL, OURS
from dendrite_kernels.benchmark.problem import Problem

TINY = Case("T", 9, 6, 5, 2, 7, 3, 4)
CSR = "torch CSR by hand"
FIGURES = ["speed", "memory", "roofline", "crossover", "overhead"]
FILES = ("cpu.json", "crossover.json", "overhead.json")
Page = ElementTree.Element


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with what the three commands write, of small measurements."""
    if reason := peers.reason_to_skip(OURS, Problem.draw(TINY.connectivity("constant"), 1)):
        pytest.skip(reason)
    folder, threads = tmp_path_factory.mktemp("measured"), torch.get_num_threads()
    cpu, dense, call = (folder / name for name in FILES)
    short = ["--threads", "1", "--seconds", "0.02", "--output"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cases.CASES, TINY.name, TINY)
        patch.setattr(roofline, "MILLISECONDS", 1)
        patch.setattr(overhead, "REPEATS", 1)
        patch.setattr(overhead, "CALLS", 2)
        patch.setattr(torch, "compile", lambda run, fullgraph: run)  # a compiler takes minutes
        ways = ["--memory", "--peers", OURS, OFFICIAL, CSR]
        assert run.main(["--cases", "T", *ways, *short, str(cpu)]) == 0
        sizes = ["--inputs", "40", "--somas", "3", "--batch", "5", "--densities", "0.1", "0.9"]
        assert crossover.main([*sizes, *short, str(dense)]) == 0
        overhead.main(["--output", str(call)])
    yield folder
    torch.set_num_threads(threads)


@pytest.fixture
def folder(measured: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(measured, tmp_path / "results")


def change(path: Path, edit: Callable[[Any], object]) -> Any:
    """Edit what a file holds; returns it."""
    found = json.loads(path.read_text())
    edit(found)
    path.write_text(json.dumps(found))
    return found


def page_of(folder: Path) -> Page:
    return ElementTree.fromstring(report.report(folder).removeprefix("<!DOCTYPE html>"))


def section(page: Page, title: str) -> str:
    """All text of a section."""
    (found,) = (s for s in page.iter("section") if s.findtext("h2") == title)
    return re.sub(r"\s+", " ", " ".join(found.itertext()))


def cells(page: Page, title: str) -> list[list[str]]:
    """The rows of a section's table."""
    (found,) = (s for s in page.iter("section") if s.findtext("h2") == title)
    return [["".join(c.itertext()) for c in row] for row in found.iter("tr")]


def test_page_has_every_figure_and_needs_nothing_else(measured: Path) -> None:
    page = page_of(measured)
    assert [figure.get("id") for figure in page.iter("figure")] == FIGURES
    for figure in page.iter("figure"):
        assert len(list(figure.iter("img"))) >= 2  # a legend and a panel
    for element in page.iter():
        assert element.tag not in ("script", "link", "iframe")
        for name in ("src", "href"):
            address = element.get(name)
            assert address is None or address.startswith("data:image/svg+xml;base64,")
    assert not re.search(r"url\(|@import|https?://", report.report(measured))


def test_page_names_the_machine_and_each_figure_its_command(measured: Path) -> None:
    page, found = page_of(measured), json.loads((measured / "cpu.json").read_text())
    environment = found["environment"]
    (machine,) = page.findall("body/main/ul/li")
    for part in (environment["cpu"], environment["commit"], f"torch {torch.__version__}", *FILES):
        assert str(part) in str(machine.text)
    commands = [str(figure.findtext("figcaption/p[2]/code")) for figure in page.iter("figure")]
    assert all(c.startswith("python -m bench.speed.run --cases T --memory") for c in commands[:3])
    assert commands[3].startswith("python -m bench.questions.crossover --inputs 40")
    assert commands[4].startswith("python -m bench.questions.overhead --output")


def test_tables_have_the_ratios_of_the_file(measured: Path) -> None:
    page = page_of(measured)
    (one,) = json.loads((measured / "cpu.json").read_text())["configurations"]
    rows = cells(page, "Speed")[1:]
    assert [row[2] for row in rows] == list(one["ratios"])
    for row, ratio in zip(rows, one["ratios"].values(), strict=True):
        assert row[4] == f"{ratio['official']:.1f}x"
        assert row[5].startswith(f"{ratio['best_peer']:.2f}x")
        assert row[6] == ratio["best_peer_name"]
        assert ratio["all"][row[6]] == min(ratio["all"].values())
    memory = cells(page, "Memory of a training step")[1]
    assert memory[1:3] == [f"{one['memory_mib'][name]:.1f}" for name in (OURS, OFFICIAL)]


def test_what_we_lose_is_visible(folder: Path) -> None:
    def lose(found: Any) -> None:
        for ratio in found["configurations"][0]["ratios"].values():
            ratio |= {"best_peer": 2.0}
        found["configurations"][0]["ratios"]["training"]["best_peer"] = 0.25

    change(folder / "cpu.json", lose)
    text = section(page_of(folder), "Speed")
    assert re.search(r"T, 1 thread, training: \S.* takes 0.25 times as long as dendrite", text)
    assert text.count("(we lose)") == 1


def test_dots_are_where_the_ratios_are() -> None:
    rows = {"A": {OFFICIAL: 30.0, CSR: 0.5}, "B": {CSR: 4.0}}
    (axes,) = report_plots.dots("", "", rows, report_plots.series_of([rows]), lose=True).axes
    low, high = axes.get_xlim()
    assert low < 0.5 < 30 < high
    drawn = {  # a row is as high as 1
        (round(float(line.get_ydata()[0])), float(line.get_xdata()[0]))
        for line in axes.lines
        if line.get_marker() != "None"
    }
    assert drawn == {(0, 30.0), (0, 0.5), (1, 4.0)}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["A", "B"]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named_with_its_command(name: str, folder: Path) -> None:
    (folder / name).unlink()
    page = page_of(folder)
    for part in report.PARTS:
        missing = f"Missing: there is no {folder / name} . {part.command} --output {folder / name}"
        assert (missing in section(page, part.title)) == (part.file == name)


def test_nothing_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "page.html"
    assert report.main(["--input", str(tmp_path), "--output", str(output)]) == 0
    assert "Nothing was measured yet" in output.read_text()
    assert f"Wrote {output}" in capsys.readouterr().out


def test_parts_that_were_not_measured_say_why(folder: Path) -> None:
    def leave_out(found: Any) -> None:
        (one,) = found["configurations"]
        one |= {"memory_mib": {}, "roofline": {"unavailable": "no C++ compiler"}}
        one["refused"] = {"a way": "wrong by <b>1</b>"}

    change(folder / "cpu.json", leave_out)
    page = page_of(folder)
    assert "ran without --memory" in section(page, "Memory of a training step")
    assert "No roof was measured: no C++ compiler" in section(page, "Roofline")
    assert "T, 1 thread: a way: wrong by <b>1</b>" in section(page, "Speed")
    assert not list(page.iter("b"))


def test_nothing_to_compare_with(folder: Path) -> None:
    change(folder / "cpu.json", lambda found: found["configurations"][0].update(ratios={}))
    assert "None of our backends ran beside another way" in section(page_of(folder), "Speed")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("text", ["{", "[]", '{"environment": {}}'])
def test_a_bad_file_is_an_error(
    name: str, text: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / name).write_text(text)
    output = folder / "page.html"
    assert report.main(["--input", str(folder), "--output", str(output)]) == 1
    (command,) = {part.command for part in report.PARTS if part.file == name}
    expected = f"Expected a file that `{command}` of this version wrote, got {folder / name}: "
    assert capsys.readouterr().err.startswith(expected)
    assert not output.exists()


@pytest.mark.parametrize(
    ("name", "key"),
    [("cpu.json", "configurations"), ("crossover.json", "sweeps"), ("overhead.json", "layers_us")],
)
def test_a_file_of_another_version_is_an_error(name: str, key: str, folder: Path) -> None:
    change(folder / name, lambda found: found.pop(key))
    with pytest.raises(ValueError, match=rf"{name}: KeyError: '{key}'"):
        report.report(folder)
