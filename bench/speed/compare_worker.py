"""One version of the package, timed by `compare`: questions on stdin, answers on stdout."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import median

import dendrite_kernels as dk
from bench.speed.tasks import Run, prepare

_CALLS = 3  # at least


def seconds_of(run: Run, seconds: float) -> float:
    """Median of the calls that take so long in all, after one call that fills the caches."""
    run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < _CALLS or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return median(times)


def main() -> None:
    run: Run | None = None
    if Path(dk.__file__).parent.parent != Path.cwd():
        raise RuntimeError(f"Expected the package in {Path.cwd()}, got {dk.__file__}")
    with dk.use_backend(sys.argv[1]):  # type: ignore[arg-type]
        for line in sys.stdin:
            question = json.loads(line)
            if "task" in question:
                run = prepare(question["task"])
                print(0.0, flush=True)
            else:
                assert run is not None
                print(seconds_of(run, question["seconds"]), flush=True)


if __name__ == "__main__":
    main()
