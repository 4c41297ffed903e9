"""Training as the article does it, on small data, against training written out in plain PyTorch."""

from __future__ import annotations

import copy
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bench.paper.datasets import ImageData, from_arrays
from bench.paper.run import Run
from bench.paper.splits import prepare
from bench.paper.training import Steps, Training, train
from bench.paper.trials import join, part
from dendrite_kernels.benchmark.training_step import KerasAdam

RUN = Run("stripes", "dANN-R", dendrites=2, somas=6, synapses=4, epochs=3, batch=32, lr=0.01)


def stripes(n: int = 300, seed: int = 0) -> ImageData:
    """Images of 6 x 5 pixels with a bright row or column that tells the class."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 6, n)
    x = rng.integers(0, 120, (n, 6, 5))
    x[np.arange(n), y] += 100
    half = n // 2
    x = x.astype(np.uint8)
    return from_arrays(x[:half], y[:half], x[half:], y[half:])


DATA = stripes()


def plain(run: Run, data: ImageData) -> tuple[nn.Module, list[float]]:
    """The article's training, without anything of `training`: the model, mean losses of epochs."""
    model, split = run.build(data), prepare(data, run)
    adam, losses = KerasAdam(model.parameters(), run.lr), []
    assert run.epochs is not None
    for epoch in range(run.epochs):
        order = np.random.default_rng([run.trial, epoch]).permutation(len(split.y_train))
        total = 0.0
        for start in range(0, len(order), run.batch):
            rows = torch.from_numpy(order[start : start + run.batch])
            adam.zero_grad()
            loss = F.cross_entropy(model(split.x_train[rows]), split.y_train[rows])
            loss.backward()
            adam.step()
            total += loss.item() * len(rows)
        losses.append(total / len(order))
    return model, losses


def same_parameters(a: nn.Module, b: nn.Module, tolerance: float) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["dANN-LRF", "vANN", "sANN"])
def test_one_run_is_plain_training(kind: Any) -> None:
    run = replace(RUN, kind=kind)
    model, losses = plain(run, DATA)
    ((trained, split, outcome),) = train([run], DATA)
    same_parameters(trained, model, 1e-6)
    assert outcome.history["train_loss"] == pytest.approx(losses, rel=1e-5)
    for name in ("val", "test"):
        x, y = getattr(split, f"x_{name}"), getattr(split, f"y_{name}")
        loss = F.cross_entropy(model(x), y).item()
        accuracy = (model(x).argmax(1) == y).double().mean().item()
        got = (
            (outcome.test_loss, outcome.test_accuracy)
            if name == "test"
            else (outcome.history["val_loss"][-1], outcome.history["val_accuracy"][-1])
        )
        assert got == pytest.approx((loss, accuracy), rel=1e-5)
    assert outcome.epoch == 2
    assert outcome.trainable_parameters == sum(p.numel() for p in trained.parameters())


@pytest.mark.parametrize("kind", ["dANN-R", "dANN-GRF", "pdANN", "sANN", "vANN", "vANN-LRF"])
@pytest.mark.parametrize("task", ["shuffled", "sequential"])
def test_trials_trained_as_one_are_separate_runs(kind: Any, task: Any) -> None:
    data = stripes(1200)
    runs = [replace(RUN, kind=kind, task=task, layers=2, noise=0.1, trial=t) for t in range(3)]
    together = train(runs, data)
    for run, one in zip(runs, together, strict=True):
        ((model, split, outcome),) = train([run], data)
        assert torch.equal(split.x_train, one.data.x_train)
        same_parameters(one.model, model, 2e-4)
        for name, values in outcome.history.items():
            assert one.outcome.history[name] == pytest.approx(values, rel=1e-2)
        assert one.outcome.test_loss == pytest.approx(outcome.test_loss, rel=1e-3)


def test_joined_networks_do_not_touch() -> None:
    models = [replace(RUN, trial=t, layers=2).build(DATA) for t in range(3)]
    joined, xs = join(models), [torch.rand(7, 30, requires_grad=True) for _ in models]
    outputs = joined(torch.cat(xs, 1)).unflatten(1, (3, -1))
    for i, (model, x) in enumerate(zip(models, xs, strict=True)):
        torch.testing.assert_close(outputs[:, i], model(x))
    outputs[:, 1].sum().backward()
    assert [bool(x.grad is not None and x.grad.any()) for x in xs] == [False, True, False]


def test_parts_come_back() -> None:
    models = [replace(RUN, trial=t).build(DATA) for t in range(2)]
    joined, kept = join(models), copy.deepcopy(models)
    with torch.no_grad():
        for p in joined.parameters():
            p.mul_(2)
    part(joined, models)
    for model, before in zip(models, kept, strict=True):
        for p, q in zip(model.parameters(), before.parameters(), strict=True):
            assert torch.equal(p, 2 * q)


