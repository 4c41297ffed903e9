"""The demo, its measurements, and Adam as Keras computes it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bench.paper import demo
from bench.paper.measured import Measured
from bench.paper.training import Outcome, Steps
from dendrite_kernels.benchmark.memory import PeakMemory, in_fresh_process
from dendrite_kernels.benchmark.training_step import TrainingStep


def test_adam_is_keras_adam() -> None:
    """Against the published rule with eps outside the bias correction, small gradients included."""
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    scale = torch.tensor([1.0, 1e-6, 1e-8], dtype=torch.float64)  # so that eps matters

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * (self.weight * scale)

    model = Model()
    step = TrainingStep(model, lr=1e-2)
    expected, m, v = weight.detach().clone(), torch.zeros(3), torch.zeros(3)
    generator = torch.Generator().manual_seed(0)
    for t in range(1, 30):
        x = torch.randn(4, 3, dtype=torch.float64, generator=generator)
        y = torch.arange(4) % 3
        step(x, y)
        w = expected.clone().requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(x * (w * scale), y), w)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        rate = 1e-2 * math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        expected = expected - rate * m / (v.sqrt() + 1e-7)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-9, atol=0)


def fill(mib: int) -> float | None:
    torch.ones(1)
    memory = PeakMemory()
    array = np.ones(mib << 17)  # 8 bytes each
    del array
    return memory.growth()


def fill_before(mib: int) -> float | None:
    array = np.ones(mib << 17)
    del array
    memory = PeakMemory()
    kept = np.ones(1 << 17)
    return memory.growth() if kept[0] else None


def test_peak_memory_sees_what_was_freed_and_forgets_what_was_before() -> None:
    grown, before = in_fresh_process(fill, 100), in_fresh_process(fill_before, 100)
    if grown is None or before is None:
        pytest.skip("this system does not report its peak memory")
    assert 95 <= grown <= 110  # the kernel counts pages in batches
    assert before <= 10


def fail() -> None:
    raise ValueError("Expected nothing, got this")


def test_errors_of_a_fresh_process_come_back() -> None:
    with pytest.raises(ValueError, match="Expected nothing, got this"):
        in_fresh_process(fail)


def test_agreement() -> None:
    def training(first: float, last: float) -> Measured:
        outcome = Outcome(1, 1, history={"train_loss": [2.0, last]})
        return Measured(outcome, Steps(loss=[2.0, first] * 30), None)

    exact = training(1.0, 0.5)
    assert demo.Agreement.of(exact, exact).holds
    assert demo.Agreement.of(training(1.0005, 0.51), exact).holds
    assert not demo.Agreement.of(training(1.002, 0.5), exact).holds
    apart = demo.Agreement.of(training(1.0, 0.56), exact)
    assert not apart.holds
    assert "DO NOT AGREE" in str(apart)


def test_demo_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--somas", "8", "--dendrites", "4", "--epochs", "2", "--batch", "64"]
    assert demo.main([*sizes, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for part in ("bundled", "28x28", "masked dense", "test accuracy", "The two trainings agree"):
        assert part in printed
    report = json.loads((tmp_path / "demo.json").read_text())
    assert report["agreement"]["holds"]
    trainable = (
        16 * 32 + 32 + 32 + 8 + 90
    )  # synapses, dendrites' biases, cables, somas' biases, output
    assert report["sparse"]["trainable_parameters"] == trainable
    assert report["masked_dense"]["trainable_parameters"] == trainable
    assert report["sparse"]["dense_parameters"] == trainable
    assert report["masked_dense"]["dense_parameters"] == 784 * 32 + 32 * 8 + 32 + 8 + 90
    assert len(report["sparse"]["history"]["test_loss"]) == 2
    assert report["environment"]["versions"]["torch"]
    assert (tmp_path / "demo.png").read_bytes()[:4] == b"\x89PNG"


def test_demo_says_what_data_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--data", "mnist", "--data-root", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "error: No files of data set 'mnist' in" in said
    assert "Looked for" in said
    assert "t10k-labels-idx1-ubyte.gz" in said
