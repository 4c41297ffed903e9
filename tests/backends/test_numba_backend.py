"""The Numba backend as its own users meet it: numpy arrays, threads, mistakes.

What it computes is tested with the other backends, by parametrisation; forks and its cache in
`test_numba_processes.py`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import PackageNotFoundError
from typing import Any

import numpy as np
import pytest
import torch

import dendrite_kernels as dk
from dendrite_kernels.backends import _pool
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

    def some(*shape: int) -> np.ndarray[Any, Any]:
        return rng.integers(-3, 4, shape).astype(dtype)

    return {
        "x": some(batch, c.in_features),
        "synapse_weight": some(c.nnz),
        "dendrite_bias": some(c.num_dendrites),
        "cable_weight": some(c.num_dendrites),
        "soma_bias": some(c.num_somas),
        "grad": some(batch, c.num_somas),
    }


def tensors(arrays: Arrays) -> Arrays:
    """On the same memory."""
    return {name: torch.from_numpy(a) for name, a in arrays.items()}


def run(c: dk.Connectivity, arrays: Arrays) -> list[Any]:
    """y, signs, and the gradients of x, synapses, dendrites' bias, cables and somas' bias."""
    a = {**arrays}
    grad, soma_bias = a.pop("grad"), a.pop("soma_bias")
    inputs = list(a.values())
    y, signs = kernels.forward(*inputs, soma_bias, c, negative_slope=SLOPE, save_signs=True)
    if len(y) % 32:
        signs[-1] &= (1 << len(y) % 32) - 1  # bits past the batch are unspecified
    x, weights = inputs[0], inputs[1:]
    backward = partial(kernels.backward, grad, x, y, signs, *weights, c, negative_slope=SLOPE)
    gradients, without = backward(), backward(need_x=False)
    assert without[0].shape == (0, c.in_features)
    assert all(map(equal, gradients[1:], without[1:]))
    return [y, signs, *gradients]


def equal(a: Any, b: Any) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


def exact(c: dk.Connectivity, arrays: Arrays) -> list[torch.Tensor]:
    """What `run` should give, less the signs."""
    leaves = {name: torch.from_numpy(a).double() for name, a in arrays.items()}
    grad = leaves.pop("grad")
    inputs = [leaf.requires_grad_() for leaf in leaves.values()]
    function: Any = oracle.dendritic_layer
    y = function(*inputs, c, SLOPE)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


def is_exact(found: list[Any], expected: list[torch.Tensor]) -> bool:
    y, _, *gradients = found
    return all(map(equal, [y, *gradients], expected))


# numpy arrays


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("batch", [1, 75])
def test_numpy_arrays_give_the_numbers_of_tensors(
    network: dk.Connectivity, dtype: str, batch: int
) -> None:
    arrays = draw(network, batch, dtype)
    ours, theirs = run(network, arrays), run(network, tensors(arrays))
    assert is_exact(ours, exact(network, arrays))
    for a, b in zip(ours, theirs, strict=True):
        assert isinstance(a, np.ndarray)
        assert isinstance(b, torch.Tensor)
        assert f"torch.{a.dtype}" == str(b.dtype)
    signs = np.unpackbits(ours[1].view(np.uint8), bitorder="little")
    signs = signs.reshape(len(ours[1]), -1, 32).swapaxes(1, 2).reshape(-1, network.num_dendrites)
    u = kernels.sparse_forward(
        arrays["x"], arrays["synapse_weight"], arrays["dendrite_bias"], network
    )
    assert equal(signs[:batch] == 1, u > 0)


def test_sparse_operations_on_numpy_arrays(network: dk.Connectivity) -> None:
    arrays = draw(network)
    x, weight, bias = arrays["x"], arrays["synapse_weight"], arrays["dendrite_bias"]
    matrix = network.to_scipy()
    matrix.data = weight
    u = kernels.sparse_forward(x, weight, None, network)
    assert equal(u, x @ matrix.T)
    assert equal(kernels.sparse_forward(x, weight, bias, network), u + bias)
    dx, dw, db = kernels.sparse_backward(u, x, weight, network, True)
    assert equal(dx, u @ matrix)
    rows = np.repeat(np.arange(network.num_dendrites), np.diff(matrix.indptr))
    assert (
        oracle.relative_error(
            torch.from_numpy(dw), torch.from_numpy((u[:, rows] * x[:, matrix.indices]).sum(0))
        )
        < 1e-6
    )
    assert isinstance(db, np.ndarray)
    assert kernels.sparse_backward(u, x, weight, network, False)[0].shape == (0, x.shape[1])


def test_memory_is_shared_and_left_alone(network: dk.Connectivity) -> None:
    """The kernels read the arrays themselves: what changes in place counts, nothing is written."""
    arrays = draw(network)
    views = tensors(arrays)
    for array in arrays.values():
        array.flags.writeable = False
    first = run(network, views)
    for name, array in draw(network, seed=1).items():
        arrays[name].flags.writeable = True
        arrays[name][...] = array
    assert is_exact(run(network, views), exact(network, arrays))
    assert not equal(first[0], run(network, arrays)[0])


def test_absent_biases_and_empty_batches() -> None:
    c = NETWORKS["ragged"]()
    arrays = draw(c)
    absent = {**arrays, "dendrite_bias": None, "soma_bias": None}
    zeros = {**arrays, **{k: np.zeros_like(arrays[k]) for k in ("dendrite_bias", "soma_bias")}}
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
@pytest.mark.parametrize("cut", ["whole", "in passes", "in passes with phases each"])
def test_work_may_be_cut_anyhow(
    network: dk.Connectivity,
    threads: int,
    cut: str,
    tasks: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Among threads, into passes over tiles that fit the cache, and into what fits the memory."""
    from dendrite_kernels.backends import _numba_plan as plan

    monkeypatch.setattr(plan, "_GRAIN", 1)
    if cut != "whole":
        monkeypatch.setattr(plan, "_PASS", 1)
    if cut == "in passes with phases each":
        monkeypatch.setattr(plan, "_PRIVATE", 1)
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