@pytest.mark.parametrize("options", [{"dropout": 0.2}, {"twin": True}])
def test_what_cannot_be_joined(options: Any) -> None:
    models = [replace(RUN, trial=t, **options).build(DATA) for t in range(2)]
    with pytest.raises(TypeError, match="Expected layers that can be trained as one, got"):
        join(models)


def test_the_trial_decides_everything() -> None:
    losses = [train([replace(RUN, trial=t)], DATA)[0].outcome.test_loss for t in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    "options", [{}, {"dropout": 0.3, "patience": 2}, {"task": "sequential", "noise": 0.2}]
)
@pytest.mark.parametrize("stop", [1, 4])
def test_a_stopped_training_goes_on(options: Any, stop: int, tmp_path: Path) -> None:
    """Bit for bit, whatever a stopped training leaves: an epoch may be in the log already."""
    data = stripes(1200)
    run = replace(RUN, epochs=6, **options)
    ((model, _, outcome),) = train([run], data, log=tmp_path / "whole.jsonl")
    training = Training([run], [run.build(data)], [prepare(data, run)])
    for _ in range(stop):
        training.epoch()
    checkpoint, log = tmp_path / "run.pt", tmp_path / "log.jsonl"
    training.save(checkpoint)
    log.write_text("the lines of more epochs than the checkpoint has\n")
    ((again, _, second),) = train([run], data, checkpoint=checkpoint, log=log)
    same_parameters(again, model, 0.0)
    assert (second.history, second.test_loss) == (outcome.history, outcome.test_loss)
    assert log.read_text() == (tmp_path / "whole.jsonl").read_text()
    assert not checkpoint.exists()


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    training = Training([RUN], [RUN.build(DATA)], [prepare(DATA, RUN)])
    training.save(tmp_path / "run.pt")
    with pytest.raises(ValueError, match=r'Expected a checkpoint of .*"trial":1.*got one of'):
        train([replace(RUN, trial=1)], DATA, checkpoint=tmp_path / "run.pt")


def test_another_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    for path in (tmp_path / "notes.txt", tmp_path):
        with pytest.raises(ValueError, match="Expected a checkpoint of a training in "):
            train([RUN], DATA, checkpoint=path)


def test_log(tmp_path: Path) -> None:
    trained = train([RUN], DATA, log=tmp_path / "a" / "log.jsonl", test_every_epoch=True)
    lines = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert Run(**lines[0]["run"]) == RUN
    assert [line["test_loss"] for line in lines] == trained[0].outcome.history["test_loss"]


