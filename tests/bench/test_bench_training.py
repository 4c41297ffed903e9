"""Training, its measurements and the commands, on tiny data."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bench.paper import demo, mnist
from bench.paper.datasets import Split
from bench.paper.training import Outcome, Schedule, evaluate, train
from dendrite_kernels.benchmark.memory import PeakMemory, in_fresh_process
from dendrite_kernels.benchmark.training_step import TrainingStep


def blobs(n: int = 300) -> Split:
    """Three separable clouds in 5 dimensions."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 3
    x = torch.randn(n, 5, generator=generator) + 4 * F.one_hot(y, 5)
    return Split(x[:240], y[:240], x[240:270], y[240:270], x[270:], y[270:])


def linear_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(5, 3)


def test_training_learns_and_records_every_epoch() -> None:
    outcome = train(linear_model(), blobs(), Schedule(4, 32, 0.05), np.random.default_rng(0))
    assert set(outcome.history) == {
        f"{part}_{what}" for part in ("train", "val", "test") for what in ("loss", "accuracy")
    }
    assert all(len(values) == 4 for values in outcome.history.values())
    assert outcome.history["test_accuracy"][-1] > 0.95
    assert outcome.history["train_loss"][-1] < outcome.history["train_loss"][0]
    assert len(outcome.step_loss) == 4 * 8  # 240 / 32: the last, partial batch is kept
    assert len(outcome.step_ms) == 4 * 7 - 9  # full batches after the first ten steps
    times = outcome.step_percentiles()
    assert 0 < times["p20"] <= times["p50"] <= times["p80"]


def test_the_generator_decides_the_batches() -> None:
    losses = [
        train(linear_model(), blobs(), Schedule(2, 32), np.random.default_rng(seed)).step_loss
        for seed in (1, 1, 2)
    ]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_mean_training_loss_weighs_the_partial_batch_by_its_size() -> None:
    data, model = blobs(), linear_model()
    outcome = train(model, data, Schedule(1, 100, lr=0.0), np.random.default_rng(0))
    expected = F.cross_entropy(model(data.x_train), data.y_train).item()
    assert outcome.history["train_loss"][0] == pytest.approx(expected, rel=1e-5)


def test_evaluate_in_batches() -> None:
    data, model = blobs(), linear_model()
    loss, accuracy = evaluate(model, data.x_train, data.y_train, batch=77)
    logits = model(data.x_train)
    assert loss == pytest.approx(F.cross_entropy(logits, data.y_train).item(), rel=1e-5)
    assert accuracy == pytest.approx((logits.argmax(1) == data.y_train).double().mean().item())
    assert model.training


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
    def outcome(first: float, last: float) -> Outcome:
        return Outcome(1, 1, step_loss=[2.0, first] * 30, history={"train_loss": [2.0, last]})

    exact = outcome(1.0, 0.5)
    assert demo.Agreement.of(exact, exact).holds
    assert demo.Agreement.of(outcome(1.0005, 0.51), exact).holds
    assert not demo.Agreement.of(outcome(1.002, 0.5), exact).holds
    apart = demo.Agreement.of(outcome(1.0, 0.56), exact)
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


def test_demo_says_what_data_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"No files of data set 'mnist' in .*Looked for") as error:
        demo.main(["--data", "mnist", "--data-root", str(tmp_path)])
    assert "t10k-labels-idx1-ubyte.gz" in str(error.value)


def test_mnist_command_judges_the_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (200, 28, 28), dtype=np.uint8), np.arange(200, dtype=np.uint8) % 10
    np.savez(tmp_path / "mnist.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    monkeypatch.setattr(mnist, "in_fresh_process", lambda function, *rest: function(*rest))
    output = tmp_path / "mnist.json"
    options = ["--data-root", str(tmp_path), "--epochs", "6", "--output", str(output)]
    assert mnist.main([*options, "--kinds", "dANN-R", "--seeds", "0", "1"]) == 1
    assert "OUTSIDE" in capsys.readouterr().out
    report = json.loads(output.read_text())
    assert [run["network"]["seed"] for run in report["runs"]] == [0, 1]
    (summary,) = report["summaries"]
    accuracies = [run["history"]["test_accuracy"][-1] for run in report["runs"]]
    assert summary["mean"] == pytest.approx(100 * sum(accuracies) / 2)
    assert (summary["within"], summary["expected"]) == (False, [92.9, 93.6])
