"""Trials as one network against processes: what is counted, and that the processes work."""

from __future__ import annotations

from typing import Any

import pytest

from bench.paper.run import Run
from bench.questions import joined_processes as question

RUN = Run("noise", "dANN-R", dendrites=1, somas=4)


class FakeWay:
    def __init__(self, rates: list[float], asked: list[FakeWay]) -> None:
        self.rates, self.asked = rates, asked
        self.run: Run | None = None

    def prepare(self, run: Run) -> None:
        self.run = run

    def rate(self, seconds: float) -> float:
        assert (self.run, seconds) == (RUN, 0.5)
        self.asked.append(self)
        return self.rates.pop(0)


def test_ways_take_turns() -> None:
    """A rate of 500 steps in a second is 2 ms a step."""
    asked: list[FakeWay] = []
    a, b = FakeWay([500, 250], asked), FakeWay([1000, 2000], asked)
    ways: Any = [a, b]
    assert question.step_times(ways, RUN, rounds=2, seconds=0.5) == [[2, 4], [1, 0.5]]
    assert asked == [a, b, a, b]


def test_steps_are_those_of_whole_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Epochs of 3 s: in 4 s there are two, which take 6."""

    class Epochs:
        now = 0.0

        def epoch(self, parts: tuple[str, ...]) -> None:
            self.now += 3.0

    training: Any = Epochs()
    monkeypatch.setattr(question.time, "perf_counter", lambda: training.now)
    assert question.steps_in_a_second(training, 4.0) == 2 * question.STEPS / 6


@pytest.mark.slow
def test_real_processes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(question, "SIZES", ((4, 1),))
    monkeypatch.setattr(question, "processors", lambda: 2)
    question.main(["--trials", "2", "--rounds", "2", "--seconds", "0.05"])
    first, head, row = capsys.readouterr().out.splitlines()
    assert first.startswith("dANN-R, 2 trials, 2 processors")
    assert head.split() == ["S", "D", "processes", "one", "network", "a", "sweep", "ratios"]
    assert row.split()[:2] == ["4", "1"]
    assert len(row.split()) == 2 + 3 * 2 + 2
