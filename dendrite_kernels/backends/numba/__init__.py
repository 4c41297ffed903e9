"""The Numba backend: the whole package on machines without a C++ compiler or a wheel.

Kernels are compiled for the host when first called and kept in Numba's cache. They run on torch's
own threads (`_pool.py`): no Numba threading layer is ever started and no thread setting changed.
Numba is a core dependency, not an extra: `pip install` must be all that users without a compiler
need. Importing this folder does not import Numba; the first call does.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import sys
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .. import _pool
from ..protocol import Gradients, Maybe, Operands

if TYPE_CHECKING:
    from .plan import Plan

STORES_LOW = False
ROUNDS_X = False
STEPS = False

_OLDEST = (0, 61)
_ELEMENTS = {torch.float32: "float32", torch.float64: "float64"}
_SIGN_BITS = 32  # samples per word of `signs`
_KEPT_SCRATCH = 1 << 28  # bytes; larger scratch memory is given back at once
_HUGE_PAGE = 1 << 21  # bytes; numpy asks for such pages in arrays of two and more
_KEPT_PLANS = 64  # per connectivity


@functools.cache
def unavailable() -> str | None:
    """Why this backend cannot serve, or None. Does not import Numba."""
    try:
        version = importlib.metadata.version("numba")
    except importlib.metadata.PackageNotFoundError:
        return "numba is not installed"
    found = tuple(int(part) for part in version.split(".")[:2])
    if found < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        return f"Expected numba >= {oldest}, got {version}"
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return "NUMBA_DISABLE_JIT is set"
    if sys.byteorder != "little":
        return "sign bits are laid out for little-endian machines"
    try:
        _pool.address("torch_parallel_for")
    except RuntimeError as error:
        return str(error)
    return None


def info() -> dict[str, Any]:
    """Vector width, threads, versions and the state of the cache. Imports Numba."""
    from . import tasks, vectors

    return {
        "isa": vectors.isa(),
        "threads": _threads(),
        "numba": importlib.metadata.version("numba"),
        "llvmlite": importlib.metadata.version("llvmlite"),
        "cache": tasks.cache_state(),
    }


def _threads() -> int:
    return 1 if _pool.forked() else torch.get_num_threads()


# --- the pair; every tensor is checked before its address is taken ---


def forward(
    x: torch.Tensor, operands: Operands, save_signs: bool, round_x: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, rows = _check_layer(x, operands)
    linear = operands.cable_weight is None
    y = x.new_empty(batch, rows if linear else operands.connectivity.num_somas)
    words = -(-batch // _SIGN_BITS) if save_signs else 0
    signs = x.new_empty(words, rows, dtype=torch.int32)
    _run(None, operands, x, y=y, signs=signs if save_signs else None)
    return y, signs


def backward(
    grad: torch.Tensor, x: torch.Tensor, y: Maybe, signs: Maybe, operands: Operands, need_x: bool
) -> Gradients:
    connectivity, linear = operands.connectivity, operands.cable_weight is None
    batch, rows = _check_layer(x, operands)
    outputs = rows if linear else connectivity.num_somas
    _check("grad", grad, x, (batch, outputs))
    if not linear:
        _check("y", y, x, (batch, outputs))
        _check("signs", signs, x, (-(-batch // _SIGN_BITS), rows), torch.int32)
    new = x.new_empty if batch else x.new_zeros  # no sample, no kernel: gradients are zero
    dx = x.new_empty(batch if need_x else 0, connectivity.in_features)
    dw, dbd = new(connectivity.nnz), new(rows)
    dc, dbs = new(0 if linear else rows), new(0 if linear else outputs)
    _run(
        need_x, operands, x, grad=grad, y=y, signs=signs, dx=dx, dw=dw, d_dendrite_bias=dbd,
        d_cable=dc, d_soma_bias=dbs,
    )  # fmt: skip
    return dx, dw, dbd, dc, dbs


def _check_layer(x: torch.Tensor, operands: Operands) -> tuple[int, int]:
    """B and R, if x and the parameters fit each other."""
    weight, dendrite_bias, cable, soma_bias, connectivity, *slopes = operands
    if x.dtype not in _ELEMENTS:
        raise TypeError(f"Expected x of dtype float32 or float64, got {_name(x.dtype)}")
    if not all(slope >= 0 for slope in slopes):
        raise ValueError(f"Expected slopes >= 0, got {slopes}")
    rows, batch = connectivity.num_dendrites, x.shape[0] if x.dim() else 0
    _check("x", x, x, (batch, connectivity.in_features))
    _check("synapse_weight", weight, x, (connectivity.nnz,))
    _check("dendrite_bias", dendrite_bias, x, (rows,), optional=True)
    _check("cable_weight", cable, x, (rows,), optional=True)
    _check("soma_bias", soma_bias, x, (connectivity.num_somas,), optional=True)
    return batch, rows


def _check(
    name: str, tensor: Maybe, x: torch.Tensor, shape: tuple[int, ...],
    dtype: torch.dtype | None = None, optional: bool = False,
) -> None:  # fmt: skip
    """That kernels can read `tensor`: a plain CPU tensor of this shape, and of x's dtype if not of
    another.
    """
    if tensor is None and optional:
        return
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"Expected {name} to be a torch.Tensor, got {type(tensor).__name__}")
    dtype = dtype or x.dtype
    if tensor.dtype != dtype:
        raise TypeError(f"Expected {name} of dtype {_name(dtype)}, got {_name(tensor.dtype)}")
    if tensor.shape != shape:
        raise ValueError(f"Expected {name} of shape {list(shape)}, got {list(tensor.shape)}")
    if not tensor.is_cpu or tensor.layout != torch.strided:
        raise TypeError(
            f"Expected {name} to be a dense CPU tensor, got {tensor.layout} on {tensor.device}"
        )
    if tensor.is_neg():
        raise ValueError(f"Expected {name} to hold its signs, got a lazily negated tensor")
    if not tensor.is_contiguous():
        raise ValueError(f"Expected {name} to be contiguous in row-major order, got other strides")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- running a plan: addresses, scratch memory, torch's threads ---


class _Scratch(threading.local):
    """Memory of one Python thread, grown as needed: calls in different threads share none, and a
    call that comes between the phases of another, from a signal handler or a finalizer, takes new.
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


