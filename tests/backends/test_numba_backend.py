"""The Numba backend by itself: exact numbers, threads, mistakes.

What it computes is tested with the other backends, by parametrisation; forks and its cache in
`test_numba_processes.py`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dendrite_kernels as dk
from dendrite_kernels.backends import _pool
from dendrite_kernels.backends.protocol import Operands
from tests import oracle
from tests.processes import output

kernels: Any = dk.backends.numba  # type: ignore[attr-defined]
pytestmark = pytest.mark.skipif(
    kernels.unavailable() is not None, reason=f"numba: {kernels.unavailable()}"
)

Arrays = dict[str, Any]
SLOPE = 0.25
NETWORKS: dict[str, Callable[[], dk.Connectivity]] = {
    "constant fan-in": lambda: dk.connectivity.random(70, 37, 4, 9, constant_fan_in=True, seed=0),
    "several blocks": lambda: dk.connectivity.random(40, 50, 45, 7, seed=0),
    "ragged": lambda: dk.Connectivity.from_mask(
        np.random.default_rng(0).random((40, 61)) < 0.2, soma_ptr=[0, 0, 1, 7, 7, 36, 40]
    ),
}


@pytest.fixture(params=list(NETWORKS))
def network(request: pytest.FixtureRequest) -> dk.Connectivity:
    return NETWORKS[request.param]()


def draw(c: dk.Connectivity, batch: int = 75, dtype: str = "float32", seed: int = 0) -> Arrays:
    """Whole numbers, whose sums are exact in any order; by the names of the arguments."""
    rng = np.random.default_rng(seed)

    def some(*shape: int) -> Tensor:
        return torch.from_numpy(rng.integers(-3, 4, shape).astype(dtype))

    return {
        "x": some(batch, c.in_features),
        "synapse_weight": some(c.nnz),
        "dendrite_bias": some(c.num_dendrites),
        "cable_weight": some(c.num_dendrites),
        "soma_bias": some(c.num_somas),
        "grad": some(batch, c.num_somas),
    }


def operands(c: dk.Connectivity, arrays: Arrays, slope: float = SLOPE) -> Operands:
    names = "synapse_weight", "dendrite_bias", "cable_weight", "soma_bias"
    return Operands(*(arrays[name] for name in names), c, slope, slope)  # type: ignore[arg-type, call-arg]


def sparse(c: dk.Connectivity, x: Tensor, weight: Tensor) -> Tensor:
    u: Tensor = kernels.forward(x, Operands(weight, None, None, None, c, 1.0, 1.0), False, False)[0]
    return u


def run(c: dk.Connectivity, arrays: Arrays) -> list[Tensor]:
    """y, signs, and the gradients of x, synapses, dendrites' bias, cables and somas' bias."""
    layer, x = operands(c, arrays), arrays["x"]
    y, signs = kernels.forward(x, layer, True, False)
    if len(y) % 32:
        signs[-1] &= (1 << len(y) % 32) - 1  # bits past the batch are unspecified
    saved = arrays["grad"], x, y, signs, layer
    gradients, without = kernels.backward(*saved, True), kernels.backward(*saved, False)
    assert without[0].shape == (0, c.in_features)
    assert all(map(equal, gradients[1:], without[1:]))
    return [y, signs, *gradients]


def equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.double(), b.double())


def exact(c: dk.Connectivity, arrays: Arrays) -> list[Tensor]:
    """What `run` should give, less the signs."""
    leaves = {name: a.double().clone() for name, a in arrays.items()}
    grad = leaves.pop("grad")
    inputs = [leaf.requires_grad_() for leaf in leaves.values()]
    function: Any = oracle.dendritic_layer
    y = function(*inputs, c, SLOPE)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


def is_exact(found: list[Tensor], expected: list[Tensor]) -> bool:
    y, _, *gradients = found
    return all(map(equal, [y, *gradients], expected))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("batch", [1, 75])
def test_numbers_and_signs_are_exact(network: dk.Connectivity, dtype: str, batch: int) -> None:
    arrays = draw(network, batch, dtype)
    found = run(network, arrays)
    assert is_exact(found, exact(network, arrays))
    signs = np.unpackbits(found[1].numpy().view(np.uint8), bitorder="little")
    signs = signs.reshape(len(found[1]), -1, 32).swapaxes(1, 2).reshape(-1, network.num_dendrites)
    u = sparse(network, arrays["x"], arrays["synapse_weight"]) + arrays["dendrite_bias"]
    assert np.array_equal(signs[:batch] == 1, u.numpy() > 0)


def test_absent_biases_and_empty_batches() -> None:
    c = NETWORKS["ragged"]()
    arrays = draw(c)
    absent = {**arrays, "dendrite_bias": None, "soma_bias": None}
    zeros = {**arrays, **{k: arrays[k] * 0 for k in ("dendrite_bias", "soma_bias")}}
    assert all(map(equal, run(c, absent), run(c, zeros)))
    y, signs, dx, *gradients = run(c, draw(c, batch=0))
    assert y.shape == (0, c.num_somas)
    assert signs.shape == (0, c.num_dendrites)
    assert dx.shape == (0, c.in_features)
    assert not any(g.any() for g in gradients)


# Threads


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tasks every phase handed to torch's pool."""
    found: list[int] = []
    real = _pool.run

    def spy(entry: int, count: int, context: int) -> None:
        found.append(count)
        real(entry, count, context)

    monkeypatch.setattr(_pool, "run", spy)
    return found


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("private", [1 << 28, 160_000, 1])
def test_work_may_be_cut_anyhow(
    network: dk.Connectivity,
    threads: int,
    private: int,
    tasks: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Among threads: into parts of the batch and groups of dendrites, as sums of theirs fit."""
    from dendrite_kernels.backends.numba import plan

    monkeypatch.setattr(plan, "_GRAIN", 1)
    monkeypatch.setattr(plan, "_PRIVATE", private)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for batch in (33, 330):
            arrays = draw(network, batch)
            assert is_exact(run(network, arrays), exact(network, arrays))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert max(tasks) == threads


def test_torch_s_pool_is_the_only_one() -> None:
    """No setting of torch changes, no threading layer of Numba starts, no thread is added but the
    workers that torch itself would start.
    """
    printed = output(
        """
import os, torch
import scipy.linalg  # has a pool of its own, and Numba imports it
def settings():
    counts = torch.get_num_threads(), torch.get_num_interop_threads()
    return *counts, torch.__config__.parallel_info()
def native_threads():
    return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0
torch.set_num_threads(3)
before, alone = settings(), native_threads()
import numba
from tests.backends import test_numba_backend as t
c = t.NETWORKS["several blocks"]()
found = t.run(c, t.draw(c, batch=330))
assert settings() == before
assert native_threads() <= alone + 2, (alone, native_threads())
try:
    numba.threading_layer()
except ValueError as error:
    print(error)
assert t.kernels.info()["threads"] == 3
torch.set_num_threads(1)
assert t.kernels.info()["threads"] == 1
assert all(map(t.equal, t.run(c, t.draw(c, batch=330)), found))
""",
    )
    assert "Threading layer is not initialized" in printed


def test_several_python_threads_at_once() -> None:
    """Also those that share a connectivity, whose plans are then made meanwhile."""
    networks = [make() for make in NETWORKS.values()]
    jobs = [(i % len(networks), seed) for i in range(6) for seed in range(4)]
    arrays = {job: draw(networks[job[0]], seed=job[1]) for job in jobs}
    fresh = [make() for make in NETWORKS.values()]
    serial = {job: run(networks[job[0]], arrays[job]) for job in jobs}
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda job: run(fresh[job[0]], arrays[job]), jobs))
    for job, results in zip(jobs, found, strict=True):
        assert all(map(equal, results, serial[job]))


@pytest.mark.parametrize(
    ("name", "within"), [("several blocks", "ragged"), ("ragged", "several blocks")]
)
def test_a_call_between_the_phases_of_another(
    name: str, within: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from a signal handler or a finaliser: it must not take the other's scratch memory."""
    c, other = NETWORKS[name](), NETWORKS[within]()  # the larger one writes over all of the other's
    arrays, others = draw(c), draw(other)
    expected, real, depth = run(other, others), _pool.run, 0

    def interrupted(entry: int, count: int, context: int) -> None:
        nonlocal depth
        real(entry, count, context)
        if depth == 0:
            depth += 1
            assert all(map(equal, run(other, others), expected))
            depth -= 1

    monkeypatch.setattr(_pool, "run", interrupted)
    assert is_exact(run(c, arrays), exact(c, arrays))


def test_calls_from_inside_a_parallel_region() -> None:
    """On torch's own workers, where they run serially like torch's operators."""
    c = NETWORKS["several blocks"]()
    arrays = draw(c)
    expected, found = run(c, arrays), {}

    @ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    def entry(begin: int, end: int, _: int) -> None:
        for task in range(begin, end):
            found[task] = run(c, arrays)

    address = ctypes.cast(entry, ctypes.c_void_p).value
    assert address is not None
    _pool.run(address, 4, 0)
    assert sorted(found) == [0, 1, 2, 3]
    for results in found.values():
        assert all(map(equal, results, expected))


# Mistakes: each names what was expected and what came


def test_bad_operands(network: dk.Connectivity) -> None:
    arrays = draw(network)
    n, nnz, rows = network.in_features, network.nnz, network.num_dendrites
    x, weight = arrays["x"], arrays["synapse_weight"]
    changes: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"x": x.half()}, TypeError, "Expected x of dtype float32 or .*, got float16"),
        ({"x": x[0]}, ValueError, rf"Expected x of shape \[{n}, {n}\], got \[{n}\]"),
        ({"x": x[:, 1:]}, ValueError, rf"Expected x of shape \[75, {n}\], got \[75, {n - 1}\]"),
        ({"x": x.T.contiguous().T}, ValueError, "Expected x to be contiguous .*, got other"),
        ({"x": x[::2]}, ValueError, "Expected x to be contiguous"),
        ({"synapse_weight": weight.numpy()}, TypeError, "to be a torch.Tensor, got ndarray"),
        ({"synapse_weight": None}, TypeError, "to be a torch.Tensor, got NoneType"),
        ({"synapse_weight": weight.double()}, TypeError, "of dtype float32, got float64"),
        ({"synapse_weight": weight[1:]}, ValueError, rf"shape \[{nnz}\], got \[{nnz - 1}\]"),
        ({"dendrite_bias": weight}, ValueError, rf"shape \[{rows}\], got \[{nnz}\]"),
    ]
    for change, error, message in changes:
        given = {**arrays, **change}
        with pytest.raises(error, match=message):
            kernels.forward(given["x"], operands(network, given), False, False)