def test_a_call_between_the_phases_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a signal handler or a finaliser: it must not take the other's scratch memory."""
    c, other = NETWORKS["several blocks"](), NETWORKS["ragged"]()
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


def test_bad_arrays(network: dk.Connectivity) -> None:
    arrays = draw(network)
    n, nnz, rows = network.in_features, network.nnz, network.num_dendrites

    def forward(**changes: Any) -> None:
        a = {**arrays, **changes}
        del a["grad"]
        kernels.forward(*a.values(), network, negative_slope=SLOPE)

    x, weight = arrays["x"], arrays["synapse_weight"]
    for changes, error, message in [
        ({"x": x.tolist()}, TypeError, "Expected x to be a torch tensor or numpy array, got list"),
        ({"x": x.astype("float16")}, TypeError, "Expected x of dtype float32 or .*, got float16"),
        ({"x": x.astype(">f4")}, TypeError, "Expected x of dtype float32 or float64, got >f4"),
        ({"x": x[0]}, ValueError, rf"Expected x of shape \[B, {n}\], got \[{n}\]"),
        ({"x": x[:, 1:]}, ValueError, rf"Expected x of shape \[75, {n}\], got \[75, {n - 1}\]"),
        ({"x": np.asfortranarray(x)}, ValueError, "Expected x to be contiguous .*, got other"),
        ({"x": x[::2]}, ValueError, "Expected x to be contiguous"),
        ({"x": torch.from_numpy(x)}, TypeError, "Expected synapse_weight to be a Tensor, got ndar"),
        ({"synapse_weight": torch.from_numpy(weight)}, TypeError, "to be a ndarray, got Tensor"),
        ({"synapse_weight": None}, TypeError, "to be a ndarray, got NoneType"),
        ({"synapse_weight": weight.astype("f8")}, TypeError, "of dtype float32, got float64"),
        ({"synapse_weight": weight[1:]}, ValueError, rf"shape \[{nnz}\], got \[{nnz - 1}\]"),
        ({"dendrite_bias": weight}, ValueError, rf"shape \[{rows}\], got \[{nnz}\]"),
        ({"cable_weight": None}, TypeError, "Expected cable_weight to be a ndarray, got NoneType"),
    ]:
        with pytest.raises(error, match=message):
            forward(**changes)  # type: ignore[arg-type]


def test_bad_arguments_of_backward() -> None:
    c = NETWORKS["ragged"]()
    a = draw(c)
    y, signs, *_ = run(c, a)
    good = {"grad": a["grad"], "x": a["x"], "y": y, "signs": signs}
    weights = a["synapse_weight"], a["dendrite_bias"], a["cable_weight"]
    for changes, error, message in [
        ({"grad": a["grad"][1:]}, ValueError, "Expected grad of shape"),
        ({"y": y.astype("float64")}, TypeError, "Expected y of dtype float32, got float64"),
        ({"signs": signs[:0]}, ValueError, r"Expected signs of shape \[3, 40\], got \[0, 40\]"),
        ({"signs": signs.view("float32")}, TypeError, "signs of dtype int32, got float32"),
    ]:
        with pytest.raises(error, match=message):
            kernels.backward(*{**good, **changes}.values(), *weights, c)
    for slope in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="Expected negative_slope >= 0, got"):
            kernels.backward(*good.values(), *weights, c, negative_slope=slope)


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
        kernels.sparse_forward(change[kind](), weight, None, c)


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
    monkeypatch.setattr(kernels, "unavailable", ask)
    c = NETWORKS["ragged"]()
    with pytest.raises(RuntimeError, match="unavailable: numba is not installed"):
        kernels.sparse_forward(np.zeros((1, c.in_features), "f4"), np.zeros(c.nnz, "f4"), None, c)
