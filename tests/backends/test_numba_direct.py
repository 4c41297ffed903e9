"""The native functions that run Numba's plans: what they refuse, and what they do when torch fails.

That they compute what the long way does is tested with the other backends in `test_direct.py`, for
forward, and here for backward.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import dendrite_kernels as dk
from tests.autograd.test_fast_path import CHANGES
from tests.processes import output

kernels: Any = dk.backends.numba  # type: ignore[attr-defined]
pytestmark = pytest.mark.skipif(
    kernels.unavailable() is not None, reason=f"numba: {kernels.unavailable()}"
)
BATCH = 40
SLOPE = 0.25


@pytest.fixture(autouse=True)
def numba_serves() -> Iterator[None]:
    with dk.use_backend("numba"):
        yield


def prepared(dtype: torch.dtype = torch.float32) -> tuple[dk.Connectivity, list[Any], list[Any]]:
    """A connectivity that serves calls at once, and the operands of forward and of backward."""
    c = dk.connectivity.random(30, 10, 4, 6, seed=0)
    sizes = (BATCH, 30), (c.nnz,), (40,), (40,), (10,)
    x, w, dendrite_bias, cable, soma_bias = (torch.randn(size, dtype=dtype) for size in sizes)
    forward = [x, w, dendrite_bias, cable, soma_bias]
    y, signs = kernels.forward(*forward, c, negative_slope=SLOPE, save_signs=True)
    backward = [torch.randn(BATCH, 10, dtype=dtype), x, y, signs, w, dendrite_bias, cable]
    kernels.sparse_forward(x, w, dendrite_bias, c)
    rows = [torch.randn(BATCH, 40, dtype=dtype), x, w]
    for need_x in (True, False):
        kernels.backward(*backward, c, negative_slope=SLOPE, need_x=need_x)
        kernels.sparse_backward(*rows, c, need_x)
    return c, forward, backward


def launch(c: dk.Connectivity, key: str, operands: list[Any], *options: Any) -> Any:
    return c.derived[key].launch(*operands, *(options or (SLOPE, True)))


# --- backward ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("need_x", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_backward_gives_what_the_long_way_does(
    dtype: torch.dtype, need_x: bool, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    c, _, operands = prepared(dtype)
    operands[5] = operands[5] if biased else None
    rows = [torch.randn(BATCH, 40, dtype=dtype), operands[1], operands[4]]
    at_once = [
        *launch(c, kernels.BACKWARD, operands, SLOPE, need_x),
        *launch(c, kernels.BACKWARD_ROWS, rows, 1.0, need_x),
    ]
    monkeypatch.setattr(kernels, "_at_once", lambda *_: None)
    long = [
        *kernels.backward(*operands, c, negative_slope=SLOPE, need_x=need_x),
        *kernels.sparse_backward(*rows, c, need_x),
    ]
    assert len(at_once) == len(long)
    for a, b in zip(at_once, long, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_backward_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    c, forward, _ = prepared()
    leaves = [t.requires_grad_() for t in forward]
    run: Any = dk.functional.dendritic_layer
    expected = torch.autograd.grad(run(*leaves, c, negative_slope=SLOPE).sum(), leaves)
    monkeypatch.setattr(kernels, "_checked_batch", None)  # the long way's first step
    found = torch.autograd.grad(run(*leaves, c, negative_slope=SLOPE).sum(), leaves)
    assert all(map(torch.equal, found, expected))


# --- what does not fit ---


@pytest.mark.parametrize("which", range(7))
@pytest.mark.parametrize("change", sorted(set(CHANGES) - {"another class"}))
def test_operands_that_do_not_fit(change: str, which: int) -> None:
    """The long way explains them: see `test_numba_backend.py` and `test_errors.py`."""
    c, _, operands = prepared()
    assert launch(c, kernels.BACKWARD, operands) is not None
    changed = CHANGES[change](operands[which])
    same = isinstance(changed, Tensor) and changed.dtype == operands[which].dtype
    operands[which] = changed
    found = launch(c, kernels.BACKWARD, operands)
    assert found is None or (change == "integers" and same)  # signs are


def test_signs_are_words() -> None:
    c, _, operands = prepared()
    operands[3] = operands[3].view(torch.float32)
    assert launch(c, kernels.BACKWARD, operands) is None


def test_only_a_bias_may_be_none() -> None:
    for which in range(7):
        c, _, operands = prepared()
        operands[which] = None
        assert (launch(c, kernels.BACKWARD, operands) is None) == (which != 5)


def test_other_options() -> None:
    c, forward, backward = prepared()
    for slope in (-0.1, float("nan")):
        assert launch(c, kernels.FORWARD, forward, slope, True) is None
        assert launch(c, kernels.BACKWARD, backward, slope, True) is None
    with pytest.raises(TypeError, match="real number"):
        launch(c, kernels.FORWARD, forward, "steep", True)
    serves = c.derived[kernels.FORWARD]
    for arguments in ([], forward, [*forward, SLOPE], [*forward, SLOPE, True, True]):
        assert serves.launch(*arguments) is None
    for arguments in ([], forward[:-1], [*forward, SLOPE]):
        assert serves.accepts(*arguments) is None
    assert serves.accepts(*forward) is False


def test_rows_have_no_cable() -> None:
    c, (x, w, bias, cable, soma_bias), _ = prepared()
    rows = c.derived[kernels.FORWARD_ROWS]
    assert rows.accepts(x, w, bias, None, None) is False
    assert rows.accepts(x, w, bias, cable, None) is None
    assert rows.accepts(x, w, bias, None, soma_bias) is None
    assert rows.accepts(x, w, bias, cable[:0], None) is None


def test_tensors_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As there may be no other device here, DLPack's word for one is put into a tensor's view."""
    from dendrite_kernels.backends import _numba_direct, _numba_native

    kind = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(_numba_native.View))
    real, cuda = kind(_numba_direct._lent().borrow), 2
    elsewhere: list[int] = []

    def borrow(tensor: int, view: Any) -> int:
        failed = int(real(tensor, view))
        if tensor in elsewhere:
            view.contents.device_type = cuda
        return failed

    lent = kind(borrow)
    c, forward, _ = served_with(monkeypatch, borrow=ctypes.cast(lent, ctypes.c_void_p).value)
    assert launch(c, kernels.FORWARD, forward) is not None
    for tensor in forward:
        elsewhere[:] = [id(tensor)]
        assert launch(c, kernels.FORWARD, forward) is None


