"""The CUDA kernels without a GPU: compiled for the host, sanitized, in three orders of threads."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.cuda_emulator import build

REASON = build.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"emulator: {REASON}")


def run(module: os.PathLike[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """The checks in a process of their own, since a sanitizer must be loaded before Python."""
    libraries = [build.runtime(name) for name in ("libasan.so", "libubsan.so")]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "PYTHONPATH": str(build.ROOT),
    }
    command = [sys.executable, "-m", "tests.cuda_emulator.check", os.fspath(module), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=build.ROOT, timeout=900
    )


def assert_good(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "all good" in result.stdout


def test_kernels_match_the_oracle_in_every_order_of_threads() -> None:
    assert_good(run(build.build()))


@pytest.mark.slow
def test_every_kind_of_tile_dtype_and_shape() -> None:
    assert_good(run(build.build(), "--cases", "all"))


MUTANTS = {
    # Zero counts as active: PyTorch's convention is the slope at u <= 0.
    "sign of zero": ("forward.h", "__ballot_sync(kAllLanes, u[i] > 0)",
                     "__ballot_sync(kAllLanes, u[i] >= 0)"),
    # Warps gather before the others have filled the tile.
    "no barrier": ("forward.h", "    __syncthreads();\n", ""),
    # The last columns of x are left out of the tile.
    "no tail": ("tile.h", "out[j] = n + j < inputs ? row[n + j] : T{};",
                "out[j] = n + 3 < inputs ? row[n + j] : T{};"),
    # Adam counts one step too few.
    "late correction": ("backward_weight.h", "A(*args.adam.steps) + 1",
                        "A(*args.adam.steps)"),
    # The gradient of the cable sees the weight behind the step.
    "early step": ("backward_weight.h", "    dot += weight * sum;\n    if constexpr (ADAM)\n"
                   "      step_adam(args.adam, to, weight, cable * sum, correction1, correction2);",
                   "    if constexpr (ADAM)\n"
                   "      step_adam(args.adam, to, weight, cable * sum, correction1, correction2);"
                   "\n    dot += args.weight[to] * sum;\n    if constexpr (ADAM) {}"),
    # Reads one row behind the tile.
    "overrun": ("tile.h", "if (tile_rows > inputs && me.warp == 0 && me.group == 0)",
                "if (me.warp == 0 && me.group == 0)"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(name: str) -> None:
    """By a wrong result or a sanitizer, not by some other failure."""
    result = run(build.build(MUTANTS[name]))
    assert result.returncode != 0, f"nothing noticed the mutant {name!r}"
    assert re.search(r"\d+ faults|AddressSanitizer: heap", result.stdout + result.stderr)
