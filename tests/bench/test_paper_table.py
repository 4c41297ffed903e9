"""The table of a sweep; which runs are trained together, in which order, and the named grids."""

from __future__ import annotations

import itertools
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.paper import datasets
from bench.paper.__main__ import main
from bench.paper.grids import GRIDS, subset
from bench.paper.groups import group, joins, parameters
from bench.paper.result import Result
from bench.paper.run import Run
from bench.paper.sweep import _costs, _Progress, _sizes
from bench.paper.table import Table, read
from bench.paper.training import Outcome
from bench.paper.workers import Epoch
from tests.bench.stripes import RUN, trials


def result(run: Run, loss: float = 0.5) -> Result:
    return Result(run, Outcome(10, 20, {"val_loss": [0.1, 1 / 3]}, 1, loss, 0.9), {"x": [1, None]})


# The table


def test_a_table_keeps_groups_and_results(tmp_path: Path) -> None:
    first, second = trials(RUN, 3), [replace(RUN, kind="vANN")]
    with Table(tmp_path / "t.db") as table:
        table.add([first, second])
        assert table.waiting() == [first, second]
        table.finish([result(second[0], 1 / 7)])
        table.fail(first, "no memory")
        assert table.counts() == {"waiting": 0, "done": 1, "failed": 3}
        assert table.errors() == dict.fromkeys(first, "no memory")
    with Table(tmp_path / "t.db") as table:
        assert table.results() == [result(second[0], 1 / 7)]
        assert table.waiting() == [first]  # what failed is tried again
        table.finish([result(run) for run in reversed(first)])
        assert [r.run for r in table.results()] == [*first, *second]  # as they were added
        assert table.errors() == {}


def test_extending_a_table_changes_nothing_in_it(table: Table) -> None:
    table.add([trials(RUN, 2)])
    table.finish([result(run) for run in trials(RUN, 2)])
    table.add([trials(RUN, 4)])
    assert table.counts() == {"waiting": 2, "done": 2, "failed": 0}
    assert table.waiting() == [trials(RUN, 4)[2:]]
    table.add([trials(RUN, 5)])
    assert table.waiting() == [trials(RUN, 4)[2:], trials(RUN, 5)[4:]]


def test_nothing_is_done_twice(table: Table) -> None:
    """And a group is written as a whole: its first run is not done when the second cannot be."""
    runs = trials(RUN, 2)
    table.add([runs])
    table.finish([result(runs[1])])
    for write in (
        lambda: table.finish([result(run) for run in runs]),
        lambda: table.fail(runs, "late"),
        lambda: table.finish([result(replace(RUN, trial=9))]),
    ):
        with pytest.raises(ValueError, match=r"Expected a run of .* that is not done, got"):
            write()
        assert table.results() == [result(runs[1])]
        assert table.counts()["waiting"] == 1


def test_numbers_come_back_bit_for_bit(table: Table) -> None:
    table.add([[RUN]])
    values = [0.1, 1e-320, float("inf"), float("nan"), float(np.float32(1) / 3)]
    outcome = Outcome(1, 2, {"val_loss": values}, test_loss=float("nan"))
    table.finish([Result(RUN, outcome)])
    (back,) = table.results()
    assert np.array(back.outcome.history["val_loss"]).tobytes() == np.array(values).tobytes()
    assert np.isnan(back.outcome.test_loss)


def test_a_file_that_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "t.db").write_text("Not a database, but a text that is long enough to be read." * 9)
    with pytest.raises(ValueError, match=r"Expected the table of a sweep in .*t\.db"):
        Table(tmp_path / "t.db")