def test_bad_arguments_of_backward() -> None:
    c = NETWORKS["ragged"]()
    a = draw(c)
    y, signs, *_ = run(c, a)
    good = {"grad": a["grad"], "x": a["x"], "y": y, "signs": signs}
    changes: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"grad": a["grad"][1:]}, ValueError, "Expected grad of shape"),
        ({"y": y.double()}, TypeError, "Expected y of dtype float32, got float64"),
        ({"y": None}, TypeError, "Expected y to be a torch.Tensor, got NoneType"),
        ({"signs": signs[:0]}, ValueError, r"Expected signs of shape \[3, 40\], got \[0, 40\]"),
        ({"signs": signs.view(torch.float32)}, TypeError, "signs of dtype int32, got float32"),
    ]
    for change, error, message in changes:
        with pytest.raises(error, match=message):
            kernels.backward(*{**good, **change}.values(), operands(c, a), True)
    for slope in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="Expected slopes >= 0, got"):
            kernels.backward(*good.values(), operands(c, a, slope), True)


@pytest.mark.parametrize("kind", ["meta", "sparse", "strided"])
def test_tensors_without_memory_of_their_own(kind: str) -> None:
    c = NETWORKS["ragged"]()
    x, weight = torch.zeros(2, c.in_features), torch.zeros(c.nnz)
    change: dict[str, Callable[[], torch.Tensor]] = {
        "meta": lambda: x.to("meta"),
        "sparse": lambda: x.to_sparse(),
        "strided": lambda: x[:1].expand(2, -1),
    }
    with pytest.raises((TypeError, ValueError), match=r"Expected x to be .*, got"):
        sparse(c, change[kind](), weight)


def test_reasons_to_be_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = kernels.unavailable.__wrapped__
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    assert ask() == "NUMBA_DISABLE_JIT is set"
    monkeypatch.setattr(kernels.importlib.metadata, "version", lambda name: "0.60.2")
    assert ask() == "Expected numba >= 0.61, got 0.60.2"

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(kernels.importlib.metadata, "version", missing)
    assert ask() == "numba is not installed"
