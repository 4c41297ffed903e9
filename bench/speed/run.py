"""Times the package against everything else a user could pick, on the workloads of cases.py.

    python -m bench.speed.run --cases A B --threads 1 2 4 [--kinds variable local] [--memory]

A candidate is timed only after its results agree with the float64 oracle; one that does not agree
is refused and the command ends with status 1. Candidates take turns, and so does the roof that
kernels are compared with. Ratios are medians of the ratios of turns, for the machine may change its
speed. Written to bench/results/NAME.json after every comparison.

Modes: forward (no gradients kept), training (forward + backward without the input's gradient, and
the masks of gradients where there are any) and training with dx. Kernels are the same work without
autograd; a step is zero_grad, forward, cross-entropy, backward and fused Adam.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import dendrite_kernels as dk
from bench.environment import describe_run, write_json
from bench.speed.cases import CASES, find
from bench.speed.kernels import KERNELS, Kernels
from bench.speed.roofline import Roof, RoofTask, Unavailable
from bench.speed.tables import print_configuration
from dendrite_kernels.benchmark import whole_step
from dendrite_kernels.benchmark.case import KINDS, Case
from dendrite_kernels.benchmark.comparison import Comparison
from dendrite_kernels.benchmark.dense import MaskedDense
from dendrite_kernels.benchmark.oracle import oracle
from dendrite_kernels.benchmark.peer import MODES, Peer
from dendrite_kernels.benchmark.peers import OFFICIAL, OURS, PACKAGE, PEERS
from dendrite_kernels.benchmark.problem import TOLERANCE, Problem
from dendrite_kernels.benchmark.timing import Task, interleave

RESULTS = Path(__file__).parents[1] / "results"
BF16 = "cpp kernels, precision bf16"
MODEST_BYTES = 1 << 32  # of a dense layer that the optimizer's state may double


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        options.cases = find(options.cases)
    except ValueError as error:
        parser.error(str(error))
    path = options.output or RESULTS / f"{options.name}.json"
    before = torch.get_num_threads()
    report: dict[str, Any] = {
        **describe_run(parser, arguments, max(options.threads)),
        "backends": dk.backend_info(),
        "tolerance": TOLERANCE,
        "configurations": [],
    }
    refused = False
    try:
        for result in _configurations(options):
            report["configurations"].append(result)
            refused |= bool(result["refused"])
            print_configuration(result)
            write_json(path, report, digits=4)
    finally:
        torch.set_num_threads(before)
    print(f"Wrote {path}")
    return int(refused)


def _configurations(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for case in options.cases:
        for kind in options.kinds:
            torch.set_num_threads(max(options.threads))
            problem = Problem.draw(case.connectivity(kind), case.batch)
            expected = oracle(problem, gradients=True)
            for threads in options.threads:
                torch.set_num_threads(threads)
                torch.compiler.reset()  # the compiler's code knows the number of threads
                yield measure(case, kind, threads, Comparison(problem, expected), options)


def measure(
    case: Case, kind: str, threads: int, comparison: Comparison, options: argparse.Namespace
) -> dict[str, Any]:
    """Verify and time everything; a record for the JSON file."""
    problem = comparison.problem
    peers = comparison.admit_peers(options.peers)
    for backend in ("cpp", "numba"):
        if f"dendrite_kernels {backend}" in peers:
            make = partial(Kernels, backend, problem)
            comparison.admit("kernels", f"{backend} kernels", KERNELS, make)
    if OURS in peers:  # the problem's inputs are fractions of 256: rounding them changes nothing
        make = partial(Kernels, "cpp", problem, round_x=True)
        comparison.admit("kernels", BF16, KERNELS[:1], make)
    for name, module in _step_modules(peers, problem).items():
        step = whole_step.step_of(module, problem)
        step()
        comparison.tasks["steps", name, "step"] = Task(step)
    c = problem.connectivity
    roof, unavailable = None, ""
    try:
        roof = RoofTask(c.in_features, c.nnz, threads)
        comparison.tasks["roof", "roof", "roof"] = roof
    except Unavailable as error:
        unavailable = str(error)
    interleave(list(comparison.tasks.values()), options.seconds)
    return {
        "case": asdict(case), "kind": kind, "threads": threads,
        "inputs": c.in_features, "synapses": c.nnz, "density": c.density,
        "ms": comparison.times("peers"),
        "kernels_ms": comparison.times("kernels"),
        "step_ms": {name: modes["step"] for name, modes in comparison.times("steps").items()},
        "ratios": _ratios(comparison),
        "roofline": _fractions(roof, comparison, 2e-9 * c.nnz * case.batch)
        if roof else {"unavailable": unavailable},
        "memory_mib": _memory(case, kind, threads, problem) if options.memory else {},
        "relative_errors": comparison.errors,
        "skipped": comparison.skipped,
        "refused": comparison.refused,
    }  # fmt: skip


def _step_modules(peers: Mapping[str, Peer], problem: Problem) -> dict[str, torch.nn.Module]:
    """What to time whole steps of: the layer, and the official way where Adam's state fits."""
    modules: dict[str, torch.nn.Module] = {}
    if OURS in peers:
        modules[OURS] = problem.layer()
    official = peers.get(OFFICIAL)
    if isinstance(official, MaskedDense) and official.bytes_needed(problem) < MODEST_BYTES:
        modules[OFFICIAL] = official.module
    return modules


