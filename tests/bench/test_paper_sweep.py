"""Sweeps and commands: what kills and failures leave.

Expected results come from `training.train` in this process, which knows no table and no worker.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bench.paper import datasets
from bench.paper.__main__ import main
from bench.paper.measures import measure
from bench.paper.result import Result
from bench.paper.run import Run
from bench.paper.splits import Split, prepare
from bench.paper.sweep import sweep
from bench.paper.table import Table
from bench.paper.training import Training, train
from bench.paper.workers import Group, _train
from tests.bench.stripes import RUN, trials

ROOT = Path(__file__).parents[2]
LIMIT = 30  # seconds for what takes a few on a quiet machine


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def without_seconds(results: list[Result]) -> list[Result]:
    return [replace(r, outcome=replace(r.outcome, seconds=0.0)) for r in results]


# A worker


def test_a_group_goes_on_from_its_last_epoch(root: Path) -> None:
    """Also from the last one of all: a kill may come between training and the table."""
    data, told = datasets.load("stripes", root), []
    training = Training([RUN], [RUN.build(data)], [prepare(data, RUN)])
    training.epoch()
    training.epoch()
    group = Group([RUN], root / "checkpoint.pt")
    training.save(group.checkpoint)
    results = without_seconds(_train(group, data, measure, told.append))
    assert len(told) == 1
    assert results == without_seconds(_train(group, data, measure, told.append))
    assert len(told) == 1


# Sweeps in processes


def classes_and_process(model: nn.Sequential, data: Split) -> dict[str, Any]:
    if len(model) > 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"classes": int(data.y_train.max()) + 1, "process": os.getpid()}


def test_failures_do_not_stop_the_others(root: Path, table: Table) -> None:
    """It asks for more synapses than there are pixels, and comes first as it is the longest."""
    impossible = replace(RUN, kind="dANN-LRF", synapses=31, epochs=9)
    options: dict[str, Any] = {"data_root": root, "measure": classes_and_process}
    assert not sweep(table, [trials(RUN, 2), [impossible]], processes=1, **options)
    assert table.counts() == {"waiting": 0, "done": 2, "failed": 1}
    assert "ValueError: Expected" in table.errors()[impossible]
    assert [r.measures["classes"] for r in table.results()] == [6, 6]
    (process,) = {r.measures["process"] for r in table.results()}
    assert process != os.getpid()


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced(root: Path, table: Table) -> None:
    """Its run fails, as one that takes all the memory does; the longest one, it comes first."""
    deadly = replace(RUN, layers=2, epochs=6)
    options: dict[str, Any] = {"data_root": root, "measure": classes_and_process}
    assert not sweep(table, [trials(RUN, 2), [deadly]], processes=1, **options)
    assert [r.run for r in table.results()] == trials(RUN, 2)
    assert "exit code -9" in table.errors()[deadly]


def test_missing_data_end_a_sweep_at_once(root: Path, table: Table) -> None:
    with pytest.raises(FileNotFoundError, match="No files of data set 'lost'"):
        sweep(table, [[replace(RUN, data="lost")]], data_root=root)


def start(root: Path, epochs: int, processes: int) -> subprocess.Popen[bytes]:
    """A sweep of 12 runs as a process; its workers inherit the pipe that its output goes to."""
    command = [sys.executable, "-m", "bench.paper", "sweep", "--table", str(root / "sweep.db"),
        "--data", "stripes", "--data-root", str(root), "--kinds", "dANN-R", "vANN", "--dendrites",
        "2", "--somas", "4", "6", "--synapses", "4", "--trials", "3", "--batch", "32",
        "--epochs", str(epochs), "--processes", str(processes)]  # fmt: skip
    pipe: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipe)


def expected(root: Path, epochs: int) -> list[Result]:
    data = datasets.load("stripes", root)
    runs = [
        Run("stripes", kind, 2, somas, 4, trial=trial, batch=32, epochs=epochs)
        for kind in ("dANN-R", "vANN")
        for somas in (4, 6)
        for trial in range(3)
    ]
    return without_seconds(
        [
            Result(run, one.outcome, json.loads(json.dumps(measure(one.model, one.data))))
            for group in (runs[:3], runs[3:6], runs[6:9], runs[9:])
            for run, one in zip(group, train(group, data), strict=True)
        ]
    )


def wait_until(true: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + LIMIT
    while not true() and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.005)


def kill(process: subprocess.Popen[bytes]) -> None:
    """And wait for the end of its workers: until then the pipe that they share stays open."""
    process.kill()
    process.communicate(timeout=LIMIT)


def checkpoints(root: Path) -> set[tuple[str, int]]:
    found = set()
    for path in (root / "sweep.db.checkpoints").glob("[!.]*"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_mtime_ns))
    return found


def stopped_again_and_again(root: Path, stops: int, epochs: int, most_processes: int) -> None:
    """The final table is that of trainings without any stop, and nothing else is left.

    Of three stops, one is a kill after an epoch, one is Ctrl-C, one is a kill at any moment.
    """
    rng, done = np.random.default_rng(stops), 0
    for i in range(stops):
        process, seen = start(root, epochs, 1 + i % most_processes), checkpoints(root)
        if i % 3 == 2:
            time.sleep(rng.uniform(0, 4))
        else:
            wait_until(lambda seen=seen: bool(checkpoints(root) - seen), process)
            time.sleep(rng.uniform(0, 0.2))
        if i % 3 == 1:
            os.killpg(process.pid, signal.SIGINT)
            output, _ = process.communicate(timeout=LIMIT)
            assert process.returncode == 130, output
            assert output == b"\nStopped. The same command goes on from here.\n"
        else:
            kill(process)
        with Table(root / "sweep.db") as table:
            before, done = done, table.counts()["done"]
        assert before <= done < 12
    process = start(root, epochs, most_processes)
    output, _ = process.communicate(timeout=2 * LIMIT)
    assert process.returncode == 0, output
    with Table(root / "sweep.db") as table:
        assert without_seconds(table.results()) == expected(root, epochs)
    assert {p.name for p in root.iterdir()} == {"sweep.db", "sweep.db.lock", "stripes.npz"}


def test_stopped_twice(root: Path, one_thread: None, capsys: pytest.CaptureFixture[str]) -> None:
    stopped_again_and_again(root, 2, epochs=60, most_processes=1)
    assert main(["show", str(root / "sweep.db")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split()[:5] == ["data", "kind", "dendrites", "somas", "trials"]
    assert [line.split()[1:5] for line in printed[1:5]] == [
        [kind, "2", somas, "3"] for kind in ("dANN-R", "vANN") for somas in "46"
    ]
    assert printed[5] == "0 waiting, 12 done, 0 failed"


@pytest.mark.slow
def test_killed_ten_times(root: Path, one_thread: None) -> None:
    stopped_again_and_again(root, 15, epochs=500, most_processes=3)


def measure_forever(model: nn.Sequential, data: Split) -> dict[str, Any]:
    Path(f"measuring-{os.getpid()}").touch()
    time.sleep(10 * LIMIT)
    return {}


STUCK = """
from tests.bench.test_paper_sweep import RUN, Table, measure_forever, replace, sweep
groups = [[RUN], [replace(RUN, somas=6)]]
with Table("sweep.db") as table:
    sweep(table, groups, data_root=".", processes=2, measure=measure_forever)
