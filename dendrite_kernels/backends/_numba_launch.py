"""Runs plans on arrays: addresses, scratch memory, torch's threads."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch

from ..structure import Connectivity
from . import _numba_direct, _pool
from ._numba_kernels import Job
from ._numba_plan import Call, Plan, backward_plan, forward_plan

_KEPT_SCRATCH = 1 << 28  # bytes; larger scratch memory is given back at once
_HUGE_PAGE = 1 << 21  # bytes; numpy asks for such pages in arrays of two and more
_KEPT_PLANS = 64  # per connectivity

_ELEMENTS = {
    torch.float32: "float32",
    torch.float64: "float64",
    np.dtype(np.float32): "float32",
    np.dtype(np.float64): "float64",
}


# --- arrays of either kind, torch's or numpy's ---


_SIGNS = torch.empty(0, dtype=torch.int32)  # asking it for more is faster than naming its dtype


def empty(like: Any, *shape: int) -> Any:
    if isinstance(like, torch.Tensor):
        return like.new_empty(*shape)
    return np.empty(shape, like.dtype)


def zeros(like: Any, *shape: int) -> Any:
    if isinstance(like, torch.Tensor):
        return like.new_zeros(shape)
    return np.zeros(shape, like.dtype)


def empty_signs(like: Any, *shape: int) -> Any:
    if isinstance(like, torch.Tensor):
        return _SIGNS.new_empty(*shape)
    return np.empty(shape, np.int32)


def _address(array: Any) -> int:
    return cast(int, array.data_ptr() if isinstance(array, torch.Tensor) else array.ctypes.data)


# --- scratch memory ---


class _Scratch(threading.local):
    """Memory of one Python thread, grown as needed: calls in different threads share none, and a
    call that comes between the phases of another, from a signal handler or a finaliser, takes new.
    """

    kept: tuple[int, np.ndarray[Any, Any]] | None = None

    def take(self, size: int) -> tuple[int, np.ndarray[Any, Any]]:
        """The address of `size` bytes in huge pages, and the memory that they are in."""
        taken, self.kept = self.kept, None
        if taken is None or taken[1].size < size + _HUGE_PAGE:
            memory = np.empty(max(size + _HUGE_PAGE, 2 * _HUGE_PAGE), np.uint8)
            taken = -(-memory.ctypes.data // _HUGE_PAGE) * _HUGE_PAGE, memory
        return taken

    def give(self, taken: tuple[int, np.ndarray[Any, Any]]) -> None:
        if taken[1].size <= _KEPT_SCRATCH:
            self.kept = taken


_scratch = _Scratch()


# --- running ---


def _plan(connectivity: Connectivity, key: tuple[Any, ...], make: Callable[[], Plan]) -> Plan:
    """The plan kept under `key`, or a new one."""
    plans: dict[tuple[Any, ...], Plan] = connectivity.cached("numba", dict)
    plan = plans.get(key)
    if plan is None:
        plan = make()
        if len(plans) >= _KEPT_PLANS:
            plans.clear()
        plans[key] = plan
    return plan


def _run(plan: Plan, slope: float, arrays: dict[str, Any]) -> None:
    job = Job.from_buffer_copy(plan.job)
    job.slope = slope
    for name, array in arrays.items():
        if array is not None:
            setattr(job, name, _address(array))
    taken = _scratch.take(plan.scratch)
    for name, offset in plan.regions:
        setattr(job, name, taken[0] + offset)
    address = ctypes.addressof(job)
    for step in plan.steps:
        for name, value in step.fields:
            setattr(job, name, value)
        _pool.run(step.native, step.tasks, address)
    _scratch.give(taken)


def _call(x: Any, linear: bool) -> Call:
    threads = 1 if _pool.forked() else torch.get_num_threads()
    return Call(x.shape[0], _ELEMENTS[x.dtype], threads, linear)


def forward(
    connectivity: Connectivity, slope: float = 1.0, *, linear: bool, x: Any, **arrays: Any
) -> None:
    """Fill y (and signs) from x and the weights; names as in `Job`."""
    if x.shape[0] == 0:
        return
    call = _call(x, linear)
    plan = _plan(connectivity, (0, *call), lambda: forward_plan(connectivity, call))
    _run(plan, slope, {"x": x, **arrays})
    if isinstance(x, torch.Tensor):
        _numba_direct.serve_forward(connectivity, call, plan)


def backward(
    connectivity: Connectivity, need_x: bool, slope: float = 1.0, *, linear: bool, x: Any,
    **arrays: Any,
) -> None:  # fmt: skip
    """Fill the gradients (dx only if need_x) from everything else; a batch must not be empty."""
    call = _call(x, linear)
    key = (1 + need_x, *call)
    plan = _plan(connectivity, key, lambda: backward_plan(connectivity, call, need_x))
    _run(plan, slope, {"x": x, **arrays})
    if isinstance(x, torch.Tensor):
        _numba_direct.serve_backward(connectivity, call, need_x, plan)
