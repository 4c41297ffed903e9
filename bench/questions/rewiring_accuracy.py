"""What rewiring gains: test accuracy of static synapses, SET and RigL, several seeds each.

    python -m bench.questions.rewiring_accuracy --data-root FOLDER [--data mnist] [--somas 10]

One DendriticLayer of random inputs and constant fan-in, and a linear layer to the classes; Adam
1e-3 in batches of 128; rewiring each 100 steps for three quarters of the run, 0.3 of the synapses
at first. "rigl-N" has N candidates for each dendrite. Prints a table of mean and standard
deviation, and writes each run to the output as it ends: started again, it goes on from there.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import dendrite_kernels as dk
from bench.environment import describe, write_json
from bench.paper import datasets
from bench.paper.datasets import ImageData

BATCH = 128


def train(
    data: ImageData, rule: str, seed: int, options: argparse.Namespace
) -> dict[str, float | int]:
    """One run; accuracies in %."""
    torch.manual_seed(seed)
    x, y = torch.from_numpy(data.x_train), torch.from_numpy(data.y_train)
    sizes = options.somas, options.dendrites, options.synapses
    c = dk.connectivity.random(x.shape[1], *sizes, constant_fan_in=True, seed=seed)
    layer = dk.DendriticLayer(c)
    model = nn.Sequential(layer, nn.Linear(options.somas, data.classes))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    end = options.epochs * -(-len(x) // BATCH) * 3 // 4
    rewirer = None
    if rule == "set":
        rewirer = dk.plasticity.Rewirer(layer, optimizer, end=end, seed=seed)
    elif rule != "static":
        count = int(rule.removeprefix("rigl-"))
        rewirer = dk.plasticity.Rewirer(
            layer, optimizer, rule="rigl", end=end, candidates=count, seed=seed
        )
    start = time.perf_counter()
    for _ in range(options.epochs):
        for index in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
            if rewirer is not None:
                rewirer.step()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        right = model(torch.from_numpy(data.x_test)).argmax(1) == torch.from_numpy(data.y_test)
    return {
        "accuracy": 100 * right.float().mean().item(),
        "seconds": seconds,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.questions.rewiring_accuracy", description=__doc__
    )
    parser.add_argument("--data", default="mnist", help=datasets.KNOWN)
    parser.add_argument("--data-root", type=Path)
    rules = ["static", "set", "rigl-16", "rigl-784"]
    parser.add_argument("--rules", nargs="+", default=rules)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--somas", type=int, default=10)
    parser.add_argument("--dendrites", type=int, default=16)
    parser.add_argument("--synapses", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--output", type=Path, default=Path("bench/results/rewiring.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = datasets.load(options.data, options.data_root)
    sizes = f"S={options.somas} D={options.dendrites} K={options.synapses}"
    title = f"{options.data} {sizes} epochs={options.epochs}"
    print(f"{title}: test accuracy in %")
    for rule in options.rules:
        runs: list[Any] = []
        for seed in range(options.seeds):
            content = json.loads(options.output.read_text()) if options.output.exists() else {}
            found = content.setdefault(title, {}).setdefault(rule, {})
            if str(seed) not in found:
                found[str(seed)] = train(data, rule, seed, options)
                write_json(options.output, content | {"environment": describe(threads=1)})
            runs.append(found[str(seed)])
        accuracy, seconds = ([run[key] for run in runs] for key in ("accuracy", "seconds"))
        spread = stdev(accuracy) if len(runs) > 1 else 0.0
        print(
            f"{rule:9} {mean(accuracy):6.2f} +- {spread:.2f}  seeds {len(runs)}, "
            f"{runs[0]['parameters']} parameters, {mean(seconds):.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