"""


def test_one_sweep_at_a_time(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Others may read the table. The lock and both workers, busy as they are, end with a kill."""
    pipe: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", STUCK], cwd=root, env=environment, **pipe)
    try:
        wait_until(lambda: len(list(root.glob("measuring-*"))) == 2, process)
        with Table(root / "sweep.db") as table:
            with pytest.raises(RuntimeError, match=r"Expected one sweep at a time on .*, got a"):
                sweep(table, [trials(RUN, 2)], data_root=root / "nowhere")
            assert table.counts()["waiting"] == 2
        assert main(["sweep", "--table", str(root / "sweep.db")]) == 2
        assert "error: Expected one sweep at a time" in capsys.readouterr().err
    finally:
        kill(process)
    with Table(root / "sweep.db") as table, table.locked():
        assert len(table.waiting()) == 2


# Commands


def test_train(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--data",
        "stripes",
        "--data-root",
        str(root),
        "--kind",
        "dANN-R",
        "--dendrites",
        "2",
    ]
    options += ["--somas", "4", "--synapses", "4", "--epochs", "3", "--batch", "32", "--lr", "0.01"]
    assert main(["train", *options, "--log", str(root / "log.jsonl")]) == 0
    printed = capsys.readouterr().out
    ((_, _, outcome),) = train([RUN], datasets.load("stripes", root))
    assert f"{outcome.test_loss:9.4f}{outcome.test_accuracy:12.2%}" in printed
    log = [json.loads(line) for line in (root / "log.jsonl").read_text().splitlines()]
    assert [line["run"] for line in log] == 3 * [asdict(RUN)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --data digits --kind dANN-R --dendrites 2 --somas 0", "somas"),
        ("train --data lost --kind dANN-R --dendrites 2 --somas 4 --data-root .", "No files of"),
        ("sweep --table {} quick", "Expected --data for a grid, got none"),
        ("sweep --table {} quick noisy --data digits", r"Expected grids of .*, got \['noisy'\]"),
        ("sweep --table {} quick --data digits --lr 1", r"got both: \['--lr'\]"),
        ("sweep --table {} --data digits --kinds vANN", "got no .*--dendrites"),
        ("sweep --table {} quick --data digits --trials 0", "Expected --trials >= 1, got 0"),
        ("sweep --table {} --data a --kinds vANN --dendrites 1 --somas 2 --noise -1", "noise"),
        ("sweep --table {}", "Expected what to train or a table"),
        ("show {}", "Expected the table of a sweep, got no file"),
    ],
)
def test_commands_that_make_no_sense(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments.format(tmp_path / "t.db").split()) == 2
    assert re.search(f"error: .*{message}", capsys.readouterr().err)
    assert not (tmp_path / "t.db").exists()


@pytest.mark.parametrize("folder", ["", " --data-root {}"])
@pytest.mark.parametrize("command", ["train --kind", "sweep --table {}/t.db --kinds"])
def test_unknown_data_say_what_there_is(
    command: str, folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"{command} vANN --data nosuch --dendrites 1 --somas 2{folder}"
    assert main(line.replace("{}", str(tmp_path)).split()) == 2
    error = capsys.readouterr().err
    for name in ("nosuch", "--data-root", "digits", "fmnist", "emnist", "cifar10", "npz"):
        assert name in error


def test_a_wrong_name_is_not_kept(tmp_path: Path) -> None:
    """Otherwise every later sweep of this table would look for the data, too."""
    table = f"sweep --table {tmp_path}/t.db --trials 1 --epochs 1 --kinds dANN-R --somas 2"
    assert main([*table.split(), "--dendrites", "1", "--data", "digit"]) == 2
    assert main([*table.split(), "--dendrites", "1", "--data", "digits"]) == 0


@pytest.mark.parametrize("arguments", ["", "other", "show", "train --nonsense 1", "show a --x"])
def test_unknown_arguments(arguments: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments.split())
