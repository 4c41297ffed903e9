"""Continual learning: the tasks, what counts, what is reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.paper import continual
from bench.paper.continual import Network, forgetting, learn, tasks
from bench.paper.datasets import ImageData, from_arrays
from bench.paper.run import Run


def bars(n: int = 240) -> ImageData:
    """Six classes, each a bright row of its own."""
    rng = np.random.default_rng(0)
    y = np.arange(n) % 6
    x = rng.integers(0, 60, (n, 6, 5))
    x[np.arange(n), y] += 180
    x = x.astype(np.uint8)
    return from_arrays(x, y, x[: n // 2], y[: n // 2])


def test_permuted_tasks() -> None:
    data = bars()
    first, second, third = tasks(data, "permuted", 3, seed=1)
    assert torch.equal(first.x_train, torch.from_numpy(data.x_train))
    assert torch.equal(first.y_test, third.y_test)
    assert third.classes.tolist() == [0, 1, 2, 3, 4, 5]
    orders = []
    for task in (second, third):
        order = [
            int((task.x_train[:, i, None] == first.x_train).all(0).nonzero()) for i in range(30)
        ]
        assert torch.equal(task.x_test, first.x_test[:, order])
        orders.append(order)
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(30))
    again = tasks(data, "permuted", 2, seed=1)[1]
    assert torch.equal(again.x_train, second.x_train)


def test_split_tasks() -> None:
    parts = tasks(bars(), "split", 3, seed=0)
    for i, task in enumerate(parts):
        assert sorted(set(task.y_train.tolist())) == task.classes.tolist() == [2 * i, 2 * i + 1]
        assert set(task.y_test.tolist()) == {2 * i, 2 * i + 1}
    assert sum(len(task.y_train) for task in parts) == 240
    with pytest.raises(ValueError, match="Expected at most 3 tasks of two classes, got 4"):
        tasks(bars(), "split", 4, seed=0)


def test_forgetting() -> None:
    accuracies = [[0.9], [0.95, 0.8], [0.5, 0.9, 0.7]]
    assert continual.final_accuracy(accuracies) == pytest.approx(0.7)
    assert forgetting(accuracies) == pytest.approx(((0.95 - 0.5) + (0.8 - 0.9)) / 2)
    assert forgetting([[0.4]]) == 0


def test_only_the_logits_of_a_task_count() -> None:
    """Two classes of six: the weights and biases of the others do not move."""
    data, run = bars(), Run("bars", "vANN", 1, 8, epochs=20, batch=16, lr=0.01)
    head = run.build(data)[-1]
    built: list[Any] = []

    class Spy(Run):
        def build(self, data: ImageData) -> Any:
            built.append(super().build(data))
            return built[-1]

    spy = Spy("bars", "vANN", 1, 8, epochs=20, batch=16, lr=0.01)
    accuracies = learn(spy, data, tasks(data, "split", 3, seed=0)[:1])
    assert len(accuracies) == 1
    assert accuracies[0][0] > 0.9
    moved = (built[0][-1].weight != head.weight).any(1)
    assert moved.tolist() == [True, True, False, False, False, False]


def test_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(continual, "NETWORKS", (Network("dANN-R", 2, 8),))
    output = tmp_path / "continual.json"
    options = ["--tasks", "2", "--epochs", "1", "--trials", "2", "--output", str(output)]
    assert continual.main(options) == 0
    assert "dANN-R D=2 S=8" in capsys.readouterr().out
    report = json.loads(output.read_text())
    (result,) = report["results"]
    assert [[len(row) for row in trial] for trial in result["accuracies"]] == [[1, 2], [1, 2]]
    assert result["final_accuracy"][0] == pytest.approx(
        np.mean(result["accuracies"][0][-1]), rel=1e-3
    )
