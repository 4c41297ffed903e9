"""The fields of a Run as options of a command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, fields
from itertools import product
from typing import Any, NamedTuple, get_args

import dendrite_kernels as dk
from bench.paper import datasets
from bench.paper.run import Run, Task
from dendrite_kernels.nn import Init


class _Option(NamedTuple):
    type: type
    help: str
    choices: Sequence[str] | None = None


_OPTIONS = {
    "data": _Option(str, datasets.KNOWN),
    "kind": _Option(str, "family of networks", get_args(dk.models.Kind)),
    "dendrites": _Option(int, "of a soma"),
    "somas": _Option(int, "of a layer"),
    "synapses": _Option(int, "of a dendrite"),
    "layers": _Option(int, "of dendrites and somas, 1 to 10"),
    "trial": _Option(int, "seed of masks, weights, split, noise and batches"),
    "noise": _Option(float, "standard deviation, on images in 0..1"),
    "task": _Option(str, "sequential: one class after the other", get_args(Task)),
    "epochs": _Option(int, "default: the article's for this data set and task"),
    "batch": _Option(int, "samples of a step"),
    "lr": _Option(float, "learning rate of Adam"),
    "dropout": _Option(float, "probability"),
    "init": _Option(str, "of the weights, by dense sizes or by synapses", get_args(Init)),
    "patience": _Option(int, "stop after so many epochs without a lower validation loss"),
}
NAMES = (*_OPTIONS, "twin")


def add(parser: argparse.ArgumentParser, names: Sequence[str], several: bool = False) -> None:
    """Options for these fields, each of several values if wanted; None where none is given."""
    for name in names:
        if name == "twin":
            text = "train the masked-dense twin instead"
            parser.add_argument("--twin", action="store_true", default=None, help=text)
            continue
        option, default = _OPTIONS[name], _DEFAULTS[name]
        shown = f" ({default})" if default not in (MISSING, None) else ""
        parser.add_argument(
            f"--{name}",
            *(["--kinds"] if name == "kind" else []),
            dest=name,
            type=option.type,
            choices=option.choices,
            nargs="+" if several else None,
            metavar=None if option.choices and len(option.choices) < 5 else name.upper(),
            required=default is MISSING and not several,
            help=option.help + shown,
        )


def given(options: argparse.Namespace) -> dict[str, Any]:
    """The fields that the command line sets."""
    found = {name: getattr(options, name, None) for name in NAMES}
    return {name: value for name, value in found.items() if value is not None}


def every_run(values: dict[str, Any]) -> list[Run]:
    """One run for each combination of values; what is not in a list is one value."""
    lists = [value if isinstance(value, list | range) else [value] for value in values.values()]
    return [Run(**dict(zip(values, chosen, strict=True))) for chosen in product(*lists)]


_DEFAULTS = {field.name: field.default for field in fields(Run)}
