"""Times every legal plan of the kernels, fits the planner's constants, says what its choices cost.

    python -m bench.gpu.sweep --output sweep.json [--seconds 90]

Takes turns among cases and kernels, beginning with the planner's own choice, until time is up. G is
left out, since its packing for every kind takes longer than all the rest. The samples of A to D fit
in shared memory, so most plans here are of such kinds: of L2 there is one kind for each dtype.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.environment import describe
from bench.gpu.clock import graph_milliseconds, one_line, save
from bench.gpu.plans import KERNELS, TODAY, Problem, amounts, candidates
from bench.gpu.problem import CASES, prepare
from dendrite_kernels.backends.cuda.plan import TilePlan
from tests.oracle import relative_error

ALIKE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative error between two plans
RULES = ("constant", "local")


class Subject:
    """One kernel on one case: its plans, in the order in which they are timed."""

    def __init__(self, title: str, problem: Problem, kernel: str) -> None:
        self.title, self.problem, self.kernel = f"{title} {kernel}", problem, kernel
        self.allowed = ALIKE[problem.x.dtype]
        self.work, self.limits, self.choice = self.problem.work(kernel)
        others = candidates(kernel, self.work, self.limits)
        random.Random(0).shuffle(others)
        self.plans = list(dict.fromkeys([self.choice, *others]))
        self.points: list[dict[str, Any]] = []
        self.expected = self.problem.launches(kernel)[1]

    def time_plans(self) -> Iterator[None]:
        for plan in self.plans:
            point: dict[str, Any] = {"plan": dataclasses.asdict(plan)}
            try:
                point |= self._time(plan)
            except Exception as fault:  # more registers than the device has for these threads
                point["error"] = one_line(fault)
            self.points.append(point)
            yield

    def _time(self, plan: TilePlan) -> dict[str, float]:
        launches, result = self.problem.launches(self.kernel, plan)
        error = relative_error(result, self.expected)
        if not error <= self.allowed:
            raise ArithmeticError(f"relative error {error:.1e}")
        main = dict(launches)[self.kernel]

        def everything() -> None:
            for _, run in launches:
                run()

        return {
            name: graph_milliseconds(run, samples=5, limit=0.1)["p50"]
            for name, run in (("kernel_ms", main), ("ms", everything))
        }

    def timed(self) -> list[dict[str, Any]]:
        return [point for point in self.points if "ms" in point]

    def summary(self) -> dict[str, Any]:
        """The planner's choice and the best plan, by all launches that depend on the plan."""
        timed = self.timed()
        if not timed or "ms" not in self.points[0]:
            return {
                "error": next((p["error"] for p in self.points if "error" in p), "no time left")
            }
        best = min(timed, key=lambda point: float(point["ms"]))
        chosen = self.points[0]
        return {
            "choice": chosen, "best": best, "regret": chosen["ms"] / best["ms"],
            "timed": len(timed), "plans": len(self.plans),
        }  # fmt: skip

    def fitted(self, clock: float) -> Iterator[tuple[list[float], float]]:
        """Amounts of the model's terms and cycles, of the fastest plan of each kind."""
        best: dict[str, dict[str, Any]] = {}
        for point in sorted(self.timed(), key=lambda point: float(point["kernel_ms"])):
            best.setdefault(str(point["plan"]["kind"]), point)
        for point in best.values():
            plan = next(p for p in self.plans if dataclasses.asdict(p) == point["plan"])
            yield amounts(self.kernel, self.work, self.limits, plan), point["kernel_ms"] * clock


def prepared(dtype: torch.dtype) -> Iterator[Subject]:
    for name in "ABCD":
        for rule in RULES:
            layer, x, grad = prepare(CASES[name], rule)
            problem = Problem(layer, x.to(dtype), grad)
            for kernel in KERNELS:
                # The tiles of backward-input are always float32.
                if dtype == torch.float32 or kernel != "backward_input":
                    title = f"{name} {rule} {str(dtype).removeprefix('torch.')}"
                    yield Subject(title, problem, kernel)


def fit(rows: Sequence[tuple[list[float], float]]) -> dict[str, float]:
    """Costs in cycles that make the relative errors least; none is negative."""
    names = list(TODAY)
    matrix = np.array([amount for amount, _ in rows]) / np.array([[c] for _, c in rows])
    used = [i for i in range(len(names)) if matrix[:, i].any()]
    while used:
        costs = np.linalg.lstsq(matrix[:, used], np.ones(len(rows)), rcond=None)[0]
        if costs.min() >= 0:
            return {names[i]: float(cost) for i, cost in zip(used, costs, strict=True)}
        del used[int(costs.argmin())]
    return {}


def sweep(subjects: list[Subject], deadline: float) -> None:
    """One plan of each in turn, so that whatever time there is serves all."""
    turns = [subject.time_plans() for subject in subjects]
    while turns:
        for turn in list(turns):
            if time.monotonic() > deadline:
                return
            if next(turn, False) is False:
                turns.remove(turn)


def constants(subjects: list[Subject], clock: float) -> dict[str, dict[str, float]]:
    found = {}
    for kernel in (*KERNELS, "all kernels"):
        chosen = [s for s in subjects if kernel in (s.kernel, "all kernels")]
        rows = [row for subject in chosen for row in subject.fitted(clock)]
        found[kernel] = fit(rows) if rows else {}
    return found


def report(results: dict[str, Any]) -> None:
    for title, entry in results["summary"].items():
        if "error" in entry:
            print(f"{title:40s}{entry['error']}")
        else:
            print(
                f"{title:40s}{entry['choice']['ms']:9.4f} ms, best {entry['best']['ms']:9.4f} ms, "
                f"regret {entry['regret']:.2f}, {entry['timed']} of {entry['plans']} plans"
            )
    print("\ncost in cycles" + " " * 16 + "".join(f"{k:>18s}" for k in ("today", *results["fit"])))
    for name, today in results["today"].items():
        costs = [today, *(costs.get(name) for costs in results["fit"].values())]
        print(f"{name:30s}" + "".join(f"{'-' if c is None else f'{c:.2f}':>18s}" for c in costs))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    subjects = [subject for dtype in ALIKE for subject in prepared(dtype)]
    sweep(subjects, deadline)
    clock = getattr(torch.cuda.get_device_properties(0), "clock_rate", 0) or 1.98e6  # kHz
    results: dict[str, Any] = {
        "environment": describe(),
        "clock_khz": clock,
        "summary": {subject.title: subject.summary() for subject in subjects},
        "fit": constants(subjects, clock),
        "today": TODAY,
        "points": {subject.title: subject.points for subject in subjects},
    }
    save(options.output, results)
    report(results)
    return int(any("error" in entry for entry in results["summary"].values()))


if __name__ == "__main__":
    sys.exit(main())