def test_early_stopping_takes_the_best_weights() -> None:
    """Noise has nothing to learn: the validation loss rises soon."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (200, 6, 5), dtype=np.uint8), rng.integers(0, 6, 200)
    data = from_arrays(x, y, x, y)
    run = replace(RUN, patience=2, epochs=60, lr=0.05)
    ((model, split, outcome),) = train([run], data)
    losses = outcome.history["val_loss"]
    assert len(losses) < 60
    assert outcome.epoch == int(np.argmin(losses)) == len(losses) - 3
    loss = F.cross_entropy(model(split.x_val), split.y_val).item()
    assert loss == pytest.approx(min(losses), rel=1e-5)
    ((_, _, last),) = train([replace(run, patience=None, epochs=len(losses))], data)
    assert last.history == outcome.history
    assert last.epoch == len(losses) - 1
    assert last.test_loss != outcome.test_loss


def test_steps_are_told() -> None:
    steps = Steps()
    ((_, _, outcome),) = train([RUN], DATA, steps=steps)
    assert len(steps.loss) == 3 * 5  # 135 / 32: the last, partial batch is kept
    assert len(steps.ms) == 3 * 5 - 10 - 1  # full batches after the first ten steps
    times = steps.percentiles()
    assert 0 < times["p20"] <= times["p50"] <= times["p80"]
    weights = [32, 32, 32, 32, 7]
    mean = np.average(steps.loss[:5], weights=weights)
    assert outcome.history["train_loss"][0] == pytest.approx(mean, rel=1e-5)


def test_what_cannot_be_trained_together() -> None:
    with pytest.raises(ValueError, match="Expected runs that differ only in their trial"):
        train([RUN, replace(RUN, lr=0.5)], DATA)
    with pytest.raises(ValueError, match="Expected runs that differ only in their trial, got \\[]"):
        train([], DATA)
    patient = replace(RUN, patience=3)
    with pytest.raises(ValueError, match="Expected one run with early stopping, got 2"):
        train([patient, replace(patient, trial=1)], DATA)


# Runs and their data


def test_a_run_knows_the_epochs_of_the_article() -> None:
    run = Run("mnist", "vANN", 1, 8)
    assert run.epochs == 15
    assert Run("emnist-balanced", "vANN", 1, 8, task="sequential").epochs == 100
    assert Run.from_key(run.key) == run
    assert Run.from_key(replace(run, noise=0.25).key).noise == 0.25


def test_tables_of_earlier_versions_are_read() -> None:
    """A field that they lack is left out of a key where it has its default."""
    assert "init" not in RUN.key
    other = replace(RUN, init="fan_in")
    assert '"init":"fan_in"' in other.key
    assert [Run.from_key(run.key) for run in (RUN, other)] == [RUN, other]
    weights = [next(run.build(DATA).parameters()) for run in (RUN, other)]
    assert not torch.equal(*weights)


@pytest.mark.parametrize("key", ["", "{}", '{"data":"mnist"}', "[1]", RUN.key.replace("32", "-1")])
def test_a_key_that_is_none(key: str) -> None:
    with pytest.raises(ValueError, match="Expected the key of a run, got"):
        Run.from_key(key)


@pytest.mark.parametrize(
    "options",
    [{"task": "other"}, {"init": "he"}, {"epochs": 0}, {"batch": -1}, {"patience": 0},
     {"noise": -0.1}, {"lr": 0.0}, {"noise": math.nan}, {"epochs": 2.5}, {"lr": math.inf},
     {"noise": math.inf}, {"somas": -5}, {"synapses": 0}, {"dropout": 2.0}, {"trial": -1}],
)  # fmt: skip
def test_runs_that_make_no_sense(options: Any) -> None:
    with pytest.raises(ValueError, match="Expected"):
        replace(RUN, **options)


def test_the_split_keeps_the_last_tenth_of_the_shuffled_set() -> None:
    x = np.arange(25, dtype=np.uint8).reshape(25, 1, 1)
    data = from_arrays(x, x.ravel(), x[:10], x.ravel()[:10])
    parts = prepare(data, replace(RUN, trial=7))
    assert (len(parts.y_train), len(parts.y_val), len(parts.y_test)) == (23, 2, 10)
    order = torch.cat([parts.y_train, parts.y_val])
    assert order.tolist() == np.random.default_rng(7).permutation(25).tolist()
    torch.testing.assert_close(torch.cat([parts.x_train, parts.x_val])[:, 0], order / 255)


def test_the_sequential_task_shows_class_after_class() -> None:
    """4,000 samples in batches of 32: int(0.1 * 4000 / (32 * 6)) = 2 of each class validate."""
    data = stripes(8000)
    parts = prepare(data, replace(RUN, task="sequential"))
    counts = np.bincount(data.y_train)
    assert np.bincount(parts.y_train).tolist() == [(c // 32 - 2) * 32 for c in counts]
    assert parts.y_train.tolist() == sorted(parts.y_train.tolist())
    assert len(parts.y_train) + len(parts.y_val) == 4000
    assert parts.y_val.tolist() != sorted(parts.y_val.tolist())
    both = torch.cat([parts.x_train, parts.x_val])
    assert sorted(both.sum(1).tolist()) == pytest.approx(sorted(data.x_train.sum(1).tolist()))
    with pytest.raises(ValueError, match="Expected at least 1 batches of 1000 in each class"):
        prepare(data, replace(RUN, task="sequential", batch=1000))


def test_noise_is_added_once_to_all_images() -> None:
    grey = np.full((400, 20, 20), 128, np.uint8)
    labels = np.arange(400) % 3
    data = from_arrays(grey, labels, grey[:50], labels[:50])
    clean, noisy = (prepare(data, replace(RUN, noise=sigma)) for sigma in (0.0, 0.1))
    assert torch.equal(clean.y_train, noisy.y_train)
    for name in ("x_train", "x_val", "x_test"):
        noise = getattr(noisy, name) - getattr(clean, name)
        assert float(noise.std()) == pytest.approx(0.1, rel=0.02)
        assert abs(float(noise.mean())) < 0.002
    strong = prepare(data, replace(RUN, noise=1.0))
    assert (float(strong.x_test.min()), float(strong.x_test.max())) == (0.0, 1.0)


def test_own_arrays_are_checked() -> None:
    x, y = np.zeros((4, 3, 3), np.uint8), np.arange(4)
    with pytest.raises(ValueError, match=r"Expected uint8 images .* got float64"):
        from_arrays(x / 255, y, x, y)
    with pytest.raises(ValueError, match=r"Expected 4 labels, integers from 0 .* got"):
        from_arrays(x, y[:3], x, y)


def test_a_checkpoint_is_never_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training([RUN], [RUN.build(DATA)], [prepare(DATA, RUN)])
    training.save(tmp_path / "run.pt")
    before = (tmp_path / "run.pt").read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        training.save(tmp_path / "run.pt")
    assert (tmp_path / "run.pt").read_bytes() == before
    assert os.listdir(tmp_path) == ["run.pt"]