def _plan(need_x: bool | None, operands: Operands, x: torch.Tensor) -> Plan:
    """The plan kept for such calls, or a new one; need_x None: of forward."""
    connectivity = operands.connectivity
    call = x.shape[0], _ELEMENTS[x.dtype], _threads(), operands.cable_weight is None
    plans: dict[Any, Plan] = connectivity.cached("numba", dict)
    found = plans.get((need_x, call))
    if found is None:
        from . import plan  # imports Numba

        if need_x is None:
            found = plan.forward_plan(connectivity, plan.Call(*call))
        else:
            found = plan.backward_plan(connectivity, plan.Call(*call), need_x)
        if len(plans) >= _KEPT_PLANS:
            plans.clear()
        plans[need_x, call] = found
    return found


def _run(need_x: bool | None, operands: Operands, x: torch.Tensor, **arrays: Maybe) -> None:
    """Run forward (need_x None) or backward on tensors with the names of `Job`'s fields."""
    if x.shape[0] == 0:
        return
    plan = _plan(need_x, operands, x)
    job = type(plan.job).from_buffer_copy(plan.job)
    job.slope, job.soma_slope = operands.negative_slope, operands.soma_slope
    layer = zip(("weight", "dendrite_bias", "cable", "soma_bias"), operands[:4], strict=True)
    for name, array in (("x", x), *layer, *arrays.items()):
        if array is not None:
            setattr(job, name, array.data_ptr())
    taken = _scratch.take(plan.scratch)
    for name, offset in plan.regions:
        setattr(job, name, taken[0] + offset)
    address = ctypes.addressof(job)
    for native, job.tasks in plan.steps:
        _pool.run(native, job.tasks, address)
    _scratch.give(taken)
