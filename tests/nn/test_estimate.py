"""estimate_memory: held to what training adds to a fresh process."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from statistics import median
from typing import Any

import pytest
import torch

import dendrite_kernels as dk
from bench.speed.cases import CASES
from dendrite_kernels.benchmark.whole_step import Training, memory_growth

MIB = 1 << 20
needs_cpp = pytest.mark.skipif(
    not dk.backend_info()["cpp"]["available"], reason="the C++ backend is unavailable"
)


def _measured(training: Training, times: int = 3) -> float:
    """MiB; where the allocator puts arrays varies by a tenth from one process to the next."""
    with ThreadPoolExecutor(times) as pool:
        found = list(pool.map(memory_growth, [training] * times))
    known = [growth for growth in found if growth is not None]
    if not known:
        pytest.skip("the system does not tell how much memory a process has")
    return median(known)


def _estimated(training: Training) -> dk.MemoryEstimate:
    case = training.case
    return dk.estimate_memory(
        case.connectivity(training.kind), case.batch, input_gradient=training.input_gradient
    )


@needs_cpp
@pytest.mark.slow  # what an allocator keeps depends on the machine
@pytest.mark.parametrize("name", ["A", "B", "C", "D", "W"])
def test_within_15_percent_of_what_training_adds(name: str) -> None:
    training = Training(CASES[name], "constant", torch.get_num_threads())
    assert _estimated(training).total / MIB == pytest.approx(_measured(training), rel=0.15)


@needs_cpp
@pytest.mark.slow
@pytest.mark.parametrize("name", ["A", "C", "D", "W"])
def test_with_the_gradient_of_the_input(name: str) -> None:
    training = Training(CASES[name], "constant", torch.get_num_threads(), input_gradient=True)
    assert _estimated(training).total / MIB == pytest.approx(_measured(training), rel=0.15)


@needs_cpp
@pytest.mark.slow
@pytest.mark.parametrize("name", ["A", "B", "C"])
def test_of_a_masked_dense_twin(name: str) -> None:
    training = Training(CASES[name], "constant", torch.get_num_threads(), official=True)
    assert _estimated(training).dense / MIB == pytest.approx(_measured(training, 1), rel=0.15)


def test_parts_have_the_sizes_of_the_arrays() -> None:
    c = dk.connectivity.random(50, 6, 4, 8, constant_fan_in=True, seed=0)
    layer = dk.DendriticLayer(c)
    numbers = sum(p.numel() for p in layer.parameters())
    found = dk.estimate_memory(c, 64)
    assert found.parameters == found.gradients == 4 * numbers
    assert found.optimizer == 2 * 4 * numbers
    assert found.index == sum(t.numel() * 4 for t in (c.crow_indices, c.col_indices, c.soma_ptr))
    assert found.plan == c.columns.nbytes
    assert found.activations == 4 * 2 * c.num_dendrites + 2 * 4 * 64 * c.num_somas
    parts = [value for name, value in vars(found).items() if name != "dense"]
    assert found.total == sum(parts)
    assert "total" in str(found)
    assert "dense" in str(found)


def test_what_changes_the_estimate() -> None:
    c = dk.connectivity.random(50, 6, 4, 8, constant_fan_in=True, seed=0)
    adam = dk.estimate_memory(c, 64)
    assert dk.estimate_memory(c, 64, "sgd") == replace(
        adam, optimizer=0, dense=adam.dense - 2 * 4 * c.num_dendrites * (50 + c.num_somas)
    )
    wide = dk.estimate_memory(c, 64, dtype=torch.float64)
    assert (wide.parameters, wide.index) == (2 * adam.parameters, adam.index)
    with_dx = dk.estimate_memory(c, 64, input_gradient=True)
    assert with_dx.plan > adam.plan
    assert with_dx.activations == adam.activations + 4 * 64 * 50
    reference = dk.estimate_memory(c, 64, backend="reference")
    assert reference.workspace >= 4 * c.num_dendrites * 50


def test_matrices_where_synapses_are_dense() -> None:
    found = dk.estimate_memory(dk.connectivity.all_to_all(30, 4, 3), 16)
    assert (found.plan, found.workspace) == (0, 0)
    assert found.activations > 4 * 4 * 16 * 12


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"connectivity": "ring"}, TypeError, "Expected a Connectivity, got str"),
        (
            {"connectivity": dk.DendriticTree(dk.connectivity.all_to_all(9, 2, 4), [2, 2])},
            TypeError,
            "Expected a Connectivity, got DendriticTree",
        ),
        ({"batch": 0}, ValueError, "Expected batch from 1"),
        ({"optimizer": "adma"}, ValueError, "Expected an optimizer of .*, got 'adma'"),
        ({"backend": "cuda"}, ValueError, "Expected a backend of .*, got 'cuda'"),
        ({"dtype": torch.int8}, TypeError, "Expected parameters of dtype"),
    ],
)
def test_bad_arguments_are_refused(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"connectivity": dk.connectivity.random(9, 2, 2, 3, seed=0), "batch": 4, **change}
    with pytest.raises(error, match=message):
        dk.estimate_memory(**arguments)
