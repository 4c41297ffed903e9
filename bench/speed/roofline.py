"""The gather-FMA roofline of a layer, measured by roofline.cpp.

The highest rate at which FMAs can read random rows of a tile of the input, with nothing else to do.
Forward does 2 flops per synapse and sample, backward 4 (gradients of weights and input). Also
measured: FMAs that read only the second-level cache. Small tiles can be faster, since some of their
rows come from L1.
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
from statistics import median

from dendrite_kernels.benchmark.timing import ROUNDS, Task, ratio

SOURCE = Path(__file__).with_name("roofline.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-mprefer-vector-width=512", "-ffp-contract=fast")
PORTABLE_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast")
MILLISECONDS = 8  # for each of seven ways
MAX_INPUTS = 1 << 16


class Unavailable(RuntimeError):
    """No roofline can be measured here; the message is the reason."""


@functools.cache
def _program() -> tuple[Path, tempfile.TemporaryDirectory[str]]:
    """Compiled once per process, for this processor; deleted when the process ends."""
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
    """GFLOP/s by tile width, for dendrites one by one and interleaved (which hides the latency of
    FMAs), and GFLOP/s of FMAs that read the second-level cache in order."""

    one_by_one: dict[int, float]
    interleaved: dict[int, float]
    l2: float

    @classmethod
    def of(cls, roofs: Sequence[Roof]) -> Roof:
        """The medians of several measurements."""
        return cls(
            _medians([r.one_by_one for r in roofs]),
            _medians([r.interleaved for r in roofs]),
            median(r.l2 for r in roofs),
        )

    @property
    def gflops(self) -> float:
        """The roof: the highest rate of all tile widths."""
        return max(*self.one_by_one.values(), *self.interleaved.values())


def _medians(rates: Sequence[dict[int, float]]) -> dict[int, float]:
    return {width: median(r[width] for r in rates) for width in rates[0]}


def measure(inputs: int, synapses: int, threads: int) -> Roof:
    """Rates of `threads` threads together; each has its own tile.

    Raises Unavailable without a compiler, or for more inputs than 16-bit columns can number.
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


class RoofTask(Task):
    """The roof, measured in every round of what it is compared with: see `timing.ratio`.

    A sample is the seconds that a GFLOP takes at the roof.
    """

    def __init__(self, inputs: int, synapses: int, threads: int) -> None:
        """Raises Unavailable as `measure` does."""
        self.sizes = inputs, synapses, threads
        self.roofs: list[Roof] = []
        super().__init__(self.measure, least=ROUNDS)
        self.run()

    def measure(self) -> float:
        self.roofs.append(measure(*self.sizes))
        return 1 / self.roofs[-1].gflops

    def fraction(self, kernel: Task, gflop: float) -> float:
        """The share of the roof that a kernel reaches with `gflop` of work."""
        return gflop * ratio(self, kernel)

    def fraction_of_l2(self, kernel: Task, gflop: float) -> float:
        """The same of the FMAs that read the second-level cache, measured beside the roof."""
        return self.fraction(kernel, gflop) * median(r.gflops / r.l2 for r in self.roofs)
