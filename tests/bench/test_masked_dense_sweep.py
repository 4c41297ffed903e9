"""What a sweep would take the article's way: the sum over trainings, with steps of a fixed time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.paper import datasets
from bench.paper.result import Result
from bench.paper.run import Run
from bench.paper.table import Table
from bench.paper.training import Outcome
from bench.questions import masked_dense_sweep as question

RUN = Run("digits", "dANN-R", dendrites=2, somas=8, epochs=3)


def test_steps_of_a_training() -> None:
    """1,442 images without the 144 of the validation set: ten batches of 128, and a small one."""
    assert question.steps_of(RUN, datasets.load("digits")) == 11 * 3


def test_a_step_is_one_of_the_masked_dense_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Run] = []
    build = Run.build
    monkeypatch.setattr(Run, "build", lambda run, data: built.append(run) or build(run, data))
    assert 0 < question.step_seconds(RUN, datasets.load("digits"), steps=2) < 60
    assert built == [replace(RUN, twin=True)]


def test_the_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [replace(RUN, kind=kind, trial=t) for kind in ("dANN-R", "dANN-GRF") for t in (0, 1)]
    runs = [*small, replace(RUN, somas=16), replace(RUN, kind="vANN")]
    with Table(tmp_path / "table.db") as table:
        table.add([[run] for run in runs])
        table.finish([Result(run, Outcome(1, 1, seconds=30.0)) for run in runs])
    timed: list[int] = []

    def seconds(run: Run, *_: object) -> float:
        timed.append(run.somas)
        return run.somas / 10

    monkeypatch.setattr(question, "step_seconds", seconds)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert question.main([str(tmp_path / "table.db")]) == 0
    assert timed == [8, 16]
    dense = (4 * 0.8 + 1.6) * 33
    assert (
        f"5 trainings: masked dense {dense / 3600:.1f} h, ours 1.2 min, {dense / 75:.0f} times"
        in (capsys.readouterr().out)
    )