def test_a_pending_sign_is_refused_by_the_long_way_too() -> None:
    c, (x, *weights), _ = prepared()
    with pytest.raises(ValueError, match="Expected x to hold its signs"):
        kernels.forward(torch._neg_view(x), *weights, c)


# --- plans ---


def test_other_batches_and_thread_counts_have_plans_of_their_own() -> None:
    c, (x, *weights), _ = prepared()
    accepts = c.derived[kernels.FORWARD].accepts
    longer, threads = torch.cat([x, x]), torch.get_num_threads()
    assert accepts(longer, *weights) is None
    kernels.forward(longer, *weights, c)
    assert accepts(longer, *weights) is False
    try:
        torch.set_num_threads(threads + 1)
        assert accepts(x, *weights) is None
        kernels.forward(x, *weights, c)
        assert accepts(x, *weights) is False
    finally:
        torch.set_num_threads(threads)
    assert accepts(x, *weights) is False


def test_more_batches_than_a_table_holds() -> None:
    c, (_, *weights), _ = prepared()
    run: Any = dk.functional.dendritic_layer
    x = torch.randn(200, 30)
    whole = run(x, *weights, c)
    accepted = 0
    for _ in range(2):
        for batch in range(1, 101):
            assert torch.allclose(run(x[:batch], *weights, c), whole[:batch])
            accepted += c.derived[kernels.FORWARD].accepts(x[:batch], *weights) is False
    assert 100 < accepted < 200


def test_calls_that_need_much_memory_take_the_long_way() -> None:
    c = dk.connectivity.random(20_000, 3, 2, 4, seed=0)
    sizes = (40, 20_000), (c.nnz,), (6,), (6,), (3,)
    operands = [torch.randn(size) for size in sizes]
    kernels.forward(*operands, c)
    assert c.derived[kernels.FORWARD].accepts(*operands) is None


# --- threads, references, failures ---


