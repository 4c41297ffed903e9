"""How long the first call of the Numba backend takes: it compiles, later processes load a cache.

    python -m bench.questions.numba_start [--case A] [--threads 1] [--repeat 3]

Every figure is from a fresh process, which has imported torch and dendrite_kernels and made a
layer. Timed are its first forward and first backward, which import Numba, compile kernels or load
them, and compute: once with an empty cache, once with the cache of an earlier process. Both are
minima of `repeat` runs. Processor time is printed as well, because it depends less on other load.
Written to bench/results/numba_start.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import dendrite_kernels as dk
from bench.environment import describe, write_json
from bench.speed.cases import CASES

RESULT = Path(__file__).parents[1] / "results" / "numba_start.json"
MODES = ("training", "training with dx")  # without and with the gradient of x
ROWS = ("first call, empty cache", "first call, later process", "second call")


def one_process(case_name: str, mode: str, threads: int) -> dict[str, float]:
    """Seconds, in this process."""
    torch.set_num_threads(threads)
    case = CASES[case_name]
    layer = dk.DendriticLayer(case.connectivity("constant"))
    x = torch.rand(case.batch, case.in_features, requires_grad=mode == "training with dx")
    found = {}
    with dk.use_backend("numba"):
        for call in ("first", "second"):
            started, busy = time.perf_counter(), time.process_time()
            y = layer(x)
            between = time.perf_counter()
            y.sum().backward()
            ended = time.perf_counter()
            found[f"{call} forward"] = between - started
            found[f"{call} backward"] = ended - between
            found[f"{call} all"] = ended - started
            found[f"{call} processor"] = time.process_time() - busy
    return found


def fresh_process(case: str, mode: str, threads: int, cache: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "bench.questions.numba_start", "--case", case, "--threads",
         str(threads), "--one-process", mode],
        env={**os.environ, "NUMBA_CACHE_DIR": cache},
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )  # fmt: skip
    found: dict[str, float] = json.loads(done.stdout)
    return found


def measure(case: str, mode: str, threads: int, repeat: int) -> dict[str, dict[str, float]]:
    """Row of the table -> part of the work -> seconds."""
    empty, later = [], []
    for _ in range(repeat):
        with tempfile.TemporaryDirectory() as cache:
            empty.append(fresh_process(case, mode, threads, cache))
            later.append(fresh_process(case, mode, threads, cache))
    samples = {ROWS[0]: (empty, "first"), ROWS[1]: (later, "first"), ROWS[2]: (later, "second")}
    return {
        row: {
            part: min(run[f"{call} {part}"] for run in runs)
            for part in ("all", "forward", "backward", "processor")
        }
        for row, (runs, call) in samples.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.questions.numba_start")
    parser.add_argument("--case", choices=list(CASES), default="A")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--one-process", choices=MODES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_process:
        print(json.dumps(one_process(options.case, options.one_process, options.threads)))
        return
    report: dict[str, Any] = {
        "environment": describe(options.threads),
        "backend": dk.backend_info()["numba"],
        "case": str(CASES[options.case]),
        "repeat": options.repeat,
        "seconds": {m: measure(options.case, m, options.threads, options.repeat) for m in MODES},
    }
    write_json(RESULT, report)
    print_table(report)


def print_table(report: dict[str, Any]) -> None:
    environment = report["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    print(f"{report['case']}, {environment['threads']} thread(s), {report['backend']['isa']}")
    print(f"{environment['cpu']}, {environment['date']}, {versions}\n")
    rows = [(row, *(_cell(report["seconds"][mode][row]) for mode in MODES)) for row in ROWS]
    head = "seconds: all (forward + backward; processor time)", *MODES
    print(tabulate(rows, head, "github"))


def _cell(s: dict[str, float]) -> str:
    return f"{s['all']:.3f} ({s['forward']:.3f} + {s['backward']:.3f}; {s['processor']:.3f})"


if __name__ == "__main__":
    main()
