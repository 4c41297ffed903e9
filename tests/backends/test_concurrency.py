"""Several Python threads, worker processes and signals, against the same work done alone."""

from __future__ import annotations

import copy
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

import dendrite_kernels as dk
from dendrite_kernels.backends import _pool, cpp
from tests.exact_cases import outputs, whole_numbers
from tests.marks import kernels, needs_cpp
from tests.processes import output

THREADS = 8


def layers() -> list[dk.DendriticLayer]:
    """Of several sizes; each has enough work for two threads."""
    sizes = range(30, 30 + THREADS)
    return [dk.DendriticLayer(dk.connectivity.random(60, n, 4, 8, seed=n)) for n in sizes]


def differentiated(layer: dk.DendriticLayer, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(65, 60, generator=generator).requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]


def trained_and_rewired(layer: dk.DendriticLayer) -> list[Tensor]:
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(0)
    for seed in range(12):
        x = torch.randn(65, 60, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
        dk.plasticity.rewire(layer, optimizer, fraction=0.3, generator=generator)
    return [layer.connectivity.col_indices, *(p.detach() for p in layer.parameters())]


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(a.equal(b) for a, b in zip(ours, theirs, strict=True))


def test_threads_compute_while_another_rewires(backend: str) -> None:
    """Random numbers, bit by bit: on modules of their own and on shared ones."""
    each = layers()
    rewired = dk.DendriticLayer(dk.connectivity.random(60, 50, 4, 8, seed=0))
    expected = [[differentiated(layer, i) for i in range(2)] for layer in each]
    moved = trained_and_rewired(copy.deepcopy(rewired))
    fresh = layers()  # whose plans are not made yet
    for layer, known in zip(fresh, each, strict=True):
        layer.load_state_dict(known.state_dict())
    start = threading.Barrier(THREADS + 1)

    def rewire() -> bool:
        start.wait()
        with dk.use_backend(backend):  # type: ignore[arg-type]
            return equal(trained_and_rewired(rewired), moved)

    def work(i: int) -> bool:
        start.wait()
        with dk.use_backend(backend):  # type: ignore[arg-type]
            chosen = [i, *range(THREADS), i]  # its own, all of them, its own again
            return all(
                equal(differentiated(fresh[j], seed), expected[j][seed])
                for j in chosen
                for seed in range(2)
            )

    with ThreadPoolExecutor(THREADS + 1) as pool:
        done = [pool.submit(rewire), *(pool.submit(work, i) for i in range(THREADS))]
        assert [one.result() for one in done] == [True] * (THREADS + 1)


# The GIL


@pytest.fixture
def counter() -> Iterator[Callable[[], int]]:
    """How often a thread of Python came to run. It gets the GIL only from who gives it away."""
    ticks, stop = [0], threading.Event()

    def count() -> None:
        while not stop.is_set():
            ticks[0] += 1
            time.sleep(0)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    thread = threading.Thread(target=count)
    thread.start()
    yield lambda: ticks[0]
    sys.setswitchinterval(interval)
    stop.set()
    thread.join()


def runs_beside(counter: Callable[[], int], kernel: Callable[[], Any]) -> bool:
    """Whether another thread runs during the kernel, in one of many calls."""
    for _ in range(500):
        before = counter()
        kernel()
        if counter() > before:
            return True
    return False


def test_python_stands_still_without_the_gil_being_released(counter: Callable[[], int]) -> None:
    assert not runs_beside(counter, lambda: sum(range(1000)))
    assert runs_beside(counter, lambda: time.sleep(0.001))


@needs_cpp
def test_cpp_kernels_release_the_gil(counter: Callable[[], int]) -> None:
    c = dk.connectivity.random(400, 100, 8, 32, seed=0)
    extension, plan = cpp._load()[0], cpp._transposed(c)
    x, w, r, s = (torch.randn(n) for n in (512 * 400, c.nnz, 800, 512 * 100))
    x, y, signs = x.view(512, 400), s.view(512, 100), torch.zeros(16, 800, dtype=torch.int32)
    new = [torch.empty_like(t) for t in (x, w, r, r, r[:100])]

    def forward() -> None:
        extension.forward(plan, x, w, r, r, None, 0.1, 0.1, False, y, signs, 1)

    def backward() -> None:
        extension.backward(plan, y, x, y, signs, w, r, r, 0.1, 0.1, *new, 1)

    assert runs_beside(counter, forward)
    assert runs_beside(counter, backward)


def test_numba_kernels_release_the_gil(
    counter: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not dk.backend_info()["numba"]["available"]:
        pytest.skip("the Numba backend is unavailable")
    run, beside = _pool.run, []

    def watched(*call: int) -> None:
        beside.append(runs_beside(counter, lambda: run(*call)))

    layer = dk.DendriticLayer(dk.connectivity.random(400, 100, 8, 32, seed=0))
    x = torch.randn(512, 400)
    with dk.use_backend("numba"):
        layer(x).sum().backward()  # compiled and planned
        monkeypatch.setattr(_pool, "run", watched)
        layer(x).sum().backward()
    assert len(beside) >= 2
    assert all(beside)


# Signals


@kernels
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
def test_signals_at_any_time(backend: str) -> None:
    """A handler that raises, and one that calls the layer itself: the next call is right."""
    case, other = whole_numbers(3), whole_numbers(4)
    expected, others = outputs(*case), outputs(*other)
    came: list[bool] = []

    class Alarm(Exception):
        pass

    def handler(_: int, __: FrameType | None) -> None:
        with torch.enable_grad():  # forward of an autograd function has it off
            came.append(equal(outputs(*other), others))
        if len(came) % 2:
            raise Alarm

    before = signal.signal(signal.SIGALRM, handler)
    try:
        for i in range(200):
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-5 + 1e-5 * (i % 100))
                while len(came) <= i:
                    assert equal(outputs(*case), expected)
            except Alarm:
                pass
            assert equal(outputs(*case), expected)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert came == [True] * 200


# Worker processes

WORKERS = """
import sys
import torch
import dendrite_kernels as dk
from tests.backends.test_concurrency import Computed, expected
if __name__ == "__main__":
    torch.set_num_threads(2)
    dk.use_backend(BACKEND)
    wanted = expected(dk.connectivity.random(60, 30, 4, 8, seed=0))  # the pool has threads now
    data = Computed(BACKEND)
    for way in WAYS:
        loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=2, timeout=200,
                                             multiprocessing_context=way)
        found = [part for part in loader]
        assert len(found) == 4 and all(torch.equal(part, wanted) for part in found), way
        assert torch.equal(data[0], wanted), way  # the parent goes on
"""


def expected(c: dk.Connectivity) -> Tensor:
    """Of one layer: y and all gradients in a row, small integers that no order of sums changes."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=g).float()

    sizes = c.nnz, c.num_dendrites, c.num_dendrites, c.num_somas
    tensors, grad = [draw(65, 60), *(draw(n) for n in sizes)], draw(65, c.num_somas)
    return torch.cat([t.flatten() for t in outputs(c, tensors, grad)])


class Computed(torch.utils.data.Dataset[Tensor]):
    """Its items are computed by a layer in the worker, from a connectivity of the parent."""

    def __init__(self, backend: Any) -> None:
        self.backend, self.connectivity = backend, dk.connectivity.random(60, 30, 4, 8, seed=0)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Tensor:
        torch.set_num_threads(2)  # the loader gives its workers one
        with dk.use_backend(self.backend):
            return expected(self.connectivity)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize(
    "ways", [["fork"], pytest.param(["spawn", "forkserver"], marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", ["cpp", pytest.param("numba", marks=pytest.mark.slow)])
def test_workers_of_a_data_loader(name: str, ways: list[str]) -> None:
    if not dk.backend_info()[name]["available"]:
        pytest.skip(f"backend {name} is unavailable")
    output(f"BACKEND, WAYS = {name!r}, {ways}\n{WORKERS}")
