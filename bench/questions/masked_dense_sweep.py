"""How long the trainings of a table would take the article's way: dense layers under masks.

    python -m bench.questions.masked_dense_sweep TABLE --data-root FOLDER [--steps 5]

Times some steps of the masked-dense twin of each network, with all threads, and multiplies: steps
of an epoch, epochs, trainings. Evaluation is left out. Beside it stands what ours took: seconds of
one thread each, divided by the number of threads, since a sweep trains as many at a time.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from bench.paper import datasets
from bench.paper.datasets import ImageData
from bench.paper.run import Run
from bench.paper.table import read
from dendrite_kernels.benchmark.training_step import TrainingStep


def step_seconds(run: Run, data: ImageData, steps: int) -> float:
    """The median time of a step of the network's masked-dense twin, after one to warm up."""
    step = TrainingStep(replace(run, twin=True).build(data), run.lr)
    x, y = torch.from_numpy(data.x_train[: run.batch]), torch.from_numpy(data.y_train[: run.batch])
    seconds = []
    for _ in range(steps + 1):
        started = time.perf_counter()
        step(x, y)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def steps_of(run: Run, data: ImageData) -> int:
    """Of a whole training."""
    assert run.epochs is not None
    train = len(data.y_train) - len(data.y_train) // 10
    return math.ceil(train / run.batch) * run.epochs


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.questions.masked_dense_sweep")
    parser.add_argument("table", type=Path)
    parser.add_argument("--data-root", help="folder with the data sets' files")
    parser.add_argument("--steps", type=int, default=5, help="to time for each size (%(default)s)")
    options = parser.parse_args(arguments)
    results = [r for r in read([options.table]) if r.run.kind.startswith("dANN")]
    ours = sum(result.outcome.seconds for result in results) / torch.get_num_threads()
    # The rule of the masks changes nothing: the matrices have the same size.
    trainings = Counter(replace(result.run, kind="dANN-R", trial=0) for result in results)
    data = {name: datasets.load(name, options.data_root) for name in {r.data for r in trainings}}
    dense = 0.0
    for run, count in tqdm(trainings.items(), disable=None):
        seconds = step_seconds(run, data[run.data], options.steps)
        dense += count * seconds * steps_of(run, data[run.data])
        print(f"D={run.dendrites:<3d} S={run.somas:<4d} {1e3 * seconds:9.2f} ms a step", flush=True)
    print(
        f"{len(results)} trainings: masked dense {dense / 3600:.1f} h, ours {ours / 60:.1f} min, "
        f"{dense / ours:.0f} times as long ({torch.get_num_threads()} threads)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
