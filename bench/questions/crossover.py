"""The density from which a dense layer is faster than the sparse one.

    python -m bench.questions.crossover [--inputs 784 4096] [--threads 2] [--seconds 3]

For each number of inputs, K goes from 1 % to 90 % of the inputs (random, constant fan-in). At each
K the results are verified, and then three layers are timed in turns: the sparse one, masked dense
as the official code trains it, and masked dense with a block-sum cable. The crossover is the
density where the median of the ratios of turns crosses 1, interpolated on logarithmic axes.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.environment import describe_run, write_json
from bench.speed.run import RESULTS
from dendrite_kernels.benchmark.case import Case
from dendrite_kernels.benchmark.comparison import Comparison
from dendrite_kernels.benchmark.oracle import oracle
from dendrite_kernels.benchmark.peer import MODES
from dendrite_kernels.benchmark.peers import OFFICIAL, OURS
from dendrite_kernels.benchmark.problem import Problem
from dendrite_kernels.benchmark.timing import interleave

DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9)
BLOCK_SUM = "masked dense + block-sum cable"
SOMAS, DENDRITES = 256, 16


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    path = options.output
    report: dict[str, Any] = {**describe_run(parser, arguments, options.threads), "sweeps": []}
    refused = False
    for inputs in options.inputs:
        sweep = _sweep(inputs, options)
        refused |= any(point["refused"] for point in sweep["points"])
        report["sweeps"].append(sweep)
        write_json(path, report, digits=4)
    print(f"Wrote {path}")
    return int(refused)


def crossover(densities: Sequence[float], ratios: Sequence[float]) -> float | None:
    """Density at which dense / sparse falls to 1; None if it stays above, 0 if it starts below.

    Interpolated between two measured points, linearly in the logarithms of both.
    """
    if ratios[0] <= 1:
        return 0.0
    for i in range(1, len(ratios)):
        if ratios[i] <= 1:
            (d0, d1), (r0, r1) = densities[i - 1 : i + 1], ratios[i - 1 : i + 1]
            share = math.log(r0) / (math.log(r0) - math.log(r1))
            return math.exp(math.log(d0) + share * (math.log(d1) - math.log(d0)))
    return None


def _sweep(inputs: int, options: argparse.Namespace) -> dict[str, Any]:
    somas = options.somas
    print(
        f"\nN={inputs} S={somas} D={DENDRITES} B={options.batch}, {options.threads} threads. "
        "ms: median of forward | training | training with dx"
    )
    points = [_point(inputs, density, options) for density in options.densities]
    crossovers: dict[str, dict[str, float | None]] = {}
    for dense in (OFFICIAL, BLOCK_SUM):
        for mode in MODES:
            verified = [p for p in points if not p["refused"] and dense in p["ratios"]]
            if not verified:
                continue
            ratios = [p["ratios"][dense][mode] for p in verified]
            found = crossover([p["density"] for p in verified], ratios)
            crossovers.setdefault(dense, {})[mode] = found
            where = f"above {verified[-1]['density']:.0%}" if found is None else f"{found:.1%}"
            print(f"{dense} is faster than {OURS} from a density of {where} ({mode})")
    return {
        "inputs": inputs,
        "somas": somas,
        "dendrites": DENDRITES,
        "batch": options.batch,
        "points": points,
        "crossovers": crossovers,
    }


def _point(inputs: int, density: float, options: argparse.Namespace) -> dict[str, Any]:
    k = max(1, round(density * inputs))
    case = Case(f"K={k}", options.batch, inputs, 1, 1, options.somas, DENDRITES, k)
    problem = Problem.draw(case.connectivity("constant"), case.batch)
    expected = oracle(problem, gradients=True)
    comparison = Comparison(problem, expected)
    comparison.admit_peers([OURS, OFFICIAL, BLOCK_SUM])
    interleave(list(comparison.tasks.values()), options.seconds)
    times = comparison.times("peers")
    print(f"K={k} ({k / inputs:.1%})")
    for name, modes in times.items():
        print(f"  {name:34s}" + " | ".join(f"{modes[mode]['p50']:9.3f}" for mode in MODES))
    for name, reason in {**comparison.skipped, **comparison.refused}.items():
        print(f"  {name}: {reason}")
    sys.stdout.flush()
    return {
        "synapses": k,
        "density": k / inputs,
        "ms": times,
        "ratios": {
            name: {mode: comparison.ratio("peers", name, OURS, mode) for mode in MODES}
            for name in times
            if name != OURS and OURS in times
        },
        "relative_errors": comparison.errors,
        "skipped": comparison.skipped,
        "refused": comparison.refused,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.questions.crossover", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--inputs", nargs="+", type=int, default=[784, 4096])
    parser.add_argument("--somas", type=int, default=SOMAS, help=f"of {DENDRITES} dendrites")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--densities", nargs="+", type=float, default=DENSITIES)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing per density")
    parser.add_argument("--output", type=Path, default=RESULTS / "crossover.json")
    return parser


if __name__ == "__main__":
    sys.exit(main())
