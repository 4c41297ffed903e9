"""A whole training step of one layer: zero_grad, forward, loss, backward, masks, fused Adam."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import dendrite_kernels as dk

from .case import Case
from .masked_dense import MaskedDendriticLayer
from .memory import PeakMemory
from .problem import Problem
from .training_step import TrainingStep

STEPS = 3  # the optimizer's state appears in the first
_RATE = 0.0  # the same work, and the weights stay what was verified


def step_of(module: nn.Module, problem: Problem) -> Callable[[], object]:
    """A step of `module` on the problem's samples, its outputs taken as classes."""
    labels = torch.arange(len(problem.x), device=problem.x.device) % problem.connectivity.num_somas
    step = TrainingStep(module, _RATE)
    return lambda: step(problem.x, labels)


def memory_growth(
    case: Case,
    kind: str,
    official: bool,
    threads: int,
    dtype: torch.dtype = torch.float32,
    input_gradient: bool = False,
) -> float | None:
    """MiB that making and training the case's layer adds to a process that is ready to train.

    Connectivity, parameters, gradients, optimizer state and activations; not the input, nor what
    only making the layer needs. To be called in a fresh process (`memory.in_fresh_process`).
    """
    torch.set_num_threads(threads)
    x = torch.rand(case.batch, case.in_features, dtype=dtype, requires_grad=input_gradient)
    labels = torch.arange(case.batch) % case.somas
    _make_ready()
    memory = PeakMemory()
    layer = dk.DendriticLayer(case.connectivity(kind), dtype=dtype)
    module = MaskedDendriticLayer.from_layer(layer, torch.int64) if official else layer
    del layer
    memory.forget_peak()
    step = TrainingStep(module, _RATE)
    for _ in range(STEPS):
        x.grad = None
        step(x, labels)
    return memory.growth()


def _make_ready() -> None:
    """Steps of small layers: lazy imports, the extension, the thread pool."""
    layer = dk.DendriticLayer(dk.connectivity.random(64, 16, 4, 4, seed=0))
    for module in (layer, MaskedDendriticLayer.from_layer(layer)):
        TrainingStep(module, _RATE)(torch.rand(32, 64), torch.arange(32) % 16)
