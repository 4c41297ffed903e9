"""Trains a dANN and its masked-dense twin (same masks, weights and batches) and compares them.

    python -m bench.paper.demo [--data digits|mnist|...] [--data-root FOLDER]

Prints a table and writes demo.json and demo.png. Ends with status 1 if the two do not agree.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bench.environment import describe, write_json
from bench.paper import datasets
from bench.paper.commands import guarded
from bench.paper.demo_report import draw, print_table, ratios
from bench.paper.measured import Measured, train_measured
from bench.paper.run import Run
from dendrite_kernels.benchmark.memory import in_fresh_process

EPOCHS = {"digits": 60, "cifar10": 3}  # enough to see where the curves flatten
OTHER_EPOCHS = 5
FIRST_STEPS = 50


@dataclass(frozen=True)
class Agreement:
    """Relative differences between the losses of two trainings.

    They are not 0: the two layers round float32 sums differently, and Adam amplifies this in every
    step.
    """

    first_steps: float  # largest difference of one of the first 50 steps
    epochs: float  # largest difference of an epoch's mean training loss

    FIRST_STEPS_TOLERANCE = 1e-3
    EPOCHS_TOLERANCE = 5e-2

    @classmethod
    def of(cls, sparse: Measured, twin: Measured) -> Agreement:
        return cls(
            _largest_difference(sparse.steps.loss[:FIRST_STEPS], twin.steps.loss[:FIRST_STEPS]),
            _largest_difference(
                sparse.outcome.history["train_loss"], twin.outcome.history["train_loss"]
            ),
        )

    @property
    def holds(self) -> bool:
        return (
            self.first_steps <= self.FIRST_STEPS_TOLERANCE and self.epochs <= self.EPOCHS_TOLERANCE
        )

    def __str__(self) -> str:
        return (
            f"The two trainings {'agree' if self.holds else 'DO NOT AGREE'}. "
            "Largest relative difference of their losses:\n"
            f"  {self.first_steps:.1e} over the first {FIRST_STEPS} steps "
            f"(at most {self.FIRST_STEPS_TOLERANCE:.0e})\n"
            f"  {self.epochs:.1e} over the epochs' means (at most {self.EPOCHS_TOLERANCE:.0e})"
        )


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    return guarded(lambda: _compare(options))


def _compare(options: argparse.Namespace) -> int:
    data = datasets.load(options.data, options.data_root)
    run = Run(
        data.name,
        options.kind,
        options.dendrites,
        options.somas,
        options.synapses,
        trial=options.seed,
        epochs=options.epochs or EPOCHS.get(data.name, OTHER_EPOCHS),
        batch=options.batch,
        lr=options.lr,
    )
    print(_introduction(data, run), flush=True)
    sparse, twin = (
        in_fresh_process(train_measured, data, variant, options.threads)
        for variant in (run, replace(run, twin=True))
    )
    agreement = Agreement.of(sparse, twin)
    environment = describe(options.threads)
    print_table(run.kind, sparse, twin)
    print(agreement)
    print("{cpu}, {threads} threads, torch {versions[torch]}".format_map(environment))
    report = {
        "data": {"name": data.name, "source": data.source, "in_shape": data.in_shape},
        "run": asdict(run),
        "sparse": sparse.summary(),
        "masked_dense": twin.summary(),
        "ratios": ratios(sparse, twin),
        "agreement": asdict(agreement) | {"holds": agreement.holds},
        "environment": environment,
    }
    write_json(options.output / "demo.json", report)
    draw(options.output / "demo.png", data, run, sparse, twin)
    print(f"Wrote {options.output / 'demo.json'} and {options.output / 'demo.png'}")
    return 0 if agreement.holds else 1


def _introduction(data: datasets.ImageData, run: Run) -> str:
    return (
        f"Data: {data.name}: {data.source}\n"
        f"      {len(data.y_train)} training images (10 % of them for validation), "
        f"{len(data.y_test)} test images, {data.classes} classes\n"
        f"Network: {run.kind}, {run.somas} somas x {run.dendrites} dendrites "
        f"x {run.synapses} synapses\n"
        f"Training: {run.epochs} epochs, batches of {run.batch}, Adam {run.lr:g}, "
        f"seed {run.trial}"
    )


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.paper.demo", description="Train a dANN and its masked-dense twin."
    )
    parser.add_argument("--data", default="digits", help=datasets.KNOWN)
    parser.add_argument("--data-root", help="folder with the data set's files (digits needs none)")
    parser.add_argument("--kind", default="dANN-LRF", choices=["dANN-R", "dANN-LRF", "dANN-GRF"])
    parser.add_argument("--somas", type=int, default=256)
    parser.add_argument("--dendrites", type=int, default=16, help="per soma")
    parser.add_argument("--synapses", type=int, default=16, help="per dendrite")
    parser.add_argument("--epochs", type=int, help=f"default: {EPOCHS}, else {OTHER_EPOCHS}")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    parser.add_argument("--output", type=Path, default=Path("reports"))
    options = parser.parse_args(arguments)
    options.data_root = options.data_root or None  # make passes an empty one
    return options


def _largest_difference(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


if __name__ == "__main__":
    sys.exit(main())
