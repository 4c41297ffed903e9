"""pytest-benchmark: how long the calls of `bench.speed.tasks` take, by `make benchmark`.

Not among the tests: nothing is asserted. Whether the results are right is what `tests` and
`python -m bench.speed.run` say.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import dendrite_kernels as dk
from bench.speed.tasks import BACKENDS, TASKS, Backend, prepare


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("task", TASKS)
def test_speed(benchmark: BenchmarkFixture, task: str, backend: Backend) -> None:
    benchmark.group = task
    with dk.use_backend(backend):
        benchmark(prepare(task))
