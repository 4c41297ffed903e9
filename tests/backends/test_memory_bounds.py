"""Where kernels write and read: in memory between pages that may not be touched."""

from __future__ import annotations

import ctypes
import importlib
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dendrite_kernels as dk
from dendrite_kernels.backends import _order
from dendrite_kernels.backends.protocol import Operands
from tests import oracle
from tests.backends.test_extension import EXTENSION, PLAN_ARRAYS, needs_extension, network
from tests.processes import output


class Guarded:
    """Memory between two pages that may not be touched."""

    def __init__(self, size: int, at_end: bool) -> None:
        page = mmap.PAGESIZE
        inner = max(1, -(-size // page)) * page
        self.memory = mmap.mmap(-1, inner + 2 * page)
        self.offset = page + (inner - size if at_end else 0)
        libc = ctypes.CDLL(None, use_errno=True)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        for edge in (start, start + page + inner):
            assert libc.mprotect(ctypes.c_void_p(edge), ctypes.c_size_t(page), 0) == 0

    def array(self, dtype: Any, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        count = int(np.prod(shape, dtype=np.int64))
        return np.frombuffer(self.memory, dtype, count, self.offset).reshape(shape)


def guard(values: np.ndarray[Any, Any], at_end: bool) -> np.ndarray[Any, Any]:
    copied = Guarded(values.nbytes, at_end).array(values.dtype, values.shape)
    copied[...] = values
    return copied


GUARDED_RUN = """
from tests.backends import test_memory_bounds
for at_end in (True, False):
    test_memory_bounds.run_guarded(at_end)
print(test_memory_bounds.EXTENSION.isa())
"""


@needs_extension
@pytest.mark.parametrize("isa", [] if EXTENSION is None else EXTENSION.supported_isas())
def test_kernels_of_each_instruction_set(isa: str) -> None:
    """The environment chooses them. They are exact, and stay within their arrays: each array of a
    call lies against a page that may not be touched, where a stray load or store ends the process.
    """
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs Linux")
    assert output(GUARDED_RUN, DENDRITE_KERNELS_ISA=isa).strip() == isa


@pytest.mark.skipif(
    not dk.backend_info()["numba"]["available"], reason="the Numba backend is unavailable"
)
def test_numba_kernels_stay_within_what_they_are_given() -> None:
    output("from tests.backends import test_memory_bounds; test_memory_bounds.run_numba_guarded()")


def run_numba_guarded() -> None:
    kernels = importlib.import_module("dendrite_kernels.backends.numba")
    for c in (network(), dk.connectivity.random(17, 40, 30, 5, seed=0)):
        for batch in (1, 33, 70):
            for at_end in (True, False):

                def draw(*shape: int, end: bool = at_end) -> Tensor:
                    return torch.from_numpy(guard(torch.randn(shape).numpy(), end))

                x, w, bd = draw(batch, c.in_features), draw(c.nnz), draw(c.num_dendrites)
                cable, bs = draw(c.num_dendrites), draw(c.num_somas)
                layer = Operands(w, bd, cable, bs, c, 0.1, 0.1)
                linear = Operands(w, bd, None, None, c, 1.0, 1.0)
                y, signs = kernels.forward(x, layer, True, False)
                y, signs = (torch.from_numpy(guard(t.numpy(), at_end)) for t in (y, signs))
                grad, grad_u = draw(batch, c.num_somas), draw(batch, c.num_dendrites)
                for need_x in (True, False):
                    kernels.backward(grad, x, y, signs, layer, need_x)
                    kernels.backward(grad_u, x, None, None, linear, need_x)
                kernels.forward(x, linear, False, False)


def run_guarded(at_end: bool) -> None:
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    dk.use_backend("cpp")
    _order._MANY = 1  # so few dendrites have an order, too
    networks = [
        dk.connectivity.random(30, 10, 4, 6, seed=0),
        dk.connectivity.random(33, 5, 3, 16, constant_fan_in=True, seed=0),
        dk.connectivity.random(3, 1, 1, 1, seed=0),
        dk.connectivity.random(17, 40, 30, 5, seed=0),  # two blocks
        dk.connectivity.random(70_000, 3, 2, 8, seed=0),  # wide columns
        dk.connectivity.local_receptive_fields((9, 7), 70, 3, 16, seed=0),  # an order
        dk.Connectivity.from_mask(rng.random((40, 61)) < 0.2, soma_ptr=[0, 0, 1, 7, 7, 36, 40]),
        dk.Connectivity.from_csr([0, 0, 0, 0], [], 5, soma_ptr=[0, 2, 3]),
    ]
    for c in networks:
        for batch in (1, 32, 33, 70) if c.in_features < 70_000 else (33,):
            for dtype in (torch.float32, torch.float64):
                check_guarded(c, batch, dtype, at_end)


def check_guarded(c: dk.Connectivity, batch: int, dtype: torch.dtype, at_end: bool) -> None:
    """Both operations, both ways of backward, on two threads."""

    def fenced(tensor: Tensor) -> Tensor:
        return torch.from_numpy(guard(tensor.numpy(), at_end))

    def draw(*shape: int) -> Tensor:
        return fenced(torch.randn(shape, dtype=dtype))

    def blank(*shape: int) -> Tensor:
        return fenced(torch.full(shape, torch.nan, dtype=dtype))

    plan = c.transposed
    topology, ordered, ordered_rows = (
        EXTENSION.Topology(
            c.in_features,
            guard(c.crow_indices.numpy(), at_end),
            guard(c.columns, at_end),
            guard(c.soma_ptr.numpy(), at_end),
            c.fan_in or 0,
        )
        for _ in range(3)
    )
    for net, order in ((ordered, _order.by_centre(c)), (ordered_rows, _order.rows_by_centre(c))):
        if order is not None:
            net.set_order(*(guard(a, at_end) if isinstance(a, np.ndarray) else a for a in order))
    arrays = [getattr(plan, name) for name in PLAN_ARRAYS]
    topology.set_transposed(plan.block_rows, plan.group, *(guard(a, at_end) for a in arrays))
    x, w, bd = draw(batch, c.in_features), draw(c.nnz), draw(c.num_dendrites)
    cable, bs, grad = draw(c.num_dendrites), draw(c.num_somas), draw(batch, c.num_somas)
    y, words = blank(batch, c.num_somas), (batch + 31) // 32
    signs = fenced(torch.full((words, c.num_dendrites), -1, dtype=torch.int32))
    dx, dw, dbd = blank(batch, c.in_features), blank(c.nnz), blank(c.num_dendrites)
    dc, dbs = blank(c.num_dendrites), blank(c.num_somas)

    def run(x: Tensor, y: Tensor, grad: Tensor, dx: Tensor, round_x: bool = False) -> None:
        for net, wanted in ((topology, dx), (ordered, None)):
            EXTENSION.forward(net, x, w, bd, cable, bs, 0.1, 0.1, round_x, y, signs, 2)
            EXTENSION.backward(
                net, grad, x, y, signs, w, bd, cable, 0.1, 0.1, wanted, dw, dbd, dc, dbs, 2
            )

    if dtype == torch.float32:
        check_low_precision(fenced, run, [x, y, grad, dx])
    run(x, y, grad, dx)
    leaves = [t.double().requires_grad_() for t in (x, w, bd, cable, bs)]
    function: Any = oracle.dendritic_layer
    exact = function(*leaves, c, 0.1)
    gradients = torch.autograd.grad(exact, leaves, grad.double())
    found = oracle.errors([y, dx, dw, dbd, dc, dbs], [exact.detach(), *gradients])
    assert max(found) < (1e-5 if dtype == torch.float32 else 1e-12), (c, batch, found)
    u, grad_u = blank(batch, c.num_dendrites), draw(batch, c.num_dendrites)
    EXTENSION.forward(topology, x, w, bd, None, None, 1.0, 1.0, False, u, None, 2)
    u_in_order = blank(batch, c.num_dendrites)
    EXTENSION.forward(ordered_rows, x, w, bd, None, None, 1.0, 1.0, False, u_in_order, None, 2)
    assert torch.equal(u, u_in_order)
    for wanted in (dx, None):
        EXTENSION.backward(
            topology, grad_u, x, None, None, w, None, None, 1.0, 1.0, wanted, dw, dbd, None,
            None, 2,
        )  # fmt: skip
    linear: Any = oracle.sparse_linear
    exact = linear(*leaves[:3], c)
    gradients = torch.autograd.grad(exact, leaves[:3], grad_u.double())
    found = oracle.errors([u, dx, dw, dbd], [exact.detach(), *gradients])
    assert max(found) < (1e-5 if dtype == torch.float32 else 1e-12), (c, batch, found)


def check_low_precision(
    fenced: Callable[[Tensor], Tensor], run: Callable[..., None], samples: list[Tensor]
) -> None:
    """Samples of 16 bits give what the same numbers in float32 give, rounded; samples: x, y, grad,
    dx."""
    for low in (torch.bfloat16, torch.float16):
        # numpy knows no bfloat16: fence the bits
        narrow = [fenced(t.to(low).view(torch.int16)).view(low) for t in samples]
        run(*narrow)
        wide = [fenced(t.float()) for t in narrow]
        run(*wide)
        assert torch.equal(narrow[1], wide[1].to(low))
        assert torch.equal(narrow[3], wide[3].to(low))
    x, y, grad, dx = samples
    rounded = fenced(x.bfloat16().float()), fenced(y.clone()), grad, dx
    run(*rounded)
    run(x, y, grad, dx, round_x=True)
    assert torch.equal(y, rounded[1])