def test_several_python_threads_at_once() -> None:
    c, forward, backward = prepared()
    y, gradients = launch(c, kernels.FORWARD, forward)[0], launch(c, kernels.BACKWARD, backward)

    def work(_: int) -> bool:
        same = True
        for _ in range(200):
            same &= torch.equal(launch(c, kernels.FORWARD, forward)[0], y)
            found = launch(c, kernels.BACKWARD, backward)
            same &= all(map(torch.equal, found, gradients))
        return same

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_runs_its_parent_s_plans() -> None:
    """Without its parent's threads, for which it would wait forever."""
    output(
        """
import os, signal, torch
import dendrite_kernels as dk
from dendrite_kernels.backends import numba as kernels
torch.set_num_threads(2)
c = dk.connectivity.random(500, 300, 8, 16, seed=0)
operands = [torch.randn(size) for size in ((256, 500), c.nnz, 2400, 2400, 300)]
y, _ = kernels.forward(*operands, c)
launch = c.derived[kernels.FORWARD].launch
assert torch.equal(launch(*operands, 0.1, False), y)
child = os.fork()
if child == 0:
    signal.alarm(20)
    found = launch(*operands, 0.1, False)  # torch.equal would wait for threads
    os._exit(0 if (found.numpy() == y.numpy()).all() else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    )


def test_no_reference_is_lost_or_kept() -> None:
    c, forward, backward = prepared()
    objects = [*forward, *backward, None, True, False, Tensor, SLOPE, kernels]
    accepts = c.derived[kernels.FORWARD].accepts
    bad = [*forward[:-1], forward[0]]

    def counts() -> list[int]:
        return [sys.getrefcount(thing) for thing in objects]

    tracemalloc.start()
    before, memory = counts(), tracemalloc.get_traced_memory()[0]
    for _ in range(1000):
        accepts(*forward)
        accepts(*bad)
        launch(c, kernels.FORWARD, forward)
        launch(c, kernels.FORWARD, bad)
        launch(c, kernels.BACKWARD, backward)
        launch(c, kernels.BACKWARD, backward, SLOPE, False)
    assert all(abs(a - b) < 100 for a, b in zip(counts(), before, strict=True))
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert after - memory < 20_000  # bytes


def served_with(monkeypatch: pytest.MonkeyPatch, **lent: Any) -> Any:
    """As `prepared`, but some of what torch lends is something else."""
    from dendrite_kernels.backends import _numba_direct

    other = type(_numba_direct._lent()).from_buffer_copy(_numba_direct._lent())
    for name, value in lent.items():
        setattr(other, name, value)
    monkeypatch.setattr(_numba_direct, "_lent", lambda: other)  # keeps it, too
    return prepared()


class Allocator:
    """Torch's, but it fails when `left` calls have been made, and knows what still lives."""

    def __init__(self) -> None:
        self.left = sys.maxsize
        self.made: list[Any] = []

    def __call__(self, size: Any, strides: Any, dtype: torch.dtype) -> Tensor:
        if self.left == 0:
            raise MemoryError("no more")
        self.left -= 1
        tensor = torch.empty_strided(size, strides, dtype=dtype)
        self.made.append(torch.UntypedStorage._weak_ref(tensor.untyped_storage()))
        return tensor

    def living(self) -> int:
        return sum(not torch.UntypedStorage._expired(storage) for storage in self.made)


@pytest.mark.parametrize("failing", range(5))
def test_an_allocation_that_fails(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error arrives, and what was allocated before is given back."""
    allocator = Allocator()
    c, _, operands = served_with(monkeypatch, empty_strided=id(allocator))
    allocator.left = failing
    with pytest.raises(MemoryError, match="no more"):
        launch(c, kernels.BACKWARD, operands)
    assert len(allocator.made) == failing
    assert allocator.living() == 0
    allocator.left = sys.maxsize
    assert launch(c, kernels.BACKWARD, operands) is not None


def test_a_pool_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_int64] * 5)
    calls: list[int] = []
    fail: Callable[..., int] = kind(lambda *arguments: (calls.append(arguments[1]), 1)[1])
    allocator, threads = Allocator(), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        wide = dk.connectivity.random(500, 300, 8, 16, seed=0)
        served_with(
            monkeypatch,
            parallel_for=ctypes.cast(fail, ctypes.c_void_p).value,  # type: ignore[arg-type]
            empty_strided=id(allocator),
        )
        sizes = (256, 500), (wide.nnz,), (2400,), (2400,), (300,)
        operands = [torch.randn(size) for size in sizes]
        kernels.forward(*operands, wide)
        with pytest.raises(RuntimeError, match="torch_parallel_for reported an error"):
            launch(wide, kernels.FORWARD, operands)
    finally:
        torch.set_num_threads(threads)
    assert calls == [2]
    assert len(allocator.made) == 2
    assert allocator.living() == 0