@pytest.mark.parametrize("content", ["nothing", "another table"])
@pytest.mark.parametrize("command", ["show", "analyse", "report"])
def test_reading_writes_nothing(
    command: str, content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a b?#%20.db"
    path.touch()
    if content == "another table":
        with closing(sqlite3.connect(path)) as db:
            db.execute("CREATE TABLE others (x)")
    before = path.read_bytes()
    assert main([command, str(path)]) == 2
    assert "error: Expected the table of a sweep in " in capsys.readouterr().err
    assert [(p, p.read_bytes()) for p in tmp_path.iterdir()] == [(path, before)]


def test_a_table_is_read_under_any_name(tmp_path: Path) -> None:
    """A name that stands for itself, and not for what a URI makes of it."""
    path = tmp_path / "a b?mode=rwc#%20.db"
    with Table(path) as table:
        table.add([[RUN]])
        table.finish([result(RUN)])
    assert list(tmp_path.iterdir()) == [path]
    assert read([path]) == [result(RUN)]
    with Table(path, read_only=True) as table, pytest.raises(sqlite3.OperationalError):
        table.add([trials(RUN, 2)])


KILLED_IN_A_TRANSACTION = """
import os, signal, sqlite3, sys
db = sqlite3.connect(sys.argv[1])
db.execute("PRAGMA cache_size = 1")  # so that pages are written before the end
db.execute("UPDATE runs SET error = ?", ("x" * 100_000,))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_reading_after_a_kill_in_a_transaction(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    with Table(path) as table:
        table.add([trials(RUN, 3)])
        table.finish([result(RUN)])
    before = path.read_bytes()
    subprocess.run([sys.executable, "-c", KILLED_IN_A_TRANSACTION, str(path)], check=False)
    assert path.read_bytes() != before
    assert path.with_name("t.db-journal").exists()
    assert read([path]) == [result(RUN)]
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


# Which runs are trained together, and what they cost


def test_groups_are_trials_of_one_run() -> None:
    large, dropout = replace(RUN, somas=512, dendrites=16), replace(RUN, dropout=0.5)
    runs = [run for pair in zip(trials(RUN, 7), trials(large, 7), strict=True) for run in pair]
    groups = group([*runs, *trials(dropout, 2), RUN])
    assert sum(map(len, groups)) == 7 + 7 + 2
    assert trials(RUN, 7)[:5] in groups
    assert trials(RUN, 7)[5:] in groups
    for run in (*trials(large, 7), *trials(dropout, 2)):
        assert [run] in groups


@pytest.mark.parametrize(
    "options", [{"patience": 3}, {"dropout": 0.1}, {"twin": True}, {"kind": "vANN", "somas": 128}]
)
def test_what_is_trained_alone(options: Any) -> None:
    assert joins(RUN)
    assert not joins(replace(RUN, **options))


@pytest.mark.parametrize("kind", ["dANN-R", "pdANN", "sANN", "vANN", "vANN-LRF", "twin"])
def test_parameters_are_estimated(kind: Any, root: Path) -> None:
    twin = kind == "twin"
    run = Run("stripes", "dANN-R" if twin else kind, 4, 8, 5, layers=2, twin=twin)
    data = datasets.load("stripes", root)
    real = sum(p.numel() for name, p in run.build(data).named_parameters() if "bias" not in name)
    assert parameters(run, 30) == pytest.approx(real - 8 * data.classes, rel=0.02)


def test_the_longest_comes_first_and_each_data_set_once(root: Path) -> None:
    (root / "other.npz").write_bytes((root / "stripes.npz").read_bytes())
    runs = [
        replace(RUN, data=d, epochs=e)
        for e, d in itertools.product((1, 5, 2), ("stripes", "other"))
    ]
    groups = [[run] for run in runs]
    order = [(g[0].data, g[0].epochs) for g in _costs(groups, _sizes(groups, root))]
    expected = [(d, e) for d in ("stripes", "other") for e in (5, 2, 1)]
    assert order == expected


def test_the_time_left_is_that_of_what_is_left() -> None:
    """Two processes; the group of cost 8 alone lasts longer than half of all."""
    long, short = [replace(RUN, epochs=8)], [replace(RUN, epochs=2)]
    progress = _Progress({tuple(long): 8.0, tuple(short): 2.0}, processes=2)
    progress.update(short, Epoch(3.0))
    assert progress.seconds_left() == 24
    progress.update(short, [])
    for _ in range(8):
        progress.update(long, Epoch(1.0))
    assert progress.seconds_left() == 0


@pytest.mark.parametrize("name", GRIDS)
def test_grids(name: str) -> None:
    runs = GRIDS[name]("digits", 2)
    assert len(set(runs)) == len(runs)
    assert {run.trial for run in runs} == {0, 1}
    few = subset(runs, 2)
    assert few
    assert set(few) <= set(runs)


def test_the_dendritic_grid_is_that_of_the_article() -> None:
    runs = GRIDS["dendritic"]("fmnist", 1)
    assert len(runs) == 3 * 7 * 5
    few = subset(runs, 3)
    assert {(run.dendrites, run.somas) for run in few} == {
        (d, s) for d in (1, 8, 64) for s in (32, 256)
    }
    assert {run.epochs for run in GRIDS["sequential"]("fmnist", 1)} == {50}


def test_a_folder_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected the table of a sweep, got "):
        Table(tmp_path)
