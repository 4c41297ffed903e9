"""Checks the paper's dANNs on MNIST against the expected test accuracies.

    python -m bench.paper.mnist --data-root FOLDER [--kinds dANN-R ...] [--seeds 0 1 2] [--twins]

Batch 128, Adam 1e-3, 15 epochs, paper init, the last epoch's weights; five trials (seeds), as in
the paper. Ends with status 1 if a mean accuracy lies outside its range; a single trial may.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import dendrite_kernels as dk
from bench.environment import describe, write_json
from bench.paper import datasets
from bench.paper.training import Network, Outcome, Schedule, train_network
from dendrite_kernels.benchmark.memory import in_fresh_process

EPOCHS = 15


@dataclass(frozen=True)
class Case:
    network: Network
    low: float  # expected mean test accuracy after the last epoch, percent
    high: float


CASES = {
    case.network.kind: case
    for case in (
        Case(Network("dANN-R", somas=128, dendrites=1, synapses=16), 92.9, 93.6),
        Case(Network("dANN-LRF", somas=64, dendrites=16, synapses=16), 96.4, 97.2),
        Case(Network("dANN-GRF", somas=256, dendrites=8, synapses=16), 97.3, 97.9),
    )
}


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    data = datasets.load_or_exit("mnist", options.data_root)
    schedule = Schedule(options.epochs)
    runs, summaries = [], []
    for kind, twin in itertools.product(
        options.kinds, (False, True) if options.twins else (False,)
    ):
        accuracies = []
        for seed in options.seeds:
            network = replace(CASES[kind].network, seed=seed, twin=twin)
            outcome = in_fresh_process(train_network, data, network, schedule, options.threads)
            accuracies.append(100 * outcome.history["test_accuracy"][-1])
            runs.append({"network": asdict(network), **outcome.summary()})
            print(_line(network, outcome), flush=True)
        summaries.append(_judge(kind, twin, accuracies))
    report = {
        "data": data.source,
        "schedule": asdict(schedule),
        "summaries": summaries,
        "runs": runs,
        "environment": describe(options.threads),
    }
    write_json(options.output, report)
    print(f"Wrote {options.output}")
    return 0 if all(summary["within"] for summary in summaries) else 1


def _line(network: Network, outcome: Outcome) -> str:
    return (
        f"{_name(network.kind, network.twin)} D={network.dendrites:<3d}S={network.somas:<4d}"
        f"seed {network.seed}: {outcome.history['test_accuracy'][-1]:.2%}, "
        f"loss {outcome.history['test_loss'][-1]:.4f}, "
        f"{outcome.step_percentiles()['p50']:.2f} ms per step"
    )


def _judge(kind: dk.models.Kind, twin: bool, accuracies: list[float]) -> dict[str, object]:
    """The mean over the seeds against the expected range, printed and for the report."""
    case, mean = CASES[kind], statistics.mean(accuracies)
    deviation = statistics.stdev(accuracies) if len(accuracies) > 1 else None
    within = case.low <= mean <= case.high
    spread = "" if deviation is None else f" +- {deviation:.2f}"
    verdict = "within" if within else "OUTSIDE"
    print(f"{_name(kind, twin)} mean {mean:.2f} %{spread}: {verdict} {case.low} to {case.high}")
    return {
        "kind": kind,
        "twin": twin,
        "mean": mean,
        "deviation": deviation,
        "expected": [case.low, case.high],
        "within": within,
    }


def _name(kind: str, twin: bool) -> str:
    return f"{kind:9s} {'masked dense' if twin else 'sparse':13s}"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.paper.mnist", description="Check the paper's dANNs on MNIST."
    )
    parser.add_argument(
        "--data-root", required=True, help="folder with mnist.npz or the four IDX files"
    )
    parser.add_argument("--kinds", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--twins", action="store_true", help="train the masked-dense twins too")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    parser.add_argument("--output", type=Path, default=Path("reports/mnist.json"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
