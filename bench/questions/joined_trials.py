"""How much faster several trials train as one network than one after the other.

    python -m bench.questions.joined_trials [--kinds dANN-R vANN] [--trials 5] [--seconds 4]

Times epochs of `bench.paper.training` on images of 28 x 28 pixels with 10 classes, in batches of
128, on one thread, in turns. Prints milliseconds of a step and trial, minima, and their ratio:
above 1 the trials are faster as one network. `bench.paper.groups` takes its rule from this table.
"""

from __future__ import annotations

import argparse
from typing import get_args

import numpy as np
import torch

import dendrite_kernels as dk
from bench.paper.datasets import ImageData, from_arrays
from bench.paper.run import Run
from bench.paper.splits import prepare
from bench.paper.training import Training
from dendrite_kernels.benchmark.timing import Task, interleave

SIZES = ((32, 1), (32, 4), (128, 1), (128, 4), (128, 16), (256, 8), (256, 16), (512, 16), (512, 32))
STEPS = 8  # of an epoch


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    torch.set_num_threads(1)
    data = noise_images()
    print(f"{'':10s}  {'S':>4s} {'D':>3s} {'S*D':>6s}  one by one   as one  ratio")
    for kind in options.kinds:
        for somas, dendrites in SIZES:
            run = Run("noise", kind, dendrites, somas, epochs=1000)
            alone, joined = step_times(run, data, options.trials, options.seconds)
            print(
                f"{kind:10s}  {somas:4d} {dendrites:3d} {somas * dendrites:6d}  "
                f"{alone:10.3f} {joined:8.3f} {alone / joined:6.2f}",
                flush=True,
            )


def noise_images() -> ImageData:
    """As many images as give STEPS batches of 128."""
    rng = np.random.default_rng(0)
    count = STEPS * 128 * 10 // 9
    x, y = rng.integers(0, 256, (count, 28, 28), np.uint8), np.arange(count) % 10
    return from_arrays(x, y, x[:10], y[:10])


def step_times(run: Run, data: ImageData, trials: int, seconds: float) -> tuple[float, float]:
    """Milliseconds of a step and trial: one by one, as one network."""
    runs = [Run(**{**vars(run), "trial": trial}) for trial in range(trials)]
    separate = [train_on([run], data) for run in runs]
    whole = train_on(runs, data)

    def one_by_one() -> None:
        for training in separate:
            training.epoch(())

    tasks = [Task(one_by_one), Task(lambda: whole.epoch(()))]
    for task in tasks:
        task.run()
    interleave(tasks, seconds)
    alone, joined = (1e3 * min(task.samples) / (STEPS * trials) for task in tasks)
    return alone, joined


def train_on(runs: list[Run], data: ImageData) -> Training:
    return Training(runs, [run.build(data) for run in runs], [prepare(data, run) for run in runs])


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.questions.joined_trials", description=__doc__.split("\n")[0]
    )
    kinds = get_args(dk.models.Kind)
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=["dANN-R"], metavar="KIND")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing for each size")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
