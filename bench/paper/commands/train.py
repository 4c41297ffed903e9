"""Train one network as the article does, and print what it reached."""

from __future__ import annotations

import argparse
from pathlib import Path

import dendrite_kernels as dk
from bench.paper import datasets
from bench.paper.commands import run_options
from bench.paper.training import train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run_options.add(parser, run_options.NAMES)
    parser.add_argument("--data-root", help="folder with the data set's files (digits needs none)")
    parser.add_argument("--log", type=Path, help="JSON lines, one for each epoch")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="written after each epoch; if it is there, the training goes on from it",
    )


def main(options: argparse.Namespace) -> int:
    (run,) = run_options.every_run(run_options.given(options))
    data = datasets.load(run.data, options.data_root)
    ((model, _, outcome),) = train(
        [run], data, checkpoint=options.checkpoint, log=options.log, title=run.kind
    )
    history = outcome.history
    print(f"{data.name}: {data.source}")
    print(
        f"{run.kind}, {run.somas} somas x {run.dendrites} dendrites: "
        f"{outcome.trainable_parameters:,} parameters, "
        f"{dk.models.count_dense_parameters(model):,} as dense layers"
    )
    print(f"{len(history['train_loss'])} epochs in {outcome.seconds:.1f} s")
    print(f"{'':12s}{'loss':>9s}{'accuracy':>12s}")
    for name in ("train", "val"):
        loss, accuracy = history[f"{name}_loss"], history[f"{name}_accuracy"]
        print(f"{name:12s}{loss[outcome.epoch]:9.4f}{accuracy[outcome.epoch]:12.2%}")
    print(f"{'test':12s}{outcome.test_loss:9.4f}{outcome.test_accuracy:12.2%}")
    return 0
