"""What Python calls to run a plan that is ready: native code from the first instruction.

Checks, allocations and addresses take several times as long in Python as a small layer's
arithmetic. So Numba compiles that as well, into functions of the calling convention that CPython
calls METH_FASTCALL: (self, array of arguments, their number) -> result or null. `_numba_direct.py`
makes Python functions of them and the tables that they read.

Everything is an address or a size, int64. Objects are those of Python's C API, with its rules of
who owns a reference; tensors are seen through the exchange table of DLPack (dlpack.org).
"""

from __future__ import annotations

import ctypes

import numba
import numpy as np
from llvmlite import ir
from numba import carray
from numba.core import cgutils, types

from ._numba_kernels import inline, kernel
from ._numba_token import operation

ABSENT, OPTIONAL, REQUIRED = range(3)  # what an operand may be: None, None or a tensor, a tensor
ALWAYS, ELSE_EMPTY, ELSE_MISSING = range(3)  # an output: made anyhow, or only if the flag is set
BATCH, WORDS = -1, -2  # lengths that depend on the batch: B, and ceil(B / 32)
_MISFIT = -1  # no address
_CPU, _INTEGER, _FLOAT = 1, 0, 2  # DLPack's
_ALIGNMENT = 128  # of scratch memory: two cache lines
_MOST = 8  # operands and outputs


# --- the tables ---


def _table(name, doc, *fields):
    kinds = [(field, ctypes.c_int64) for text in fields for field in text.split()]
    return type(name, (ctypes.Structure,), {"_fields_": kinds, "__doc__": doc})


Lent = _table(
    "Lent",
    "Addresses of what torch and Python lend.",
    "tensor parameter",  # classes whose objects are nothing but tensors
    "is_neg requires_grad",  # the method of a tensor; the name of its property
    "empty_strided int32 float32 float64",  # what allocates, and its dtypes
    "none true false runtime_error pool_failed",
    "borrow get_num_threads parallel_for forked",  # C functions; a bool
)
Layer = _table(
    "Layer",
    "What one operation on one connectivity takes and makes.",
    "lent operands operand_count outputs output_count plans plan_count",
    "job_words slope_word",  # the length of a `Job`, and where it holds the slope
    "accepted",  # whether `launch` is only called with what `accepts` has seen
)
Operand = _table(
    "Operand",
    "One that the first of all shares its length and type with, if not of another.",
    "need rank first second signs",  # ABSENT...; sizes; whether of int32
    "word",  # of a job, where its address goes
)
Output = _table(
    "Output",
    "A tensor to make: size and strides are tuples, size 0 stands for (first, second).",
    "made first second signs size strides word",  # made: ALWAYS...
)
Ready = _table(
    "Ready",
    "A plan, and the calls that it is for.",
    "samples bits threads flags",  # bits of an element; bit i of flags: for a flag of i
    "job scratch tape",  # a `Job` without addresses; bytes; see `run`
)


class View(ctypes.Structure):
    """DLPack's description of a tensor."""

    _fields_ = [
        ("data", ctypes.c_int64), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("rank", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16), ("shape", ctypes.c_int64), ("strides", ctypes.c_int64),
        ("offset", ctypes.c_int64),
    ]  # fmt: skip


# --- memory and calls ---

_INT, _VOID = types.int64, types.void
_I8, _I32, _I64 = (ir.IntType(bits) for bits in (8, 32, 64))


def _pointer(structure):
    """An operation: a typed pointer from an address."""
    kind = types.CPointer(numba.from_dtype(np.dtype(structure)))
    llvm = ir.ArrayType(_I8, ctypes.sizeof(structure)).as_pointer()
    return operation(lambda address: (kind(_INT), lambda b, address: b.inttoptr(address, llvm)))


_lent, _layer, _operand, _output, _ready, _view = map(
    _pointer, (Lent, Layer, Operand, Output, Ready, View)
)