def _ratios(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """For each mode how many times as long as the package's each other way takes."""
    names = list(comparison.times("peers"))
    ours = next((name for name in PACKAGE if name in names), None)
    found: dict[str, dict[str, Any]] = {}
    if ours is None:
        return found
    for mode in MODES:
        others = {
            name: comparison.ratio("peers", name, ours, mode)
            for name in names
            if name != ours and ("peers", name, mode) in comparison.tasks
        }
        peers = {name: ratio for name, ratio in others.items() if name not in PACKAGE}
        if not peers:
            continue
        best = min(peers, key=lambda name: peers[name])
        found[mode] = {
            "of": ours,
            "official": peers.get(OFFICIAL),
            "best_peer": peers[best],
            "best_peer_name": best,
            "all": others,
        }
    return found


def _fractions(roof: RoofTask, comparison: Comparison, gflop: float) -> dict[str, Any]:
    """GFLOP/s of the kernels, forward `gflop` of them and backward twice that, and of the roofs."""
    reached: dict[str, dict[str, float]] = {}
    for (group, name, mode), task in comparison.tasks.items():
        work = {"forward": gflop, "backward": 2 * gflop}.get(mode)
        if group == "kernels" and name != BF16 and work:  # the roof is one of float32
            reached.setdefault(name, {}).update({
                f"{mode}_gflops": work / median(task.samples),
                f"{mode}_fraction": roof.fraction(task, work),
                f"{mode}_fraction_of_l2": roof.fraction_of_l2(task, work),
            })  # fmt: skip
    rates = Roof.of(roof.roofs)
    return {"gflops": rates.gflops, **asdict(rates), "reached": reached}


def _memory(case: Case, kind: str, threads: int, problem: Problem) -> dict[str, float | None]:
    """MiB that a step with Adam adds, each in a fresh process; the official way where it fits."""
    ways = {OURS: False, OFFICIAL: True}
    if PEERS[OFFICIAL].bytes_needed(problem) >= MODEST_BYTES:
        del ways[OFFICIAL]
    return {
        name: whole_step.memory_growth(whole_step.Training(case, kind, threads, official))
        for name, official in ways.items()
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.speed.run", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        default=["A", "B", "C", "E", "F"],
        help=f"of {' '.join(CASES)}, E for both of its batches; default: all but D (12 GiB)",
    )
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=["constant"])
    parser.add_argument("--threads", nargs="+", type=int, default=[torch.get_num_threads()])
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument(
        "--seconds", type=float, default=8.0, help="of timing per configuration, or a bit more"
    )
    parser.add_argument("--memory", action="store_true", help="also measure a step's memory")
    parser.add_argument("--name", default="cpu", help="of the file in bench/results")
    parser.add_argument("--output", type=Path, help="the file, instead of --name")
    return parser


if __name__ == "__main__":
    sys.exit(main())
