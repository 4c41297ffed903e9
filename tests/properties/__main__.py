"""`python -m tests.properties --cases 50000 --seed 1`: the properties on as many cases as you like.

Prints how many cases of each entry ran on each backend. The same seed gives the same cases, so a
failure is found again by its seed and entry. A long run may be split by seeds or entries.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Sequence

import hypothesis
import numba
import numpy
import torch

import dendrite_kernels as dk
from tests.conftest import poison_memory
from tests.properties import entries

COLUMNS = (*entries.BACKENDS, "any")


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if all properties hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.properties", description=__doc__)
    parser.add_argument("--cases", type=int, default=500, help="of all entries together, each seed")
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--entry", nargs="+", default=list(entries.ENTRIES))
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    poison_memory()
    print(
        f"python {sys.version.split()[0]}, torch {torch.__version__}, numpy {numpy.__version__}, "
        f"numba {numba.__version__}, hypothesis {hypothesis.__version__}, "
        f"{dk.backend_info()['cpp'].get('isa', 'no C++ backend')}, {asked.threads} threads"
    )
    total, failed = 0, 0
    for seed in asked.seed:
        print(f"\nseed {seed:<22}" + "".join(f"{name:>10}" for name in (*COLUMNS, "seconds")))
        for name in asked.entry:
            began = time.perf_counter()
            try:
                counts = entries.run(name, asked.cases, seed)
            except Exception:  # the others run all the same
                traceback.print_exc()
                print(f"{name:<27}    FAILED", flush=True)
                failed += 1
                continue
            total += counts.total()
            numbers = "".join(f"{counts[column] or '':>10}" for column in COLUMNS)
            print(f"{name:<27}{numbers}{time.perf_counter() - began:>10.0f}", flush=True)
    print(f"\n{total} cases, {failed} properties failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
