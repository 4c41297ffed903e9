"""The questions about gates and winners, on a small data set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.questions import gated, max_dendrites, permuted
from bench.questions.dense_twins import BATCH, CLASSES, N, largest_error, results
from dendrite_kernels.benchmark.training_step import TrainingStep
from dendrite_kernels.models import count_parameters


def test_permuted_tasks_are_resumed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = root / "results.json"
    options = ["--data", "stripes", "--data-root", str(root), "--tasks", "2", "--width", "70"]
    run = [*options, "--output", str(path), "--seeds"]
    arms = [name for name in permuted.ARMS if "sparse" not in name]  # of 64 synapses, not 30
    assert permuted.main([*run, "0", "--arms", *arms]) == 0
    first = json.loads(path.read_text())["arms"]
    assert list(first) == arms
    assert all(len(found["0"]["of_tasks"]) == 2 for found in first.values())
    capsys.readouterr()
    assert permuted.main([*run, "0", "1", "--arms", "winners"]) == 0
    assert "seed 0" not in capsys.readouterr().out
    second = json.loads(path.read_text())["arms"]
    assert second["winners"].keys() == {"0", "1"}
    assert second["winners"]["0"] == first["winners"]["0"]
    with pytest.raises(SystemExit, match="Expected a file of"):
        permuted.main([*run, "0", "--epochs", "2"])


def test_the_nearest_prototype() -> None:
    prototypes = torch.randn(5, 30)
    x = prototypes[[3, 0, 4]] + 0.1 * torch.randn(3, 30)
    assert permuted.nearest(x, prototypes).tolist() == [3, 0, 4]
    assert permuted.nearest(x, prototypes[:1]).tolist() == [0]


@pytest.mark.parametrize("kind", gated.KINDS)
def test_dense_twins_compute_the_same(kind: str) -> None:
    x, y = torch.rand(BATCH, N), torch.randint(CLASSES, (BATCH,))
    steps = [TrainingStep(network, 1e-3) for network in gated.networks(kind).values()]
    ours, dense = (results(step, x, y) for step in steps)
    assert largest_error(dense, ours) < 1e-4


def test_as_many_parameters_with_a_cable_and_without() -> None:
    counts = [count_parameters(max_dendrites.layer(name, 0)) for name in ("cable", "max")]
    assert counts == [38_016, 38_016]
