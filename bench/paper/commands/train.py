"""Train one network as the article does, and print what it reached."""

from __future__ import annotations

import argparse
from pathlib import Path

from tabulate import tabulate

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
    try:
        ((model, _, outcome),) = train(
            [run], data, checkpoint=options.checkpoint, log=options.log, title=run.kind
        )
    except KeyboardInterrupt:
        if options.checkpoint:
            print(f"\nThe same command goes on from {options.checkpoint}.")
        raise
    history = outcome.history
    print(f"{data.name}: {data.source}")
    print(
        f"{run.kind}, {run.somas} somas x {run.dendrites} dendrites: "
        f"{outcome.trainable_parameters:,} parameters, "
        f"{dk.models.count_dense_parameters(model):,} as dense layers"
    )
    print(f"{len(history['train_loss'])} epochs in {outcome.seconds:.1f} s")
    reached = {name: values[outcome.epoch] for name, values in history.items()}
    rows = [
        (name, reached[f"{name}_loss"], reached[f"{name}_accuracy"]) for name in ("train", "val")
    ]
    rows.append(("test", outcome.test_loss, outcome.test_accuracy))
    print(tabulate(rows, ("", "loss", "accuracy"), "plain", floatfmt=("", ".4f", ".2%")))
    return 0
