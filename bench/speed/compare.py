"""Is the working tree slower than another version? Both are built here and timed in turns.

    python -m bench.speed.compare REF [--tasks "A forward" ...] [--margin 0.05]

REF is a commit, branch or tag. Ends with status 1 if a task became slower by more than the margin.

Shared machines change their speed for seconds at a time, up to 1.5-fold, and a process may be
slower than another one of the same code, by where its memory lies. So each version runs in a
process of its own, and the two take turns of some hundredths of a second, in changing order. What
counts is the ratio of neighbouring turns, which mostly meet the same machine: the median over the
turns of a pair of processes. A task is slower if that holds in every one of several new pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

from tabulate import tabulate

from bench.speed.tasks import BACKENDS, TASKS

ROOT = Path(__file__).parents[2]
_WORKER = "bench.speed.compare_worker"


class Worker:
    """A process that runs one version of the package."""

    def __init__(self, package: Path, backend: str, threads: int) -> None:
        """package: the folder that holds this version's `dendrite_kernels`."""
        # Python looks for modules in the working directory first: this version, our tasks.
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", _WORKER, backend],
            cwd=package, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def prepare(self, task: str) -> None:
        self._ask({"task": task})

    def time(self, seconds: float) -> float:
        """Median seconds of a call, of calls that take so long in all."""
        return self._ask({"seconds": seconds})

    def _ask(self, question: dict[str, object]) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"Expected an answer to {question}, got an end: see its error above")
        return float(answer)

    def close(self) -> None:
        self._process.communicate()


@contextmanager
def workers(packages: Sequence[Path], backend: str, threads: int) -> Iterator[list[Worker]]:
    with ExitStack() as stack:
        started = [Worker(package, backend, threads) for package in packages]
        for worker in started:
            stack.callback(worker.close)
        yield started


def ratio(pair: Sequence[Worker], turns: int, seconds: float) -> tuple[float, float]:
    """Of (base, new): the median of new / base over neighbouring turns; median seconds of new."""
    base, new = pair
    times: dict[Worker, list[float]] = {base: [], new: []}
    for turn in range(turns):
        for worker in (base, new) if turn % 2 == 0 else (new, base):
            times[worker].append(worker.time(seconds))
    ratios = [b / a for a, b in zip(times[base], times[new], strict=True)]
    return median(ratios), median(times[new])


def slower(ratios: Sequence[float], margin: float) -> bool:
    """Whether every pair of processes says so."""
    return min(ratios) > 1 + margin


def compare(base: Path, new: Path, options: argparse.Namespace) -> list[str]:
    """Print a line for each task; the tasks that became slower."""
    found: dict[str, list[float]] = {task: [] for task in options.tasks}
    now: dict[str, float] = {}
    for _ in range(options.pairs):
        with workers((base, new), options.backend, options.threads) as pair:
            for task in options.tasks:
                for worker in pair:
                    worker.prepare(task)
                one, now[task] = ratio(pair, options.turns, options.seconds)
                found[task].append(one)
    worse = [task for task, ratios in found.items() if slower(ratios, options.margin)]
    rows = [
        (task, 1e3 * now[task], *sorted(ratios), "SLOWER" if task in worse else "")
        for task, ratios in found.items()
    ]
    head = "", "ms", f"new / {options.base}", *[""] * options.pairs
    print(tabulate(rows, head, "plain", floatfmt=("", ".4f", *[".3f"] * options.pairs)))
    return worse


def install(source: Path, folder: Path) -> Path:
    """Build the package in `source` and put it into `folder`."""
    command = [
        sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
        "--target", str(folder), str(source),
    ]  # fmt: skip
    subprocess.run(command, check=True, env={**os.environ, "DENDRITE_KERNELS_REQUIRE": "cpu"})
    return folder


def checkout(ref: str, folder: Path) -> Path:
    """The files of a commit."""
    folder.mkdir()
    archive = subprocess.run(["git", "archive", ref], cwd=ROOT, check=True, stdout=subprocess.PIPE)
    subprocess.run(["tar", "-x"], cwd=folder, check=True, input=archive.stdout)
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = time.perf_counter()
        base = install(checkout(options.base, folder / "source"), folder / "base")
        new = install(ROOT, folder / "new")
        print(f"Built both versions in {time.perf_counter() - started:.0f} s")
        worse = compare(base, new, options)
    if worse:
        print(f"Slower than {options.base} by more than {options.margin:.0%}: {', '.join(worse)}")
    return int(bool(worse))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.speed.compare", description=__doc__.split("\n")[0]
    )
    parser.add_argument("base", help="the version to compare with: a commit, branch or tag")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, metavar="TASK")
    parser.add_argument("--backend", choices=BACKENDS, default=BACKENDS[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--margin", type=float, default=0.05)
    parser.add_argument("--pairs", type=int, default=3, help="of processes (%(default)s)")
    parser.add_argument("--turns", type=int, default=16, help="of each process (%(default)s)")
    parser.add_argument("--seconds", type=float, default=0.04, help="of a turn (%(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
