"""Plants bugs in copies of the repository and runs the tests that should notice them.

    python -m tests.mutants [--only NAME ...] [--output FILE]

A mutant is caught if a test of `make test` fails, and survives if all named tests pass. It is
broken if its text is gone, it does not compile, no test ran, or tests ended in another way than by
failing: by an error of imports or fixtures, a crash or a time-out. The same tests must pass without
a mutant, first. Needs g++.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import dendrite_kernels as dk
from dendrite_kernels.benchmark.environment import describe

from .kernels import MUTANTS as KERNELS
from .package import MUTANTS as PACKAGE
from .plant import Mutant, outcome, prepare, run_tests

MUTANTS = KERNELS | PACKAGE
VERDICTS = {"failed": "caught", "passed": "survived", "broken": "broken"}


def every_test(mutants: dict[str, Mutant]) -> list[str]:
    """What to run without a mutant: each named file or test once."""
    named = {test for mutant in mutants.values() for test in mutant.tests.split()}
    return sorted(test for test in named if "::" not in test or test.split("::")[0] not in named)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=MUTANTS, default=list(MUTANTS), metavar="NAME")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for each run of tests")
    options = parser.parse_args()
    if not dk.backend_info()["cpp"]["available"]:
        raise SystemExit(f"Expected the C++ backend, got {dk.backend_info()['cpp']['reason']}")
    mutants = {name: MUTANTS[name] for name in options.only}
    results = []
    with tempfile.TemporaryDirectory() as folder:
        clean = prepare(Path(folder, "clean"), mutants.values())
        begin = time.monotonic()
        found = run_tests(clean, every_test(mutants), 4 * options.limit)
        print(f"without a mutant: {found.kind}, {time.monotonic() - begin:.0f} s", flush=True)
        if found.kind != "passed":
            raise SystemExit(f"Expected the tests to pass without a mutant, got {found.reason}")
        for number, (name, mutant) in enumerate(mutants.items()):
            begin = time.monotonic()
            copy = Path(folder, f"mutant{number}")
            found = outcome(clean, copy, mutant, options.limit)
            verdict, seconds = VERDICTS[found.kind], round(time.monotonic() - begin)
            print(f"{verdict:8} {seconds:4} s  {name}: {found.reason}", flush=True)
            results.append(
                {"name": name, "verdict": verdict, "reason": found.reason, "seconds": seconds}
            )
            shutil.rmtree(copy)
            if options.output is not None:
                found_here = {"environment": describe(), "mutants": results}
                options.output.write_text(json.dumps(found_here, indent=1) + "\n")
    caught = sum(result["verdict"] == "caught" for result in results)
    print(f"{caught} of {len(results)} caught")
    raise SystemExit(0 if caught == len(results) else 1)


if __name__ == "__main__":
    main()
