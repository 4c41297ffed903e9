"""A training with what it costs: time of a step, peak memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import nn

from bench.paper.datasets import ImageData
from bench.paper.run import Run
from bench.paper.splits import prepare
from bench.paper.training import Outcome, Steps, Training, complete
from dendrite_kernels.benchmark.memory import PeakMemory
from dendrite_kernels.benchmark.training_step import TrainingStep


@dataclass
class Measured:
    """`outcome` has the test set's loss and accuracy after every epoch, too."""

    outcome: Outcome
    steps: Steps
    peak_memory_mib: float | None

    def summary(self) -> dict[str, object]:
        """For a JSON file: percentiles and the curves over epochs, not every step."""
        return {
            **asdict(self.outcome),
            "step_ms": self.steps.percentiles(),
            "peak_memory_mib": self.peak_memory_mib,
        }


def train_measured(data: ImageData, run: Run, threads: int | None = None) -> Measured:
    """Build and train one network; call it in a fresh process (`memory.in_fresh_process`).

    Its peak memory is what training adds to a process with data and torch loaded: parameters,
    masks, gradients, optimizer state, activations. Memory that only building the model needs is
    not counted.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    prepared, steps = prepare(data, run), Steps()
    _load_torch_lazily_imported(data)
    memory = PeakMemory()
    model = run.build(data)
    memory.forget_peak()
    title = "masked dense" if run.twin else run.kind
    training = Training([run], [model], [prepared])
    ((_, _, outcome),) = complete(training, steps=steps, test_every_epoch=True, title=title)
    return Measured(outcome, steps, memory.growth())


def _load_torch_lazily_imported(data: ImageData) -> None:
    """One step of a small dense network, in which torch imports modules (100 MB)."""
    x, y = torch.from_numpy(data.x_train[:128]), torch.from_numpy(data.y_train[:128])
    TrainingStep(nn.Linear(x.shape[1], data.classes), 1e-3)(x, y)