def _place(b, address, index, kind):
    offset = b.mul(index, ir.Constant(_I64, kind.width // 8))
    return b.inttoptr(b.add(address, offset), kind.as_pointer())


def _loader(kind):
    emit = lambda b, address, index: b.zext(b.load(_place(b, address, index, kind)), _I64)  # noqa: E731
    return operation(lambda address, index: (_INT(_INT, _INT), emit))


byte, half, word = map(_loader, (_I8, _I32, _I64))  # the unsigned number address[index]


@operation
def put(address, index, value):
    """address[index] = value, of 8 bytes."""

    def emit(b, address, index, value):
        b.store(b.bitcast(value, _I64), _place(b, address, index, _I64))

    return _VOID(_INT, _INT, value), emit


@operation
def stack(words):
    """Memory until the function returns."""
    kind = ir.ArrayType(_I64, words.literal_value)
    return _INT(words), lambda b, _: b.ptrtoint(cgutils.alloca_once(b, kind), _I64)


def _caller(count):
    """An operation: call the C function at an address, with so many arguments, for its int32."""
    kind = ir.FunctionType(_I32, [_I64] * count).as_pointer()

    def emit(b, function, *arguments):
        return b.sext(b.call(b.inttoptr(function, kind), arguments), _I64)

    return emit


call_one = operation(lambda function, a: (_INT(_INT, _INT), _caller(1)))
call_two = operation(lambda function, a, b: (_INT(_INT, _INT, _INT), _caller(2)))
call_five = operation(
    lambda function, a, b, c, d, e: (_INT(_INT, _INT, _INT, _INT, _INT, _INT), _caller(5))
)


@operation
def do_tasks(function, begin, end, job):
    """Call the native function of a step."""
    kind = ir.FunctionType(ir.VoidType(), [_I64] * 3).as_pointer()

    def emit(b, function, *arguments):
        b.call(b.inttoptr(function, kind), arguments)

    return _VOID(_INT, _INT, _INT, _INT), emit


def _python(name, result, *arguments):
    return types.ExternalFunction(name, result(*arguments))


Py_IncRef = _python("Py_IncRef", _VOID, _INT)
Py_DecRef = _python("Py_DecRef", _VOID, _INT)
PyErr_Clear = _python("PyErr_Clear", _VOID)
PyErr_NoMemory = _python("PyErr_NoMemory", _INT)
PyErr_Occurred = _python("PyErr_Occurred", _INT)
PyErr_SetObject = _python("PyErr_SetObject", _VOID, _INT, _INT)
PyEval_RestoreThread = _python("PyEval_RestoreThread", _VOID, _INT)
PyEval_SaveThread = _python("PyEval_SaveThread", _INT)
PyFloat_AsDouble = _python("PyFloat_AsDouble", types.float64, _INT)
PyLong_AsLongLong = _python("PyLong_AsLongLong", _INT, _INT)
PyLong_FromLongLong = _python("PyLong_FromLongLong", _INT, _INT)
PyMem_RawFree = _python("PyMem_RawFree", _VOID, _INT)
PyMem_RawMalloc = _python("PyMem_RawMalloc", _INT, _INT)
PyObject_CallOneArg = _python("PyObject_CallOneArg", _INT, _INT, _INT)
PyObject_GetAttr = _python("PyObject_GetAttr", _INT, _INT, _INT)
PyObject_Type = _python("PyObject_Type", _INT, _INT)
PyObject_Vectorcall = _python("PyObject_Vectorcall", _INT, _INT, _INT, _INT, _INT)
PyTuple_GetItem = _python("PyTuple_GetItem", _INT, _INT, _INT)
PyTuple_New = _python("PyTuple_New", _INT, _INT)
PyTuple_SetItem = _python("PyTuple_SetItem", types.int32, _INT, _INT, _INT)


# --- operands ---


@inline
def length(first, batch):
    if first == BATCH:
        return batch
    return (batch + 31) // 32 if first == WORDS else first


@kernel
def plain(lent, tensor):
    """Whether only torch's own rules say what is done with the object."""
    kind = PyObject_Type(tensor)
    Py_DecRef(kind)
    return kind in (lent.tensor, lent.parameter)


@kernel
def settled(lent, tensor):
    """Whether the tensor's sign is not still to be flipped; DLPack does not say."""
    pending = PyObject_CallOneArg(lent.is_neg, tensor)
    if pending == 0:
        PyErr_Clear()
        return False
    Py_DecRef(pending)  # a bool: it lives on
    return pending == lent.false


@kernel
def address_of(operand, view, batch, bits):
    """Of the first element of a tensor, contiguous on the CPU, of the operand's size and type."""
    if view.device_type != _CPU or view.rank != operand.rank or view.lanes != 1:
        return _MISFIT
    if operand.signs != 0:
        if view.code != _INTEGER or view.bits != 32:
            return _MISFIT
    elif view.code != _FLOAT or view.bits != bits:
        return _MISFIT
    rows, columns = word(view.shape, 0), 1
    if operand.rank == 2:
        columns = word(view.shape, 1)
    if rows != length(operand.first, batch) or columns != operand.second:
        return _MISFIT
    if view.strides != 0 and rows * columns != 0:
        if rows != 1 and word(view.strides, 0) != columns:
            return _MISFIT
        if columns != 1 and word(view.strides, 1) != 1:
            return _MISFIT
    return view.data + view.offset


@kernel
def take(layer, lent, args, accepting, spare, addresses):
    """Addresses of all operands, 0 for None; returns the batch and the bits of an element, or a
    batch of -1 if one does not fit. accepting: for `accepts`. spare: room for a view.
    """
    operands = carray(_operand(layer.operands), layer.operand_count)
    view = carray(_view(spare), 1)[0]
    batch, bits = -1, 0
    for i in range(layer.operand_count):
        operand, tensor = operands[i], args[i]
        address = 0
        if tensor == lent.none:
            if operand.need == REQUIRED:
                return -1, 0
        else:
            if operand.need == ABSENT or (accepting and not plain(lent, tensor)):
                return -1, 0
            if call_two(lent.borrow, tensor, spare) != 0:
                PyErr_Clear()
                return -1, 0
            if (accepting or layer.accepted == 0) and not settled(lent, tensor):
                return -1, 0
            if i == 0:
                if view.rank != 2 or (view.bits != 32 and view.bits != 64):
                    return -1, 0
                batch, bits = word(view.shape, 0), np.int64(view.bits)
            address = address_of(operand, view, batch, bits)
            if address == _MISFIT:
                return -1, 0
        put(addresses, i, address)
    return batch, bits


@kernel
def plan_for(layer, lent, batch, bits, flag, spare):
    """The plan that is ready for the call, as an index; -1: there is none."""
    if call_one(lent.get_num_threads, spare) != 0:
        return -1
    threads = half(spare, 0)
    plans = carray(_ready(layer.plans), layer.plan_count)
    for i in range(layer.plan_count):
        plan = plans[i]
        if plan.samples == batch and plan.bits == bits and plan.threads == threads:  # noqa: SIM102
            if (plan.flags >> flag) & 1:
                return i
    return -1


# --- outputs ---


@kernel
def new_tensor(lent, output, batch, bits, spare):
    """A new reference to an uninitialised tensor, or null. spare: room for three words."""
    size = output.size
    if size == 0:
        size = PyTuple_New(2)
        if size == 0:
            return 0
        PyTuple_SetItem(size, 0, PyLong_FromLongLong(length(output.first, batch)))
        PyTuple_SetItem(size, 1, PyLong_FromLongLong(output.second))
    put(spare, 0, size)
    put(spare, 1, output.strides)
    dtype = lent.float32 if bits == 32 else lent.float64
    put(spare, 2, lent.int32 if output.signs != 0 else dtype)
    tensor = PyObject_Vectorcall(lent.empty_strided, spare, 3, 0)
    if output.size == 0:
        Py_DecRef(size)
    return tensor


@kernel
def release(objects, count):
    for i in range(count):
        Py_DecRef(word(objects, i))


@kernel
def create(layer, lent, batch, bits, flag, spare, objects, job):
    """Make the outputs and tell the job where they are; returns how many, -1 with an error set."""
    outputs = carray(_output(layer.outputs), layer.output_count)
    view, made = carray(_view(spare), 1)[0], 0
    for i in range(layer.output_count):
        output, samples = outputs[i], batch
        if flag == 0 and output.made != ALWAYS:
            if output.made == ELSE_MISSING:
                continue
            samples = 0
        tensor = new_tensor(lent, output, samples, bits, spare)
        if tensor == 0:
            release(objects, made)
            return -1
        put(objects, made, tensor)
        made += 1
        if call_two(lent.borrow, tensor, spare) != 0:
            release(objects, made)
            return -1
        put(job, output.word, view.data + view.offset)
    return made


@kernel
def packed(objects, count):
    """The only object, or a tuple of them all."""
    if count == 1:
        return word(objects, 0)
    together = PyTuple_New(count)
    if together == 0:
        release(objects, count)
        return 0
    for i in range(count):
        PyTuple_SetItem(together, i, word(objects, i))
    return together


# --- running ---


@kernel
def set_fields(job, tape, base):
    """Words of the job from the tape: their number, then index and value of each, counted from
    `base`. Returns where the tape goes on.
    """
    count = word(tape, 0)
    for i in range(count):
        put(job, word(tape, 1 + 2 * i), base + word(tape, 2 + 2 * i))
    return tape + 8 * (1 + 2 * count)


@kernel
def run(lent, job, tape, scratch):
    """The tape: fields of the job with offsets in `scratch`; the number of steps; the native
    function, the tasks and the fields of each. False, with an error set, if the pool fails.
    """
    state, done = PyEval_SaveThread(), True
    tape = set_fields(job, tape, scratch)
    steps = word(tape, 0)
    tape += 8
    for _ in range(steps):
        native, tasks = word(tape, 0), word(tape, 1)
        tape = set_fields(job, tape + 16, 0)
        if tasks == 1 or byte(lent.forked, 0) != 0:
            do_tasks(native, 0, tasks, job)
        elif call_five(lent.parallel_for, 0, tasks, 1, native, job) != 0:
            done = False
            break
    PyEval_RestoreThread(state)
    if not done:
        PyErr_SetObject(lent.runtime_error, lent.pool_failed)
    return done


# --- the functions that Python calls ---

FASTCALL = types.int64(_INT, types.CPointer(_INT), _INT)
_VIEW = ctypes.sizeof(View) // 8


@inline
def layer_of(self):
    """self: a tuple whose first item is the address of a `Layer`."""
    return carray(_layer(PyLong_AsLongLong(PyTuple_GetItem(self, 0))), 1)[0]


@inline
def shared(constant):
    """A new reference."""
    Py_IncRef(constant)
    return constant


def accepts(self, args, count):
    """accepts(*operands): None unless `launch` takes these operands as they are, all of torch's own
    classes, else whether one of them requires a gradient.
    """
    layer = layer_of(self)
    lent = carray(_lent(layer.lent), 1)[0]
    spare, addresses = stack(_VIEW), stack(_MOST)
    if count != layer.operand_count:
        return shared(lent.none)
    batch, bits = take(layer, lent, args, True, spare, addresses)
    if batch < 0 or plan_for(layer, lent, batch, bits, 0, spare) < 0:
        return shared(lent.none)
    for i in range(count):
        if args[i] != lent.none:
            required = PyObject_GetAttr(args[i], lent.requires_grad)
            if required == 0:
                return 0
            Py_DecRef(required)  # a bool: it lives on
            if required == lent.true:
                return shared(lent.true)
    return shared(lent.false)


@kernel
def outcome(layer, lent, args, plan, flag, spare, addresses, job):
    """Of a plan on operands at these addresses: a new reference, or null with an error set."""
    objects = stack(_MOST)
    for i in range(layer.job_words):
        put(job, i, word(plan.job, i))
    put(job, layer.slope_word, PyFloat_AsDouble(args[layer.operand_count]))
    operands = carray(_operand(layer.operands), layer.operand_count)
    for i in range(layer.operand_count):
        put(job, operands[i].word, word(addresses, i))
    made = create(layer, lent, plan.samples, plan.bits, flag, spare, objects, job)
    if made < 0:
        return 0
    end = job + 8 * layer.job_words
    if not run(lent, job, plan.tape, (end + _ALIGNMENT - 1) & -_ALIGNMENT):
        release(objects, made)
        return 0
    return packed(objects, made)


def launch(self, args, count):
    """launch(*operands, slope, flag): the output or a tuple of them; None if the operands do not
    fit, the slope is negative or NaN, or no plan is ready.
    """
    layer = layer_of(self)
    lent = carray(_lent(layer.lent), 1)[0]
    spare, addresses = stack(_VIEW), stack(_MOST)
    operands = layer.operand_count
    if count != operands + 2:
        return shared(lent.none)
    batch, bits = take(layer, lent, args, False, spare, addresses)
    slope, flag = PyFloat_AsDouble(args[operands]), int(args[operands + 1] == lent.true)
    if PyErr_Occurred() != 0:
        return 0
    if batch < 0 or not slope >= 0:
        return shared(lent.none)
    found = plan_for(layer, lent, batch, bits, flag, spare)
    if found < 0:
        return shared(lent.none)
    plan = carray(_ready(layer.plans), layer.plan_count)[found]
    job = PyMem_RawMalloc(8 * layer.job_words + _ALIGNMENT + plan.scratch)
    if job == 0:
        return PyErr_NoMemory()
    result = outcome(layer, lent, args, plan, flag, spare, addresses, job)
    PyMem_RawFree(job)
    return result
