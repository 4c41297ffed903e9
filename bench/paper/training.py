"""Training as the paper does it: Adam, cross-entropy from logits, a fixed number of epochs.

Source: Chavlis & Poirazi (2025), Methods; docs/equations.md, sections 4 and 8.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import dendrite_kernels as dk
from bench.paper.datasets import ImageData, Split, split
from dendrite_kernels.benchmark.masked_dense import (
    dense_parameters,
    masked_dense_twin,
    trainable_parameters,
)
from dendrite_kernels.benchmark.memory import PeakMemory
from dendrite_kernels.benchmark.training_step import TrainingStep

WARM_UP_STEPS = 10  # not timed: allocator, thread pool and lazy imports


@dataclass(frozen=True)
class Network:
    """Arguments of `dk.models.build` besides the data set; `twin`: build its masked-dense twin."""

    kind: dk.models.Kind
    somas: int
    dendrites: int
    synapses: int
    seed: int = 0
    twin: bool = False

    def build(self, data: ImageData) -> nn.Module:
        torch.manual_seed(self.seed)
        model = dk.models.build(
            self.kind,
            data.in_shape,
            self.somas,
            self.dendrites,
            self.synapses,
            data.classes,
            channels=data.channels,
            seed=self.seed,
            init="paper",
        )
        return masked_dense_twin(model) if self.twin else model


@dataclass(frozen=True)
class Schedule:
    epochs: int
    batch: int = 128
    lr: float = 1e-3


@dataclass
class Outcome:
    """Results of one training; losses are means over samples, accuracies fractions."""

    trainable_parameters: int
    dense_parameters: int
    step_loss: list[float] = field(default_factory=list)  # of every training step
    step_ms: list[float] = field(default_factory=list)  # of every full batch after the warm-up
    # {train,val,test}_{loss,accuracy} -> one value per epoch
    history: dict[str, list[float]] = field(default_factory=dict)
    peak_memory_mib: float | None = None
    seconds: float = 0.0

    def step_percentiles(self) -> dict[str, float]:
        if not self.step_ms:
            return {}
        p20, p50, p80 = np.percentile(self.step_ms, [20, 50, 80])
        return {"p20": float(p20), "p50": float(p50), "p80": float(p80)}

    def summary(self) -> dict[str, object]:
        """For a JSON file: percentiles and the curves over epochs, not every step."""
        kept = {
            key: value for key, value in asdict(self).items() if key not in ("step_loss", "step_ms")
        }
        return {**kept, "step_ms": self.step_percentiles()}


def train_network(
    data: ImageData,
    network: Network,
    schedule: Schedule,
    threads: int | None = None,
) -> Outcome:
    """Build and train one network; call it in a fresh process (`memory.in_fresh_process`).

    Its peak memory is what training adds to a process with data and torch loaded: parameters,
    masks, gradients, optimizer state, activations. Memory that only building the model needs is
    not counted.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    prepared = split(data, np.random.default_rng(network.seed))
    _load_torch_lazily_imported(prepared)
    memory = PeakMemory()
    model = network.build(data)
    memory.forget_peak()
    title = "masked dense" if network.twin else network.kind
    outcome = train(model, prepared, schedule, np.random.default_rng(network.seed), title)
    outcome.peak_memory_mib = memory.growth()
    return outcome


def train(
    model: nn.Module,
    data: Split,
    schedule: Schedule,
    rng: np.random.Generator,
    title: str | None = None,
) -> Outcome:
    """Train `model` in place. `rng` shuffles the samples every epoch; the last batch may be small.

    `title` is that of the progress bar, which appears only on a terminal; None: no bar.
    """
    outcome = Outcome(trainable_parameters(model), dense_parameters(model))
    step = TrainingStep(model, schedule.lr)
    batches = math.ceil(len(data.y_train) / schedule.batch)
    started = time.perf_counter()
    with tqdm(
        total=schedule.epochs * batches, desc=title, unit="step", disable=None if title else True
    ) as bar:
        for _ in range(schedule.epochs):
            _train_epoch(step, data, schedule.batch, rng, outcome, bar)
            for part, x, y in (("val", data.x_val, data.y_val), ("test", data.x_test, data.y_test)):
                _record(outcome, part, *evaluate(model, x, y, schedule.batch))
            bar.set_postfix(
                loss=f"{outcome.history['train_loss'][-1]:.3f}",
                test=f"{outcome.history['test_accuracy'][-1]:.2%}",
            )
    outcome.seconds = time.perf_counter() - started
    return outcome


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor, batch: int) -> tuple[float, float]:
    """Mean loss and accuracy, in batches as in training, so that peak memory does not grow."""
    model.eval()
    loss, correct = 0.0, 0
    for xb, yb in zip(torch.split(x, batch), torch.split(y, batch), strict=True):
        logits = model(xb)
        loss += float(F.cross_entropy(logits, yb, reduction="sum"))
        correct += int((logits.argmax(1) == yb).sum())
    model.train()
    return loss / len(y), correct / len(y)


def _train_epoch(
    step: TrainingStep,
    data: Split,
    batch: int,
    rng: np.random.Generator,
    outcome: Outcome,
    bar: tqdm[None],
) -> None:
    loss_sum, correct = 0.0, 0
    for x, y in _batches(data.x_train, data.y_train, batch, rng):
        started = time.perf_counter()
        loss, logits = step(x, y)
        elapsed = time.perf_counter() - started
        if len(outcome.step_loss) >= WARM_UP_STEPS and len(y) == batch:
            outcome.step_ms.append(1e3 * elapsed)
        outcome.step_loss.append(float(loss))
        loss_sum += outcome.step_loss[-1] * len(y)
        correct += int((logits.argmax(1) == y).sum())
        bar.update()
    _record(outcome, "train", loss_sum / len(data.y_train), correct / len(data.y_train))


def _batches(
    x: Tensor, y: Tensor, batch: int, rng: np.random.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    for chosen in torch.split(torch.from_numpy(rng.permutation(len(y))), batch):
        yield x[chosen], y[chosen]


def _record(outcome: Outcome, part: str, loss: float, accuracy: float) -> None:
    outcome.history.setdefault(f"{part}_loss", []).append(loss)
    outcome.history.setdefault(f"{part}_accuracy", []).append(accuracy)


def _load_torch_lazily_imported(data: Split) -> None:
    """One step of a small dense network, in which torch imports modules (100 MB)."""
    TrainingStep(nn.Linear(data.x_train.shape[1], int(data.y_train.max()) + 1), 1e-3)(
        data.x_train[:128], data.y_train[:128]
    )
