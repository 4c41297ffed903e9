"""python -m dendrite_kernels bench: one layer, every way to compute it that runs here."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict
from typing import Any

import torch

import dendrite_kernels as dk

from .case import KINDS, Case
from .comparison import Comparison
from .environment import describe
from .memory import in_fresh_process
from .oracle import oracle
from .peers import OFFICIAL, PACKAGE, PEERS, available_bytes
from .problem import TOLERANCES, Problem
from .report import dense_from, print_report, winners
from .timing import interleave
from .whole_step import Training

PATIENCE = 60.0  # seconds
MOST_THREADS = 1024
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCES}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Time one layer on every backend of this package, and every other way to compute it that"
        " runs here. Results are checked against float64 first. Prints, and writes nothing."
    )

    def add(name: str, help: str, default: Any, **options: Any) -> None:
        help += " (default: %(default)s)"
        parser.add_argument(name, help=help, default=default, **options)

    add("--batch", "samples", 128, type=_positive)
    parser.add_argument(
        "--inputs", type=_positive, help="of the layer (default: 784, or the pixels of --shape)"
    )
    add("--somas", "neurons", 256, type=_positive)
    add("--dendrites", "of each soma", 16, type=_positive)
    add("--synapses", "of each dendrite", 16, type=_positive)
    add(
        "--rule",
        "constant: random inputs, as many for each dendrite; variable: random inputs, on average;"
        " local: receptive fields, which need --shape",
        "constant",
        choices=list(KINDS),
    )
    parser.add_argument(
        "--shape", type=_shape, metavar="HxW", help="of the image that the inputs form"
    )
    add("--dtype", "of all numbers", "float32", choices=list(DTYPES))
    add("--threads", "of torch", torch.get_num_threads(), type=_threads)
    add("--device", "where to compute", "cpu", choices=["cpu", "cuda"])
    add("--seconds", "of timing, or a bit more", 5.0, type=_seconds)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """0, or 1 if a candidate computed wrong; sizes that do not fit end with 2."""
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("Expected a device that torch sees, got cuda")
    try:
        case = _case(options)
        _check_memory(case, DTYPES[options.dtype])
        _say("drawing the layer")
        connectivity = case.connectivity(options.rule)
    except (ValueError, MemoryError) as error:
        parser.error(str(error))
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        found = _measure(case, connectivity, options)
    except (MemoryError, RuntimeError) as error:  # torch's allocators raise RuntimeErrors
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        parser.error(f"Expected sizes that fit into memory, got {error}")
    finally:
        torch.set_num_threads(before)
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        print_report(found)
    return int(bool(found["refused"]))


def _case(options: argparse.Namespace) -> Case:
    if options.rule == "local" and options.shape is None:
        raise ValueError("Expected --shape HxW with --rule local, got none")
    height, width = options.shape or (options.inputs or 784, 1)
    if options.inputs not in (None, height * width):
        raise ValueError(
            f"Expected --inputs {height * width}, the pixels of --shape, got {options.inputs}"
        )
    sizes = options.somas, options.dendrites, options.synapses
    return Case("layer", options.batch, height, width, 1, *sizes)


def _check_memory(case: Case, dtype: torch.dtype) -> None:
    """ValueError unless the layer, the samples and all gradients fit into memory, once as they are
    and once in float64.
    """
    parameters = case.rows * (case.synapses + 2) + case.somas
    samples = case.batch * (case.in_features + case.somas)
    indices = 4 * case.rows * case.synapses
    needed = 2 * (parameters + samples) * (dtype.itemsize + 8) + indices
    available = available_bytes()
    if available is not None and needed > available:
        raise ValueError(
            f"Expected sizes that fit into the {available / 2**30:.1f} GiB of memory that are "
            f"free, got a layer and samples that take {needed / 2**30:.1f} GiB"
        )


def _measure(
    case: Case, connectivity: dk.Connectivity, options: argparse.Namespace
) -> dict[str, Any]:
    training = _training(case, connectivity, options)
    _say("computing what is right, in float64")
    problem = Problem.draw(connectivity, case.batch, DTYPES[options.dtype])
    expected = oracle(problem, gradients=True)
    comparison = Comparison(
        problem.to(options.device),
        {name: result.to(options.device) for name, result in expected.items()},
        PATIENCE,
    )
    del problem
    for name in PEERS:
        _say(f"checking {name}")
        comparison.admit_peers([name])
    _say("timing")
    interleave(list(comparison.tasks.values()), options.seconds)
    times = comparison.times("peers")
    return {
        "case": asdict(case), "rule": options.rule, "dtype": options.dtype,
        "device": options.device, "environment": describe(options.threads),
        "inputs": connectivity.in_features, "synapses": connectivity.nnz,
        "density": connectivity.density,
        "ms": times,
        "winners": winners(times),
        "dense_wins_from_density": dense_from(times, connectivity.density),
        "training": training,
        "relative_errors": comparison.errors,
        "skipped": comparison.skipped,
        "refused": comparison.refused,
    }  # fmt: skip


def _training(
    case: Case, connectivity: dk.Connectivity, options: argparse.Namespace
) -> dict[str, dict[str, float | None]]:
    """A step with Adam, ours and the article's: measured in fresh processes, and estimated."""
    dtype = DTYPES[options.dtype]
    if options.device != "cpu":
        return {}
    estimate = dk.estimate_memory(connectivity, case.batch, dtype=dtype)
    found: dict[str, dict[str, float | None]] = {}
    ours = next(name for name in PACKAGE if dk.backend_info()[name.split()[-1]]["available"])
    for name, official, bytes_ in ((ours, False, estimate.total), (OFFICIAL, True, estimate.dense)):
        found[name] = {"estimated_mib": bytes_ / 2**20}
        available = available_bytes()
        if available is None or 2 * bytes_ < available:
            _say(f"training {name}")
            training = Training(case, options.rule, options.threads, official, dtype)
            found[name] |= asdict(in_fresh_process(training.measure))
    return found


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"Expected a positive integer, got {text!r}")
    return int(text)


def _threads(text: str) -> int:
    threads = _positive(text)
    if threads > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"Expected at most {MOST_THREADS} threads, got {text}")
    return threads


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"Expected seconds > 0, got {text!r}")
    return seconds


def _shape(text: str) -> tuple[int, int]:
    height, x, width = text.partition("x")
    if not x:
        raise argparse.ArgumentTypeError(f"Expected HxW, such as 28x28, got {text!r}")
    return _positive(height), _positive(width)
