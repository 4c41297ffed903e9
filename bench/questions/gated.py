"""What do context gates and k winners cost, beside the same network of dense layers under masks?

    python -m bench.questions.gated [--threads 1 2] [--seconds 40]

Whole training steps (zero_grad, forward, cross-entropy, backward, masks on the gradients of dense
layers, Adam) of networks in turns: 784 inputs, 128 somas of 16 dendrites with 16 synapses each, 5 %
winners, an output layer, 128 samples. Gates see 10 contexts of 784 numbers through segments of 32
synapses, 10 for each soma or 2 for each dendrite. "one context": all samples have the same one.
After five steps networks under masks must give the same logits as ours.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dendrite_kernels as dk
from bench.environment import describe_run
from bench.questions.dense_twins import (
    BATCH,
    CLASSES,
    SOMAS,
    N,
    keep,
    largest_error,
    random,
    report_speed,
    results,
)  # fmt: skip
from bench.speed.run import RESULTS
from dendrite_kernels.benchmark.masked_dense import MaskedDendriticLayer
from dendrite_kernels.benchmark.timing import Task, interleave, ratio
from dendrite_kernels.benchmark.training_step import TrainingStep

DENDRITES, CONTEXTS = 16, 10
KINDS = ["no gate", "gates of somas", "gates of dendrites", "gates of dendrites, one context"]


class DenseLayer(MaskedDendriticLayer):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        a = F.leaky_relu(self.dendrite(x), self.negative_slope)
        a = a if gate is None else a * gate
        return F.leaky_relu(self.soma(a), self.negative_slope)


class DenseGate(nn.Module):
    """A ContextGate whose segments are a dense layer under a mask."""

    def __init__(self, gate: dk.ContextGate) -> None:
        super().__init__()
        mask, self.blocks = gate.connectivity.to_mask(), gate.connectivity.num_somas
        self.segments = nn.Linear(mask.shape[1], mask.shape[0], bias=False)
        with torch.no_grad():
            self.segments.weight.zero_()[mask] = gate.weight
        self.segments.weight.register_post_accumulate_grad_hook(partial(keep, mask.float()))

    def forward(self, context: Tensor) -> Tensor:
        d = self.segments(context).unflatten(-1, (self.blocks, -1))
        largest: Tensor = d.gather(-1, d.abs().argmax(-1, keepdim=True)).squeeze(-1)
        return largest.sigmoid()


class Network(nn.Module):
    def __init__(self, kind: str, layer: nn.Module, gate: nn.Module | None) -> None:
        super().__init__()
        self.kind, self.layer, self.gate = kind, layer, gate
        self.winners, self.head = dk.KWinners(0.05), nn.Linear(SOMAS, CLASSES)
        self.contexts, self.which = torch.rand(CONTEXTS, N), torch.randint(CONTEXTS, (BATCH,))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor
        if self.gate is None:
            y = self.layer(x)
        elif self.kind == "gates of somas":
            y = self.layer(x) * self.gate(self.contexts)[self.which]
        elif self.kind == "gates of dendrites":
            y = self.layer(x, gate=self.gate(self.contexts)[self.which])
        else:
            y = self.layer(x, gate=self.gate(self.contexts[0]))
        logits: Tensor = self.head(self.winners(y))
        return logits


def networks(kind: str) -> dict[str, Network]:
    """Ours, and its dense twin."""
    torch.manual_seed(0)
    layer = dk.DendriticLayer(random(SOMAS, DENDRITES, 16, seed=0))
    gate = None
    if kind != "no gate":
        units, segments = (SOMAS, 10) if "somas" in kind else (SOMAS * DENDRITES, 2)
        gate = dk.ContextGate(random(units, segments, 32, seed=1))
    dense = DenseLayer.from_layer(layer), None if gate is None else DenseGate(gate)
    found = {}
    for name, parts in [(kind, (layer, gate)), (f"{kind}, dense masks", dense)]:
        torch.manual_seed(1)
        found[name] = Network(kind, *parts)
    return found


def speed(seconds: float) -> dict[str, Any]:
    torch.manual_seed(2)
    x, y = torch.rand(BATCH, N), torch.randint(CLASSES, (BATCH,))
    tasks: dict[str, Task] = {}
    errors: dict[str, float] = {}
    for kind in KINDS:
        steps = {name: TrainingStep(network, 1e-3) for name, network in networks(kind).items()}
        ours, dense = (results(step, x, y) for step in steps.values())
        errors[kind] = largest_error(dense, ours)
        tasks |= {name: Task(partial(step, x, y)) for name, step in steps.items()}
    interleave(list(tasks.values()), seconds)
    pairs = [(f"{kind}, dense masks", kind) for kind in KINDS]
    pairs += [(kind, KINDS[0]) for kind in KINDS[1:]]
    return {
        "ms": {name: task.summary() for name, task in tasks.items()},
        "ratios": {f"{a} / {b}": ratio(tasks[a], tasks[b]) for a, b in pairs},
        "relative_errors": errors,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.questions.gated")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=40.0, help="of timing, for each of these")
    parser.add_argument("--output", type=Path, default=RESULTS / "gates_speed.json")
    options = parser.parse_args(arguments)
    report = describe_run(parser, arguments, options.threads[0])
    report_speed(report, options.output, options.threads, partial(speed, options.seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
