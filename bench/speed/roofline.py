"""The gather-FMA roofline of a layer's working set, measured by roofline.cpp.

The most that random rows of a batch-inner tile of the input allow, whatever is computed with them:
forward does 2 flops per synapse and sample, backward 4 (the gradients of weights and input). Beside
it, what loads from the second-level cache alone allow: L1 serves some of the rows of a small tile.
"""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("roofline.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-mprefer-vector-width=512", "-ffp-contract=fast")
PORTABLE_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast")
MILLISECONDS = 40  # for each of seven ways
MAX_INPUTS = 1 << 16


class Unavailable(RuntimeError):
    """No roofline can be measured here; says why."""


@functools.cache
def _program() -> tuple[Path, tempfile.TemporaryDirectory[str]]:
    """Compiled once in a process, for this processor; lives as long as the process."""
    compiler = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")
    if shutil.which(compiler[0]) is None:
        raise Unavailable(f"no C++ compiler ({compiler[0]}); set CXX")
    folder = tempfile.TemporaryDirectory(prefix="roofline")
    program = Path(folder.name, "roofline")
    for flags in (FLAGS, PORTABLE_FLAGS):
        command = [*compiler[:1], *flags, str(SOURCE), "-o", str(program), "-pthread"]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode == 0:
            return program, folder
    raise Unavailable(f"{compiler[0]} could not compile {SOURCE.name}: {run.stderr.strip()}")


@dataclass(frozen=True)
class Roof:
    """GFLOP/s by tile width: dendrites one by one, and interleaved to hide the FMA's latency; and
    of one load per FMA, in order, from the second-level cache."""

    one_by_one: dict[int, float]
    interleaved: dict[int, float]
    l2: float

    @classmethod
    def of(cls, roofs: Sequence[Roof]) -> Roof:
        """The highest rates of several measurements."""
        return cls(
            _highest([r.one_by_one for r in roofs]),
            _highest([r.interleaved for r in roofs]),
            max(r.l2 for r in roofs),
        )

    @property
    def gflops(self) -> float:
        """The roof: of whichever tile width is best."""
        return max(*self.one_by_one.values(), *self.interleaved.values())


def _highest(rates: Sequence[dict[int, float]]) -> dict[int, float]:
    return {width: max(r[width] for r in rates) for width in rates[0]}


def measure(inputs: int, synapses: int, threads: int) -> Roof:
    """What `threads` threads reach together, each with a tile of its own.

    Raises Unavailable without a compiler, or for more inputs than its 16-bit columns can name.
    """
    if inputs > MAX_INPUTS:
        raise Unavailable(f"Expected at most {MAX_INPUTS} inputs, got {inputs}")
    sizes = [str(value) for value in (inputs, synapses, threads, MILLISECONDS)]
    run = subprocess.run([str(_program()[0]), *sizes], capture_output=True, text=True)
    if run.returncode:
        raise Unavailable(f"{SOURCE.name} ended with status {run.returncode}")
    *rows, (_, l2) = (line.split() for line in run.stdout.splitlines())
    one_by_one, interleaved = ({int(row[0]): float(row[i]) for row in rows} for i in (1, 2))
    return Roof(one_by_one, interleaved, float(l2))
