"""What users do wrong: an error in one line and exit code 2, and nothing wrong without an error."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.paper import continual, embeddings
from bench.paper.__main__ import main
from bench.paper.analysis import analyse
from bench.paper.article import compare
from bench.paper.datasets import from_arrays
from bench.paper.measures import measure
from bench.paper.result import Result
from bench.paper.run import Run
from bench.paper.splits import prepare
from bench.paper.table import Table, read
from bench.paper.training import train
from tests.bench.stripes import RUN

TRAIN = ["train", "--data", "stripes", "--kind", "dANN-R", "--dendrites", "2", "--somas", "4"]
SWEEP = ["sweep", *TRAIN[1:], "--synapses", "4", "--epochs", "1", "--trials", "1"]


def images(n: int, classes: int = 2) -> tuple[Any, Any]:
    return np.arange(n * 25).astype(np.uint8).reshape(n, 5, 5), np.arange(n) % classes


def said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an error."""
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("option", ["--checkpoint", "--log"])
def test_a_file_that_cannot_be_written_costs_no_epoch(
    option: str, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.paper.training.Training.epoch", lambda *_: pytest.fail("trained"))
    below_a_file = str(root / "stripes.npz" / "file")
    assert "stripes.npz" in said([*TRAIN, "--data-root", str(root), option, below_a_file], capsys)


def test_output_below_a_file(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = str(root / "table.db")
    assert main([*SWEEP, "--data-root", str(root), "--table", table]) == 0
    for command in ("analyse", "report"):
        wrong = str(root / "stripes.npz" / "x")
        assert "stripes.npz" in said([command, table, "--output", wrong], capsys)


def test_other_files_in_the_place_of_embeddings(
    tmp_path: Path,
) -> None:
    for text in ("{}", '{"embeddings": [1]}', "{"):
        (tmp_path / embeddings.FILE).write_text(text)
        with pytest.raises(ValueError, match=r"Expected what `analyse --embed` wrote in .*json"):
            embeddings.read(tmp_path)


def test_a_database_of_another_program_stays_as_it_is(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = root / "foreign.db"
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE notes (text)")
    before = path.read_bytes()
    line = said([*SWEEP, "--data-root", str(root), "--table", str(path)], capsys)
    assert "Expected the table of a sweep" in line
    assert path.read_bytes() == before


def test_one_sweep_at_a_time_whatever_the_name(tmp_path: Path) -> None:
    (tmp_path / "link.db").symlink_to("table.db")
    with Table(tmp_path / "table.db") as table, Table(tmp_path / "link.db") as link:
        assert link.beside(".checkpoints") == table.beside(".checkpoints")
        with (
            table.locked(),
            pytest.raises(RuntimeError, match="one sweep at a time"),
            link.locked(),
        ):
            pass


def test_what_cannot_be_trained_enters_no_table(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = root / "table.db"
    for option in (["--somas", "-5"], ["--dropout", "2"], ["--lr", "inf"]):
        line = said([*SWEEP, *option, "--data-root", str(root), "--table", str(path)], capsys)
        assert "Expected" in line
    assert not path.exists()


def test_no_images_for_validation() -> None:
    small = from_arrays(*images(6), *images(6))
    with pytest.raises(ValueError, match=r"Expected images left for validation .* the 6"):
        prepare(small, RUN)
    full_batches = from_arrays(*images(40), *images(4))
    with pytest.raises(ValueError, match="Expected images left for validation"):
        prepare(full_batches, replace(RUN, task="sequential", batch=20))


def test_labels_without_images() -> None:
    x, y = images(20)
    with pytest.raises(ValueError, match=r"every label from 0 to 2 .* got none of \[0\]"):
        from_arrays(x, y + 1, x, y + 1)
    with pytest.raises(ValueError, match=r"every label from 0 to 255 .* got none of \[2, 3, 4, 5"):
        from_arrays(x, y, x, np.where(y == 1, 255, y))
    with pytest.raises(ValueError, match=r"integers from 0 .* from -1"):
        from_arrays(x, y - 1, x, y)


def test_a_data_set_is_named_without_folders(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = said([*TRAIN, "--data", "../stripes", "--data-root", str(root)], capsys)
    assert "folders belong into --data-root" in line


def test_a_training_that_diverged(root: Path, tmp_path: Path) -> None:
    """Its loss is worse than any other, in JSON too, and patience does not take it for the best."""
    data = from_arrays(*images(100), *images(20))
    ran = [replace(RUN, lr=lr, epochs=4, patience=1) for lr in (0.01, 1e30)]
    results = []
    for run in ran:
        ((model, split, outcome),) = train([run], data)
        results.append(Result(run, outcome, measure(model, split)))
    assert not np.isfinite(results[1].outcome.test_loss)
    (path,) = analyse(results, tmp_path)
    content = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    losses = {
        c["run"]["lr"]: c["loss"]["mean"] for c in content["data"]["stripes"]["configurations"]
    }
    assert losses[1e30] is None
    assert losses[0.01] == pytest.approx(results[0].outcome.test_loss, rel=1e-4)


def test_the_article_is_compared_on_its_own_data_only() -> None:
    def compared(name: str) -> int:
        data = from_arrays(*images(100), *images(20))
        run = Run(name, "dANN-R", dendrites=1, somas=4, epochs=1)
        ((model, split, outcome),) = train([run], data)
        return sum(
            cell.ours is not None for cell in compare([Result(run, outcome, measure(model, split))])
        )

    assert compared("emnist-balanced") == 2  # accuracy and loss
    assert compared("mnist") == 2
    assert compared("emnist-digits") == compared("mnist-mine") == 0
    assert Run("mnist-mine", "vANN", 1, 8).epochs == 25


def test_zero_has_one_key() -> None:
    assert replace(RUN, noise=-0.0).key == RUN.key


@pytest.mark.parametrize(
    "options",
    [["--scenario", "split", "--tasks", "9"], ["--output", "FILE/x.json"], ["--data", "mnist"]],
)
def test_continual_says_what_is_wrong(
    options: list[str], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [option.replace("FILE", str(root / "stripes.npz")) for option in options]
    assert continual.main(options) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("name", ["tasks", "epochs", "trials"])
def test_continual_needs_some_of_each(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        continual.main([f"--{name}", "0"])
    assert f"Expected --{name} >= 1, got 0" in capsys.readouterr().err


def test_who_reads_may_stop_reading(root: Path) -> None:
    table = str(root / "table.db")
    assert main([*SWEEP, "--data-root", str(root), "--table", table]) == 0
    assert len(read([Path(table)])) == 1
    command = [sys.executable, "-m", "bench.paper", "show", table]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as shown:
        assert shown.stdout is not None
        shown.stdout.close()
        assert shown.stderr is not None
        assert shown.stderr.read() == b""
    assert shown.returncode == 1


def test_an_interrupted_training_says_how_it_goes_on(root: Path) -> None:
    checkpoint = root / "run.pt"
    command = [
        sys.executable, "-m", "bench.paper", *TRAIN, "--synapses", "4", "--epochs", "100000",
        "--data-root", str(root), "--checkpoint", str(checkpoint),
    ]  # fmt: skip
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as training:
        while not checkpoint.exists():
            assert training.poll() is None, training.communicate()
            time.sleep(0.05)
        training.send_signal(signal.SIGINT)
        out, err = training.communicate()
    assert training.returncode == 130
    assert f"goes on from {checkpoint}" in out
    assert "Traceback" not in err
    assert checkpoint.exists()
