"""A whole training step of one layer: zero_grad, forward, loss, backward, masks, fused Adam."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import dendrite_kernels as dk

from ..backends import BackendName
from .case import Case
from .masked_dense import MaskedDendriticLayer
from .memory import PeakMemory, in_fresh_process
from .problem import Problem
from .training_step import TrainingStep

STEPS, SECONDS = 3, 0.2  # at least; the optimizer's state appears in the first step
_RATE = 0.0  # the same work, and the weights stay what was verified


@dataclass(frozen=True)
class Measured:
    """Of making and training a layer; None where the system does not tell."""

    growth_mib: float | None  # what training adds to a process that is ready to train
    peak_mib: float | None  # of the whole process, also while it made the layer
    step_seconds: float  # the fastest step


def step_of(module: nn.Module, problem: Problem) -> Callable[[], object]:
    """A step of `module` on the problem's samples, its outputs taken as classes."""
    labels = torch.arange(len(problem.x), device=problem.x.device) % problem.connectivity.num_somas
    step = TrainingStep(module, _RATE)
    return lambda: step(problem.x, labels)


@dataclass(frozen=True)
class Training:
    """A layer to make and train in a process of its own.

    What it adds: connectivity, parameters, gradients, optimizer state and activations; not the
    input, nor what only making the layer needs.
    """

    case: Case
    kind: str
    threads: int
    official: bool = False  # as masked dense layers
    dtype: torch.dtype = torch.float32
    backend: BackendName | None = None
    input_gradient: bool = False

    def measure(self) -> Measured:
        torch.set_num_threads(self.threads)
        dk.use_backend(self.backend)
        case = self.case
        x = torch.rand(case.batch, case.in_features, dtype=self.dtype)
        x.requires_grad_(self.input_gradient)
        labels = torch.arange(case.batch) % case.somas
        _make_ready()
        memory = PeakMemory()
        layer = dk.DendriticLayer(case.connectivity(self.kind), dtype=self.dtype)
        module = MaskedDendriticLayer.from_layer(layer, torch.int64) if self.official else layer
        del layer
        making = memory.peak()
        memory.forget_peak()
        step = TrainingStep(module, _RATE)
        seconds: list[float] = []
        while len(seconds) < STEPS or sum(seconds) < SECONDS:
            x.grad = None
            started = time.perf_counter()
            step(x, labels)
            seconds.append(time.perf_counter() - started)
        peaks = [peak for peak in (making, memory.peak()) if peak is not None]
        return Measured(memory.growth(), max(peaks, default=None), min(seconds))


def memory_growth(training: Training) -> float | None:
    return in_fresh_process(training.measure).growth_mib


def _make_ready() -> None:
    """Steps of small layers: lazy imports, the extension, the thread pool."""
    layer = dk.DendriticLayer(dk.connectivity.random(64, 16, 4, 4, seed=0))
    for module in (layer, MaskedDendriticLayer.from_layer(layer)):
        TrainingStep(module, _RATE)(torch.rand(32, 64), torch.arange(32) % 16)
