"""The CPU kernels of every instruction set on their own: against loops, in memory with fences."""

from __future__ import annotations

import re

import pytest

from tests.cpu_kernels import build

pytestmark = pytest.mark.slow  # minutes to compile, and to emulate


@pytest.fixture(params=["native", "sanitize", "threads", "valgrind", "neon"])
def target(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    reason = build.missing(name)
    if reason is not None:
        pytest.skip(reason)
    return name


def test_kernels_match_loops_and_stay_in_bounds(target: str) -> None:
    result = build.run(target)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    digits = 3 if target == "threads" else 5  # only what several threads do
    assert re.match(rf"base: \d{{{digits},}} cases, all good\n", result.stdout)
    if target == "neon":
        assert re.search(r"^neon: \d{5,} cases, all good$", result.stdout, re.M)
