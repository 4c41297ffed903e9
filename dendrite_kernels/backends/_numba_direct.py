"""Which calls the native functions of `_numba_native.py` serve: their tables, per connectivity.

A plan serves them once the long way has made it; it stays as long as its connectivity. Calls that
no plan here fits, and arrays of numpy, take the long way every time.
"""

from __future__ import annotations

import ctypes
import functools
import sysconfig
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..structure import Connectivity
from . import _numba_native as native
from . import _pool
from ._numba_entry import compiled
from ._numba_kernels import Job
from ._numba_plan import Call, Fields, Plan
from .cpp import empty_strided
from .numba import BACKWARD, BACKWARD_ROWS, FORWARD, FORWARD_ROWS

# For one operation on one connectivity; tables grow under Python's lock, where there is one.
_MOST_PLANS = 0 if sysconfig.get_config_var("Py_GIL_DISABLED") else 64
_MOST_SCRATCH = 1 << 20  # bytes; a call that needs more lasts much longer than the long way
_BITS = {"float32": 32, "float64": 64}
_FASTCALL = 0x80  # METH_FASTCALL
_EITHER_FLAG = 0b11

_lock = threading.Lock()


# --- what torch lends ---


class _Exchange(ctypes.Structure):
    """The head of DLPack's exchange table, version 1."""

    _fields_ = [
        ("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("previous", ctypes.c_void_p),
        ("allocate", ctypes.c_void_p), ("from_object", ctypes.c_void_p),
        ("to_object", ctypes.c_void_p), ("borrow", ctypes.c_void_p),
    ]  # fmt: skip


def _borrow() -> int:
    """Address of the function that fills a view of a tensor."""
    address = ctypes.pythonapi.PyCapsule_GetPointer
    address.argtypes, address.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p
    capsule = torch.Tensor.__dlpack_c_exchange_api__
    table = _Exchange.from_address(address(capsule, b"dlpack_exchange_api"))
    while table.major > 1 and table.previous:
        table = _Exchange.from_address(table.previous)
    if table.major != 1 or not table.borrow:
        raise RuntimeError("Expected torch to offer version 1 of DLPack's exchange, got none")
    found: int = table.borrow
    return found


_OBJECTS = {
    "tensor": torch.Tensor,
    "parameter": torch.nn.Parameter,
    "is_neg": torch.Tensor.is_neg,
    "requires_grad": "requires_grad",
    "empty_strided": empty_strided,
    "int32": torch.int32,
    "float32": torch.float32,
    "float64": torch.float64,
    "none": None,
    "true": True,
    "false": False,
    "runtime_error": RuntimeError,
    "pool_failed": "torch_parallel_for reported an error",
}


@functools.cache
def _lent() -> ctypes.Structure:
    lent: ctypes.Structure = native.Lent(
        **{name: id(thing) for name, thing in _OBJECTS.items()},
        borrow=_borrow(),
        get_num_threads=_pool.address("torch_get_num_threads"),
        parallel_for=_pool.address("torch_parallel_for"),
        forked=_pool.forked_address(),
    )
    return lent


# --- functions ---


class _Definition(ctypes.Structure):
    """CPython's PyMethodDef."""

    _fields_ = [
        ("name", ctypes.c_char_p), ("function", ctypes.c_void_p), ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    ]  # fmt: skip


@functools.cache
def _definition(name: str) -> _Definition:
    source = getattr(native, name)
    address = compiled(source, native.FASTCALL).address
    return _Definition(name.encode(), address, _FASTCALL, source.__doc__.encode())


def _function(name: str, owned: tuple[Any, ...]) -> Callable[..., Any]:
    """A Python function of native code, whose self is `owned`."""
    make = ctypes.pythonapi.PyCMethod_New
    make.argtypes = [ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p, ctypes.c_void_p]
    make.restype = ctypes.py_object
    made: Callable[..., Any] = make(ctypes.addressof(_definition(name)), owned, None, None)
    return made


# --- tables ---


def _word(field: str) -> int:
    offset: int = getattr(Job, field).offset
    return offset // 8


_Output = tuple[str, tuple[int, ...], int, bool]


def _operand(field: str, *size: int, need: int = native.REQUIRED, signs: bool = False) -> Any:
    first, second = size if len(size) == 2 else (*size, 1)
    return native.Operand(need, len(size), first, second, signs, _word(field))


def _output(field: str, *size: int, made: int = native.ALWAYS, signs: bool = False) -> _Output:
    return field, size, made, signs


def _tape(plan: Plan) -> Any:
    """What `_numba_native.run` reads."""

    def fields(named: Fields) -> Iterable[int]:
        return len(named), *(n for name, value in named for n in (_word(name), value))

    words = [*fields(plan.regions), len(plan.steps)]
    for step in plan.steps:
        words += [step.native, step.tasks, *fields(step.fields)]
    return (ctypes.c_int64 * len(words))(*words)


class Direct:
    """One operation on one connectivity.

    accepts(*operands): whether one of them requires a gradient, if `launch` takes them as they are
    and they are of torch's own classes; else None.
    launch(*operands, slope, flag): the output, or a tuple of outputs; None if something does not
    fit or no plan is ready. If `accepted`, only operands that `accepts` takes may be given.
    """

    def __init__(self, operands: list[Any], outputs: list[_Output], *, accepted: bool) -> None:
        self._known: set[tuple[Call, int]] = set()
        self._kept: list[Any] = []  # what the tables lead to
        self._plans = (native.Ready * _MOST_PLANS)()
        taken = (native.Operand * len(operands))(*operands)
        made = (native.Output * len(outputs))(*map(self._describe, outputs))
        self._layer = native.Layer(
            lent=ctypes.addressof(_lent()),
            operands=ctypes.addressof(taken), operand_count=len(operands),
            outputs=ctypes.addressof(made), output_count=len(outputs),
            plans=ctypes.addressof(self._plans),
            job_words=ctypes.sizeof(Job) // 8, slope_word=_word("slope"),
            accepted=accepted,
        )  # fmt: skip
        owned = (ctypes.addressof(self._layer), self._layer, taken, made, self._plans, self._kept)
        self.accepts = _function("accepts", owned)
        self.launch = self.forward = _function("launch", owned)

    def _describe(self, output: _Output) -> Any:
        field, size, made, signs = output
        strides = (size[1], 1) if len(size) == 2 else (1,)
        self._kept += [size, strides]
        fixed = id(size) if min(size) >= 0 else 0
        first, second = size if len(size) == 2 else (*size, 1)
        return native.Output(made, first, second, signs, fixed, id(strides), _word(field))

    def add(self, call: Call, flags: int, plan: Plan) -> None:
        """Serve such calls from now on, if their flag is among the bits of `flags`."""
        key = call, flags
        if key in self._known or plan.scratch > _MOST_SCRATCH:
            return
        with _lock:
            count = self._layer.plan_count
            if key in self._known or count == _MOST_PLANS:
                return
            job, tape = ctypes.create_string_buffer(plan.job, len(plan.job)), _tape(plan)
            self._known.add(key)
            self._kept += [job, tape]
            self._plans[count] = native.Ready(
                call.batch, _BITS[call.element], call.threads, flags,
                ctypes.addressof(job), plan.scratch, ctypes.addressof(tape),
            )  # fmt: skip
            self._layer.plan_count = count + 1


# --- the operations ---


def serve_forward(connectivity: Connectivity, call: Call, plan: Plan) -> None:
    """Let the plan serve such calls directly from now on."""
    key, make = (FORWARD_ROWS, _forward_rows) if call.linear else (FORWARD, _forward)
    connectivity.cached(key, lambda: make(connectivity)).add(call, _EITHER_FLAG, plan)


def serve_backward(connectivity: Connectivity, call: Call, need_x: bool, plan: Plan) -> None:
    key, make = (BACKWARD_ROWS, _backward_rows) if call.linear else (BACKWARD, _backward)
    connectivity.cached(key, lambda: make(connectivity)).add(call, 1 << need_x, plan)


# The flag of forward: save signs. That of backward: make dx, else it is empty.


def _forward(connectivity: Connectivity) -> Direct:
    """Of x, synapse_weight, dendrite_bias, cable_weight, soma_bias."""
    rows, somas = connectivity.num_dendrites, connectivity.num_somas
    operands = [
        _operand("x", native.BATCH, connectivity.in_features),
        _operand("weight", connectivity.nnz),
        _operand("dendrite_bias", rows, need=native.OPTIONAL),
        _operand("cable", rows),
        _operand("soma_bias", somas, need=native.OPTIONAL),
    ]
    outputs = [
        _output("y", native.BATCH, somas),
        _output("signs", native.WORDS, rows, made=native.ELSE_MISSING, signs=True),
    ]
    return Direct(operands, outputs, accepted=True)


def _forward_rows(connectivity: Connectivity) -> Direct:
    """Of x, weight, bias, None, None."""
    rows = connectivity.num_dendrites
    operands = [
        _operand("x", native.BATCH, connectivity.in_features),
        _operand("weight", connectivity.nnz),
        _operand("dendrite_bias", rows, need=native.OPTIONAL),
        _operand("cable", 0, need=native.ABSENT),
        _operand("soma_bias", 0, need=native.ABSENT),
    ]
    return Direct(operands, [_output("y", native.BATCH, rows)], accepted=True)


def _backward(connectivity: Connectivity) -> Direct:
    """Of grad, x, y, signs, synapse_weight, dendrite_bias, cable_weight."""
    rows, somas = connectivity.num_dendrites, connectivity.num_somas
    features, nnz = connectivity.in_features, connectivity.nnz
    operands = [
        _operand("grad", native.BATCH, somas),
        _operand("x", native.BATCH, features),
        _operand("y", native.BATCH, somas),
        _operand("signs", native.WORDS, rows, signs=True),
        _operand("weight", nnz),
        _operand("dendrite_bias", rows, need=native.OPTIONAL),
        _operand("cable", rows),
    ]
    outputs = [
        _output("dx", native.BATCH, features, made=native.ELSE_EMPTY),
        _output("dw", nnz),
        _output("d_dendrite_bias", rows),
        _output("d_cable", rows),
        _output("d_soma_bias", somas),
    ]
    return Direct(operands, outputs, accepted=False)


def _backward_rows(connectivity: Connectivity) -> Direct:
    """Of grad, x, weight."""
    rows, features = connectivity.num_dendrites, connectivity.in_features
    operands = [
        _operand("grad", native.BATCH, rows),
        _operand("x", native.BATCH, features),
        _operand("weight", connectivity.nnz),
    ]
    outputs = [
        _output("dx", native.BATCH, features, made=native.ELSE_EMPTY),
        _output("dw", connectivity.nnz),
        _output("d_dendrite_bias", rows),
    ]
    return Direct(operands, outputs, accepted=False)
