"""A tree of dendrites: beside dense layers under masks, and beside flat neurons of its size.

    python -m bench.questions.tree speed [--threads 1 2] [--seconds 30]
    python -m bench.questions.tree accuracy --data-root FOLDER [--seeds 5] [--epochs 8]

speed: whole training steps (zero_grad, forward, cross-entropy, backward, masks on the gradients of
    dense layers, Adam) of networks in turns: 784 inputs, 128 somas of 16 dendrites with 16 synapses
    each, flat or as 4 branches of 4 twigs, an output layer, 128 samples. After five steps,
    networks under masks must give the same logits as ours.
accuracy: Fashion-MNIST with networks of exactly as many parameters. A training that the file has
    is not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import dendrite_kernels as dk
from bench.environment import describe_run, write_json
from bench.paper import datasets
from bench.questions.dense_twins import (
    BATCH,
    CLASSES,
    SOMAS,
    N,
    keep,
    largest_error,
    print_accuracies,
    random,
    report_speed,
    results,
    train,
)  # fmt: skip
from bench.speed.run import RESULTS
from dendrite_kernels.benchmark.masked_dense import MaskedDendriticLayer
from dendrite_kernels.benchmark.timing import Task, interleave, ratio
from dendrite_kernels.benchmark.training_step import TrainingStep
from dendrite_kernels.models import count_parameters


class MaskedTree(nn.Sequential):
    """The same tree of dense layers under masks: of its synapses, and of each level."""

    def __init__(self, tree: dk.DendriticTree) -> None:
        super().__init__()
        assert tree.bias is not None
        parts = [tree.connectivity, *tree.chains]
        for part, weight, bias in zip(
            parts, [tree.synapse_weight, *tree.cable], tree.bias, strict=True
        ):
            mask = part.to_mask()
            layer = nn.Linear(mask.shape[1], mask.shape[0])
            with torch.no_grad():
                layer.weight.zero_()[mask] = weight
                layer.bias.copy_(bias)
            layer.weight.register_post_accumulate_grad_hook(partial(keep, mask.float()))
            self.extend([layer, nn.LeakyReLU(tree.negative_slope)])


def networks(seed: int) -> dict[str, Callable[[], nn.Module]]:
    """Layers of 38,016 parameters each: those with more nodes have fewer synapses."""
    rng = np.random.default_rng(seed)
    local = partial(dk.connectivity.local_receptive_fields, (28, 28))

    def twigs(rule: Callable[..., dk.Connectivity], *synapses: int) -> dk.Connectivity:
        """128 somas of 16 dendrites, an equal share of them with each number of synapses."""
        somas = SOMAS // len(synapses)
        return dk.Connectivity.stack([rule(somas, 16, k, seed=rng) for k in synapses])

    def everywhere() -> nn.Module:
        branches = random(4 * SOMAS, 1, 16, seed=rng)
        return dk.DendriticTree(twigs(random, 12), [4, 4], level_synapses=[branches, None])

    return {
        "flat": lambda: dk.DendriticLayer(twigs(random, 16, 17)),
        "tree 4 x 4": lambda: dk.DendriticTree(twigs(random, 16), [4, 4]),
        "tree 2 x 2 x 2 x 2": lambda: dk.DendriticTree(twigs(random, 14, 15, 15, 15), [2] * 4),
        "tree 4 x 4, synapses on branches": everywhere,
        "flat, receptive fields": lambda: dk.DendriticLayer(twigs(local, 16, 17)),
        "tree 4 x 4, receptive fields": lambda: dk.DendriticTree(twigs(local, 16), [4, 4]),
    }


# ---- speed ----


def speed(seconds: float) -> dict[str, Any]:
    torch.manual_seed(0)
    c = random(SOMAS, 16, 16, seed=0)
    flat, tree = dk.DendriticLayer(c), dk.DendriticTree(c, [4, 4])
    layers = {
        "flat": flat,
        "tree": tree,
        "flat, dense masks": MaskedDendriticLayer.from_layer(flat),
        "tree, dense masks": MaskedTree(tree),
    }
    x, y = torch.rand(BATCH, N), torch.randint(CLASSES, (BATCH,))
    head = nn.Linear(SOMAS, CLASSES).state_dict()
    steps = {}
    for name, layer in layers.items():
        network = nn.Sequential(layer, nn.Linear(SOMAS, CLASSES))
        network[1].load_state_dict(head)
        steps[name] = TrainingStep(network, 1e-3)
    found = {name: results(step, x, y) for name, step in steps.items()}
    errors = {
        kind: largest_error(found[f"{kind}, dense masks"], found[kind]) for kind in ("flat", "tree")
    }
    tasks = {name: Task(partial(step, x, y)) for name, step in steps.items()}
    interleave(list(tasks.values()), seconds)
    pairs = [("tree, dense masks", "tree"), ("flat, dense masks", "flat"), ("tree", "flat")]
    return {
        "ms": {name: task.summary() for name, task in tasks.items()},
        "ratios": {f"{a} / {b}": ratio(tasks[a], tasks[b]) for a, b in pairs},
        "relative_errors": errors,
    }


# ---- accuracy ----


def accuracy(report: dict[str, Any], path: Path, options: argparse.Namespace) -> None:
    data = datasets.load("fmnist", options.data_root)
    table = report.setdefault("accuracy", {"epochs": options.epochs, "percent": {}})
    if table["epochs"] != options.epochs:
        raise SystemExit(f"Expected a file of {options.epochs} epochs, got {table['epochs']}")
    for seed in range(options.seeds):
        for name in networks(seed):
            done = table["percent"].setdefault(name, {})
            if str(seed) in done:
                continue
            torch.manual_seed(seed)
            layer = networks(seed)[name]()  # its own generator, whatever is done already
            done[str(seed)] = 100 * train(layer, data, options.epochs, seed)
            write_json(path, report)
            count = count_parameters(layer)
            print(f"{name}, {count} parameters, seed {seed}: {done[str(seed)]:.2f}", flush=True)
    print_accuracies(table["percent"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.questions.tree")
    parser.add_argument("what", choices=["speed", "accuracy"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=30.0, help="of timing, for each of these")
    parser.add_argument("--data-root", help="folder with Fashion-MNIST")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--output", type=Path, help="default: bench/results/tree_WHAT.json")
    options = parser.parse_args(arguments)
    path = options.output or RESULTS / f"tree_{options.what}.json"
    report = describe_run(parser, arguments, options.threads[0])
    if options.what == "accuracy":
        torch.set_num_threads(options.threads[0])
        before = json.loads(path.read_text()) if path.exists() else {}
        accuracy({**report, **before}, path, options)
        return 0
    report_speed(report, path, options.threads, partial(speed, options.seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
