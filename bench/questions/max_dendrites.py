"""What does a soma lose that takes the largest of its dendrites, in place of the sum by a cable?

    python -m bench.questions.max_dendrites --data-root FOLDER [--seeds 5] [--epochs 8]

Fashion-MNIST, 128 somas of 16 dendrites with random inputs and an output layer. Both networks have
as many parameters: where there is no cable, dendrites have more synapses. A training that the file
has is not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import dendrite_kernels as dk
from bench.environment import describe_run, write_json
from bench.paper import datasets
from bench.questions.dense_twins import random, train
from bench.speed.run import RESULTS
from dendrite_kernels.models import count_parameters


class LargestDendrite(nn.Module):
    """y[s] = the largest of the dendrites of soma s, as in DENN (Wu et al. 2018)."""

    def __init__(self, connectivity: dk.Connectivity) -> None:
        super().__init__()
        self.dendrites = dk.SparseLinear(connectivity, negative_slope=1.0)

    def forward(self, x: Tensor) -> Tensor:
        c = self.dendrites.connectivity
        return dk.functional.soma_reduce(self.dendrites(x), c, "max")[0]


def layer(name: str, seed: int) -> nn.Module:
    """Of 38,016 parameters."""
    somas = {16: 64, 17: 64} if name == "cable" else {17: 56, 18: 72}  # by synapses of a dendrite
    connectivity = dk.Connectivity.stack(
        [random(count, 16, synapses, seed=seed) for synapses, count in somas.items()]
    )
    return dk.DendriticLayer(connectivity) if name == "cable" else LargestDendrite(connectivity)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.questions.max_dendrites")
    parser.add_argument("--data", default="fmnist")
    parser.add_argument("--data-root", help="folder with the data set's files")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "max_dendrites.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    setting = {"data": options.data, "epochs": options.epochs}
    report = {**describe_run(parser, arguments, options.threads), "setting": setting, "percent": {}}
    if options.output.exists():
        report = json.loads(options.output.read_text())
        if report["setting"] != setting:
            raise SystemExit(f"Expected a file of {setting}, got {report['setting']}")
    data = datasets.load(options.data, options.data_root)
    for seed in range(options.seeds):
        for name in ("cable", "max"):
            done = report["percent"].setdefault(name, {})
            if str(seed) in done:
                continue
            torch.manual_seed(seed)
            drawn = layer(name, seed)
            done[str(seed)] = 100 * train(drawn, data, options.epochs, seed)
            write_json(options.output, report)
            count = count_parameters(drawn)
            print(f"{name}, {count} parameters, seed {seed}: {done[str(seed)]:.2f}", flush=True)
    for name, done in report["percent"].items():
        values = list(done.values())
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{name:10s} {statistics.mean(values):.2f} +- {spread:.2f}, {len(values)} seeds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
