"""Counters of our kernels by ncu, where it is there and allowed.

    python -m bench.gpu.profile --output profile.json

ncu runs this module again with --profiled: one forward and one backward of B and D are profiled.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench.gpu.clock import save
from bench.gpu.plans import Problem
from bench.gpu.preflight import find
from bench.gpu.problem import CASES, prepare
from bench.gpu.processes import UNAVAILABLE

METRICS = {
    "gpu__time_duration.sum": "time, ns",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue slots, %",
    "smsp__inst_executed.sum": "instructions of warps",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared_op_ld.sum": "wavefronts of shared loads",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_ld.sum": "bank conflicts of shared loads",
    "lts__t_bytes.sum": "bytes of L2",
    "dram__bytes.sum": "bytes of memory",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "achieved occupancy, %",
}
PROFILED = ("B", "D")


def profiled() -> None:
    problems = [Problem(*prepare(CASES[name])) for name in PROFILED]
    for problem in problems:
        problem.call("backward_input")  # copies the synapses
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for problem in problems:
        problem.call("forward")
        problem.call("backward_input")
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def number(text: str) -> float | None:
    """None for what ncu could not count, such as "n/a"."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def parse(text: str) -> list[dict[str, Any]]:
    """The counters of each launch, in order, from the CSV that ncu prints among other lines."""
    rows = csv.DictReader(line for line in text.splitlines() if line.startswith('"'))
    launches: dict[str, dict[str, Any]] = {}
    for row in rows:
        entry = launches.setdefault(row["ID"], {"kernel": row["Kernel Name"][:200]})
        name = METRICS.get(row["Metric Name"])
        if name is not None:
            entry[name] = number(row["Metric Value"])
    return list(launches.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--profiled", action="store_true")
    options = parser.parse_args()
    if options.profiled:
        profiled()
        return 0
    program = find("ncu")
    if program is None:
        print("ncu not found")
        return UNAVAILABLE
    run = subprocess.run(
        [
            program, "--csv", "--print-units=base", "--profile-from-start=off",
            "--target-processes=all", f"--metrics={','.join(METRICS)}",
            sys.executable, "-m", "bench.gpu.profile", "--profiled",
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    launches = parse(run.stdout)
    save(options.output, {"ncu": program, "launches": launches})
    for launch in launches:
        print(", ".join(f"{name} {value}" for name, value in launch.items()))
    if launches:
        return 0
    print(run.stdout[-3000:], run.stderr[-3000:], sep="\n")
    if "ERR_NVGPUCTRPERM" in run.stdout + run.stderr:
        print("ncu may not read counters on this machine")
        return UNAVAILABLE
    return 1


if __name__ == "__main__":
    sys.exit(main())
