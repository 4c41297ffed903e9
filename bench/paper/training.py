"""Training as the article does it: Adam, cross-entropy from logits, epochs, early stopping.

Trials of one run may be trained as one network (`trials.join`); their results are those of
separate trainings but for rounding. After a stop a training goes on from its checkpoint as if it
had not stopped.

Source: Chavlis & Poirazi (2025), Methods; docs/equations.md, section 8.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from bench.paper.datasets import ImageData
from bench.paper.run import Run
from bench.paper.splits import Split, prepare
from bench.paper.trials import join, part
from dendrite_kernels._replace import replaced
from dendrite_kernels.benchmark.masked_dense import dense_parameters, trainable_parameters
from dendrite_kernels.benchmark.training_step import TrainingStep

WARM_UP_STEPS = 10  # not timed: allocator, thread pool and lazy imports
History = dict[str, list[float]]  # {train,val}_{loss,accuracy} -> one value for each epoch


@dataclass
class Outcome:
    """Results of one training; losses are means over samples, accuracies fractions."""

    trainable_parameters: int
    dense_parameters: int
    history: History = field(default_factory=dict)
    epoch: int = 0  # that the final weights come from, counted from 0
    test_loss: float = math.nan
    test_accuracy: float = math.nan
    seconds: float = 0.0  # by the clock; of a training of several trials, its share


@dataclass
class Steps:
    """What a caller may want to know of every step: mean loss over trials, and its time."""

    loss: list[float] = field(default_factory=list)
    ms: list[float] = field(default_factory=list)  # of every full batch after the warm-up

    def percentiles(self) -> dict[str, float]:
        if not self.ms:
            return {}
        p20, p50, p80 = np.percentile(self.ms, [20, 50, 80])
        return {"p20": float(p20), "p50": float(p50), "p80": float(p80)}


def lowest(losses: Sequence[float]) -> int:
    """Where the lowest loss is; a training that diverges has NaN."""
    return int(np.argmin(np.nan_to_num(losses, nan=math.inf)))


class Trained(NamedTuple):
    """One trial after training."""

    model: nn.Sequential
    data: Split
    outcome: Outcome


def train(runs: Sequence[Run], data: ImageData, **options: Any) -> list[Trained]:
    """Train runs that differ only in their trial, as one network; options of `complete`.

    Raises:
        ValueError: no run, runs that differ in more than the trial, several of them with early
            stopping, or a checkpoint of other runs.
        TypeError: several runs with layers that cannot be joined: `trials.can_join`.
    """
    models, splits = [run.build(data) for run in runs], [prepare(data, run) for run in runs]
    return complete(Training(runs, models, splits), **options)


def complete(
    training: Training,
    *,
    checkpoint: Path | None = None,
    log: Path | None = None,
    steps: Steps | None = None,
    test_every_epoch: bool = False,
    title: str | None = None,
) -> list[Trained]:
    """Train to the end.

    Args:
        training: what to train.
        checkpoint: a file written at the start and after every epoch, and removed at the end. If it
            is there, the training goes on from it.
        log: a JSONL file, one line for each epoch and trial.
        steps: is told every step.
        test_every_epoch: `history` has test_loss and test_accuracy, too.
        title: of the progress bar, which appears only on a terminal; None: no bar.
    """
    if checkpoint is not None:
        if checkpoint.exists():
            training.load(checkpoint)
        else:
            training.save(checkpoint)  # one that cannot be written costs no epoch
    if log is not None:
        _write_log(log, training)
    parts = ("val", "test") if test_every_epoch else ("val",)
    with tqdm(
        total=training.run.epochs,
        initial=training.epochs,
        desc=title,
        unit="epoch",
        disable=None if title else True,
    ) as bar:
        while not training.ended:
            training.epoch(parts, steps)
            if log is not None:
                _append_log(log, training)
            if checkpoint is not None:
                training.save(checkpoint)
            losses = [outcome.history["val_loss"][-1] for outcome in training.outcomes]
            bar.set_postfix(val_loss=f"{np.mean(losses):.3f}")
            bar.update()
    trained = training.finish()
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return trained


class Training:
    """Some trials of a run in training: what changes from epoch to epoch."""

    def __init__(
        self, runs: Sequence[Run], models: Sequence[nn.Sequential], splits: Sequence[Split]
    ) -> None:
        if not runs or any(replace(run, trial=runs[0].trial) != runs[0] for run in runs):
            raise ValueError(f"Expected runs that differ only in their trial, got {list(runs)}")
        self.runs, self.run, self.models, self.splits = runs, runs[0], models, splits
        if self.run.patience is not None and len(runs) > 1:
            raise ValueError(f"Expected one run with early stopping, got {len(runs)}")
        self.joined = join(models)
        self.step = TrainingStep(self.joined, self.run.lr, self._losses)
        self.outcomes = [Outcome(trainable_parameters(m), dense_parameters(m)) for m in models]
        self.epochs = 0  # that are complete
        self.best: dict[str, Tensor] | None = None  # weights with the lowest validation loss

    @property
    def ended(self) -> bool:
        return self.epochs == self.run.epochs or self._impatient

    @property
    def _impatient(self) -> bool:
        patience = self.run.patience
        return patience is not None and self.epochs - 1 - self._best_epoch() >= patience

    def _best_epoch(self) -> int:
        losses = self.outcomes[0].history.get("val_loss", [])
        return lowest(losses) if losses else self.epochs

    def epoch(self, parts: Sequence[str] = ("val",), steps: Steps | None = None) -> None:
        """Train for one epoch, then evaluate on `parts` of the data, val and maybe test."""
        started = time.perf_counter()
        seed = np.random.SeedSequence([self.run.trial, self.epochs]).generate_state(1)
        torch.manual_seed(int(seed[0]))  # of dropout, if there is any
        trials = len(self.runs)
        loss_sum, correct = torch.zeros(trials, dtype=torch.float64), torch.zeros(trials)
        for x, y in self._batches():
            begun = time.perf_counter()
            losses, logits = self.step(x, y)
            if steps is not None:
                warm = len(steps.loss) >= WARM_UP_STEPS
                steps.loss.append(float(losses.mean()))
                if warm and len(y) == self.run.batch:
                    steps.ms.append(1e3 * (time.perf_counter() - begun))
            loss_sum += losses * len(y)
            correct += self._correct(logits, y)
        count = len(self.splits[0].y_train)
        self._record("train", loss_sum / count, correct / count)
        for name in parts:
            self._record(name, *self.evaluate(name))
        self.epochs += 1
        for outcome in self.outcomes:
            outcome.seconds += (time.perf_counter() - started) / trials
        if self.run.patience is not None and self._best_epoch() == self.epochs - 1:
            self.best = copy.deepcopy(self.joined.state_dict())

    def finish(self) -> list[Trained]:
        """The trials with their final weights, evaluated on the test set.

        These are the best ones if early stopping ended the training, otherwise the last ones.
        """
        if self._impatient and self.best is not None:
            self.joined.load_state_dict(self.best)
        losses, accuracies = self.evaluate("test")
        part(self.joined, self.models)
        for i, outcome in enumerate(self.outcomes):
            outcome.epoch = self._best_epoch() if self._impatient else self.epochs - 1
            outcome.test_loss, outcome.test_accuracy = float(losses[i]), float(accuracies[i])
        return [Trained(*one) for one in zip(self.models, self.splits, self.outcomes, strict=True)]

    @torch.no_grad()
    def evaluate(self, name: str) -> tuple[Tensor, Tensor]:
        """Mean loss and accuracy [T], in batches as in training, so that memory does not grow."""
        self.joined.eval()
        trials = len(self.runs)
        loss, correct = torch.zeros(trials, dtype=torch.float64), torch.zeros(trials)
        xs = [getattr(split, f"x_{name}") for split in self.splits]
        ys = [getattr(split, f"y_{name}") for split in self.splits]
        for start in range(0, len(ys[0]), self.run.batch):
            rows = slice(start, start + self.run.batch)
            y = torch.stack([own[rows] for own in ys], 1)
            logits = self.joined(_beside([own[rows] for own in xs]))
            loss += self._losses(logits, y) * len(y)
            correct += self._correct(logits, y)
        self.joined.train()
        return loss / len(ys[0]), correct / len(ys[0])

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "runs": [run.key for run in self.runs],
            "epochs": self.epochs,
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
            "model": self.joined.state_dict(),
            "optimizer": self.step.optimizer.state_dict(),
            "best": self.best,
        }
        with replaced(path) as temporary:
            torch.save(state, temporary)

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote for the same runs; ValueError for others."""
        keys = [run.key for run in self.runs]
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True)
            found = state["runs"]
        except Exception as error:  # torch.load raises nearly anything for another file
            raise ValueError(
                f"Expected a checkpoint of a training in {path}, got another or a damaged file "
                f"({type(error).__name__}): remove it to begin anew"
            ) from error
        if found != keys:
            raise ValueError(f"Expected a checkpoint of {keys} in {path}, got one of {found}")
        self.epochs, self.best = state["epochs"], state["best"]
        self.outcomes = [Outcome(**outcome) for outcome in state["outcomes"]]
        self.joined.load_state_dict(state["model"])
        self.step.optimizer.load_state_dict(state["optimizer"])

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """x [B, T * N] and y [B, T]; the last batch of an epoch may be small."""
        orders = [
            self._order(run, split) for run, split in zip(self.runs, self.splits, strict=True)
        ]
        for chosen in zip(*(order.split(self.run.batch) for order in orders), strict=True):
            own = list(zip(self.splits, chosen, strict=True))
            x = _beside([split.x_train[rows] for split, rows in own])
            yield x, torch.stack([split.y_train[rows] for split, rows in own], 1)

    def _order(self, run: Run, split: Split) -> Tensor:
        count = len(split.y_train)
        if run.task == "sequential":
            return torch.arange(count)
        return torch.from_numpy(np.random.default_rng([run.trial, self.epochs]).permutation(count))

    def _losses(self, logits: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy of each trial: logits [B, T * C], y [B, T] -> [T]."""
        losses = F.cross_entropy(logits.reshape(y.numel(), -1), y.reshape(-1), reduction="none")
        return losses.view(y.shape).mean(0)

    def _correct(self, logits: Tensor, y: Tensor) -> Tensor:
        """How many samples each trial has right, [T]."""
        return (logits.view(*y.shape, -1).argmax(2) == y).sum(0)

    def _record(self, name: str, losses: Tensor, accuracies: Tensor) -> None:
        for i, outcome in enumerate(self.outcomes):
            outcome.history.setdefault(f"{name}_loss", []).append(float(losses[i]))
            outcome.history.setdefault(f"{name}_accuracy", []).append(float(accuracies[i]))


def _beside(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _write_log(path: Path, training: Training) -> None:
    """The lines of the complete epochs: a training that was killed may have written one more."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as temporary:
        temporary.write_text("".join(_log_lines(training, range(training.epochs))))


def _append_log(path: Path, training: Training) -> None:
    with path.open("a") as file:
        file.writelines(_log_lines(training, [training.epochs - 1]))


def _log_lines(training: Training, epochs: Sequence[int]) -> list[str]:
    return [
        json.dumps({"run": asdict(run), "epoch": epoch, **_row(outcome.history, epoch)}) + "\n"
        for epoch in epochs
        for run, outcome in zip(training.runs, training.outcomes, strict=True)
    ]


def _row(history: History, epoch: int) -> dict[str, float]:
    return {name: values[epoch] for name, values in history.items()}
