"""LLVM vector types for Numba, and the operations that kernels call: all that knows LLVM.

Array code in Numba leaves half of the speed to LLVM's auto-vectorizer: it keeps sums in memory,
uses half of AVX-512's width and cannot put the sums of four synapses into one register. LLVM itself
has vectors of any length as plain values, `<32 x float>`, with arithmetic, comparison, `select` and
`shufflevector` on them, on every machine: it splits a wide one over as many registers as it takes.
Numba only lacks a type for such a value. So this file has

    Spec        what a kernel is compiled for: an argument that has no value at run time
    Vector      a value per sample of a tile, passed and returned like a float
    emitters    functions of an LLVM builder `b` that write the few instructions they name: `_fma`
    operations  emitters that kernels may call

Memory is raw: an address is an int64, an index counts items of the kind read there, nothing is
bounds-checked. x86 moves lanes cheaply within units of 16 bytes, and whole units; shuffles keep to
these two, and other machines compile them as well as any. Nothing here knows dendrites.
"""

from __future__ import annotations

import functools
import inspect
import os
import platform
from dataclasses import dataclass, replace

import llvmlite.binding
import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.imputils import lower_constant
from numba.extending import intrinsic, models, register_model, typeof_impl

ISA_BITS = {"base": 128, "neon": 128, "avx2": 256, "avx512": 512}  # of a vector register
_NEEDS = {"avx512": ("avx512f", "avx512dq", "avx512bw", "avx512vl"), "avx2": ("avx2", "fma")}


@functools.cache
def isa() -> str:
    """Which vector width kernels are compiled for: base, avx2, avx512 or neon.

    The host's best, or DENDRITE_KERNELS_ISA. That variable only chooses the width: within it LLVM
    still uses every instruction of the host (NUMBA_CPU_NAME and NUMBA_CPU_FEATURES limit those).

    Raises RuntimeError if the host does not have what the variable asks for.
    """
    listed = numba.config.CPU_FEATURES  # type: ignore[attr-defined]
    if listed is None:
        features = dict(llvmlite.binding.get_host_cpu_features())
    else:
        features = {item[1:]: item[0] == "+" for item in listed.split(",") if item}
    usable = [name for name, parts in _NEEDS.items() if all(map(features.get, parts))] + ["base"]
    if platform.machine().lower() in ("aarch64", "arm64"):
        usable.insert(0, "neon")  # every such machine has it
    chosen = os.environ.get("DENDRITE_KERNELS_ISA") or usable[0]
    if chosen not in usable:
        raise RuntimeError(f"Expected DENDRITE_KERNELS_ISA among {usable}, got {chosen!r}")
    return chosen


@dataclass(frozen=True)
class Spec:
    """What one compiled kernel is made for."""

    element: str  # "float32" or "float64"
    column: str  # type of column indices, "uint16" or "int32"
    lanes: int  # samples in a tile: 8 to 64
    width: int  # lanes of one vector register
    linear: bool  # plain sparse rows: no nonlinearity, no somas
    build: str  # fingerprint of the sources, so that no cache outlives them

    @property
    def scalar(self):
        """LLVM's type of an element."""
        return _FLOATS[self.element]

    @property
    def vector(self):
        return ir.VectorType(self.scalar, self.lanes)

    @property
    def register(self):
        return ir.VectorType(self.scalar, self.width)


_I1, _I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_INTEGERS = {"uint16": _I16, "int32": _I32, "int64": _I64}
_FLOATS = {"float32": ir.FloatType(), "float64": ir.DoubleType()}
_BYTES = {_I16: 2, _I32: 4, _I64: 8, ir.FloatType(): 4, ir.DoubleType(): 8}
_UNIT = 16  # bytes
_CACHE_LINE = 64  # bytes
_WORD = 32  # sign bits per word


# --- what Numba has to know ---


class Known(types.Type):
    """Numba's type of one particular `Spec`."""

    def __init__(self, spec):
        self.spec = spec
        super().__init__(name=repr(spec))


class Vector(types.Type):
    """Numba's type of vectors of one LLVM type."""

    def __init__(self, llvm):
        self.llvm = llvm
        super().__init__(name=f"Vector({llvm})")


register_model(Known)(models.OpaqueModel)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    """A value of this type is its LLVM value: it lives in registers."""

    def __init__(self, manager, kind):
        super().__init__(manager, kind, kind.llvm)


@typeof_impl.register(Spec)
def _known(spec, context):
    return Known(spec)


@lower_constant(Known)
def _no_value(context, builder, kind, value):
    return context.get_dummy_value()


_SCALARS = {
    types.boolean: _I1,
    types.int64: _I64,
    types.float32: ir.FloatType(),
    types.float64: ir.DoubleType(),
}


def _kind_of(result):
    """Numba's type of what an emitter returned."""
    if result is None:
        return types.void
    if isinstance(result, Spec):
        return Known(result)
    if isinstance(result, tuple):
        return types.Tuple([_kind_of(item) for item in result])
    scalars = {llvm: kind for kind, llvm in _SCALARS.items()}
    return scalars.get(result.type) or Vector(result.type)


def _argument(kind, value):
    """What an emitter takes for an argument of this type; value None: an undefined one."""
    if isinstance(kind, Known):
        return kind.spec
    if isinstance(kind, types.IntegerLiteral):
        return kind.literal_value
    llvm = kind.llvm if isinstance(kind, Vector) else _SCALARS[kind]
    return ir.Constant(llvm, ir.Undefined) if value is None else value


def operation(emit):
    """A function that kernels can call, from `emit(b, arguments)`, which writes LLVM instructions
    with the builder b and returns the result, a tuple of results, a Spec or None.

    Arguments are LLVM values; a Spec is itself, and one called `count` is a literal int.
    """
    names = list(inspect.signature(emit).parameters)[1:]

    @functools.wraps(emit)  # Numba reads the names of the arguments here, all but the first
    def define(context, *given):
        kinds = [
            types.int64 if isinstance(kind, types.Integer) and name != "count" else kind
            for name, kind in zip(names, given, strict=True)
        ]

        def run(b, values):
            return emit(b, *map(_argument, kinds, values))

        def generate(context, b, signature, values):
            result = run(b, values)
            if isinstance(result, tuple):
                return context.make_tuple(b, signature.return_type, result)
            return result if isinstance(result, ir.Value) else context.get_dummy_value()

        # What type the result has is seen in a trial.
        trial = ir.Function(ir.Module(), ir.FunctionType(ir.VoidType(), []), "trial")
        result = run(ir.IRBuilder(trial.append_basic_block()), [None] * len(kinds))
        return _kind_of(result)(*kinds), generate

    return intrinsic(prefer_literal=True)(define)


# --- constants, and facts about the spec ---


def _integer(value):
    return ir.Constant(_I64, value)


def _zero(kind):
    return ir.Constant(kind, [0.0] * kind.count)


lanes_of = operation(lambda b, spec: _integer(spec.lanes))
width_of = operation(lambda b, spec: _integer(spec.width))
size_of = operation(lambda b, spec: _integer(_BYTES[spec.scalar]))  # bytes of an element
is_linear = operation(lambda b, spec: ir.Constant(_I1, spec.linear))
narrow = operation(lambda b, spec: replace(spec, lanes=spec.width))  # a tile of one register


@operation
def element(b, spec, value):
    """A float64 as an element."""
    return value if value.type == spec.scalar else b.fptrunc(value, spec.scalar)


# --- memory ---


def _size_of(kind):
    """Bytes of a number, or of one in a vector."""
    return _BYTES[getattr(kind, "element", kind)]


def _place(b, address, index, item, kind):
    """Pointer to a `kind` at address[index], counting in items."""
    return b.inttoptr(b.add(address, b.mul(index, _integer(_size_of(item)))), kind.as_pointer())


def _load(b, address, index, kind):
    return b.load(_place(b, address, index, kind, kind), align=_size_of(kind))


def _load_index(b, address, index, name):
    """An integer of the type `name`, none of which is negative, as an i64."""
    value = _load(b, address, index, _INTEGERS[name])
    return value if name == "int64" else b.zext(value, _I64)


def _store(b, address, index, value):
    """address[index] = value, an element, or address[index : index + lanes] = value, a vector."""
    b.store(value, _place(b, address, index, value.type, value.type), align=_size_of(value.type))


load = operation(lambda b, spec, address, index: _load(b, address, index, spec.scalar))
vload = operation(lambda b, spec, address, index: _load(b, address, index, spec.vector))
load_column = operation(lambda b, spec, address, i: _load_index(b, address, i, spec.column))
load_uint16 = operation(lambda b, address, index: _load_index(b, address, index, "uint16"))
load_int32 = operation(lambda b, address, index: _load_index(b, address, index, "int32"))
load_int64 = operation(lambda b, address, index: _load_index(b, address, index, "int64"))
store = operation(_store)


@operation
def accumulate(b, address, index, x):
    """address[index : index + lanes] += x."""
    _store(b, address, index, b.fadd(_load(b, address, index, x.type), x))


@operation
def clear(b, spec, address, begin, end):
    """address[begin:end] = 0."""
    size = b.mul(b.sub(end, begin), _integer(_BYTES[spec.scalar]))
    cgutils.memset(b, _place(b, address, begin, spec.scalar, _I8), size, 0)


@operation
def prefetch(b, spec, address, index):
    """Ask for the cache lines of the vector at address[index]."""
    signature = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(b.module, signature, "llvm.prefetch.p0")
    to_read, to_keep, data = (ir.Constant(_I32, hint) for hint in (0, 3, 1))
    for offset in range(0, spec.lanes, _CACHE_LINE // _BYTES[spec.scalar]):
        place = _place(b, address, b.add(index, _integer(offset)), spec.scalar, _I8)
        b.call(function, [place, to_read, to_keep, data])


# --- from lane to lane ---


def _shuffle(b, x, y, picks):
    """Lane i of the result is lane picks[i] of x, or of y if that is beyond x."""
    return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(_I32, len(picks)), list(picks)))


def _splat(b, scalar, lanes):
    empty = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    return _shuffle(b, b.insert_element(empty, scalar, ir.Constant(_I32, 0)), empty, [0] * lanes)


def _pieces(b, x, width):
    """A wide vector as the registers it lives in."""
    starts = range(0, x.type.count, width)
    return [_shuffle(b, x, x, range(start, start + width)) for start in starts]


def _join(b, parts):
    while len(parts) > 1:
        both = range(2 * parts[0].type.count)
        parts = [_shuffle(b, x, y, both) for x, y in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _total(b, x):
    """The sum of the lanes of x, a scalar."""
    while x.type.count > 1:
        x = b.fadd(*_pieces(b, x, x.type.count // 2))
    return b.extract_element(x, ir.Constant(_I32, 0))


def _unit(x):
    """Elements in a unit."""
    return _UNIT // _size_of(x.type)


def _interleave(b, x, y, step):
    """Unit by unit, x and y in turns of `step` elements: of the low halves, of the high halves."""
    lanes, unit = x.type.count, _unit(x)

    def half(offset):
        units = range(offset, lanes, unit)
        starts = [i for u in units for i in range(u, u + unit // 2, step)]
        return [i + j for start in starts for i in (start, lanes + start) for j in range(step)]

    return _shuffle(b, x, y, half(0)), _shuffle(b, x, y, half(unit // 2))


def _sift(b, x, y):
    """The even units of x, then those of y; the odd units likewise."""
    unit, lanes = _unit(x), 2 * x.type.count
    even, odd = (
        [i for u in range(first, lanes, 2 * unit) for i in range(u, u + unit)]
        for first in (0, unit)
    )
    return _shuffle(b, x, y, even), _shuffle(b, x, y, odd)


def _sums(b, part, count):
    """A vector whose lane i is the sum of the lanes of part(i), for i < count, a power of 2.

    Two parts are shuffled into the two halves of their lanes and added, so that half as many
    vectors hold sums of twice as many lanes; and so on. Parts are asked for in order and soon used
    up, so that few registers are alive.
    """

    def tree(first, n):
        if n == 1:
            return part(first)
        x, y = tree(first, n // 2), tree(first + n // 2, n // 2)
        if n > x.type.count:
            return _join(b, [x, y])
        return b.fadd(*(_interleave(b, x, y, n // 2) if n <= _unit(x) else _sift(b, x, y)))

    x = tree(0, count)
    while x.type.count > count:
        half = x.type.count // 2
        low, high = _sift(b, x, x) if count > _unit(x) else _pieces(b, x, half)
        x = b.fadd(*(_shuffle(b, side, side, range(half)) for side in (low, high)))
    return x


def _transposed(b, rows):
    """A square of registers, transposed: first within units, then unit by unit."""
    unit = _unit(rows[0])

    def inside(group, step):
        if step == unit:
            return group
        pairs = zip(group[::2], group[1::2], strict=True)
        low, high = zip(*(_interleave(b, x, y, step) for x, y in pairs), strict=True)
        return [*inside(low, 2 * step), *inside(high, 2 * step)]

    def across(group):
        if len(group) == 1:
            return group
        pairs = zip(group[::2], group[1::2], strict=True)
        even, odd = zip(*(_sift(b, x, y) for x, y in pairs), strict=True)
        return [row for both in zip(across(even), across(odd), strict=True) for row in both]

    groups = [inside(rows[i : i + unit], 1) for i in range(0, len(rows), unit)]
    columns = [across([group[c] for group in groups]) for c in range(unit)]
    return [columns[c][u] for u in range(len(groups)) for c in range(unit)]


splat = operation(lambda b, spec, scalar: _splat(b, scalar, spec.lanes))
total = operation(_total)


# --- arithmetic, lane by lane ---


def _fma(b, x, y, z):
    """x * y + z, fused where the machine can."""
    name = f"llvm.fmuladd.v{x.type.count}f{8 * _size_of(x.type)}"
    function = cgutils.get_or_insert_function(b.module, ir.FunctionType(x.type, [x.type] * 3), name)
    return b.call(function, [x, y, z])


def _dot(b, xs, ys):
    """The sum of the products of two lists of vectors, a vector."""
    total = b.fmul(xs[0], ys[0])
    for x, y in zip(xs[1:], ys[1:], strict=True):
        total = _fma(b, x, y, total)
    return total


def _positive(b, x):
    """Lanes where x > 0; false for NaN."""
    return b.fcmp_ordered(">", x, _zero(x.type))


add = operation(lambda b, x, y: b.fadd(x, y))
multiply = operation(lambda b, x, y: b.fmul(x, y))
multiply_add = operation(_fma)


@operation
def leaky(b, gate, x, slope):
    """x where gate > 0, else slope * x; where the gate is NaN, slope * x."""
    return b.select(_positive(b, gate), x, b.fmul(slope, x))


# --- sign bits: of 32 samples in an int32; fewer lanes are part of a word, at its address ---


@operation
def store_signs(b, words, index, x):
    """Bit i of words[index] becomes: is lane i positive."""
    bits = b.bitcast(_positive(b, x), ir.IntType(x.type.count))
    b.store(bits, _place(b, words, index, _I32, bits.type), align=1)


@operation
def select_signs(b, low, high, index, on, off):
    """`on` in lanes whose bit of low[index] is set, else `off`; lanes from 32 on look at high."""
    lanes = on.type.count
    bits = ir.IntType(min(lanes, _WORD))
    words = [b.load(_place(b, word, index, _I32, bits), align=1) for word in (low, high)]
    masks = [b.bitcast(word, ir.VectorType(_I1, bits.width)) for word in words]
    return b.select(_join(b, masks[: lanes // bits.width]), on, off)


# --- synapses, a literal `count` at a time ---


def _load_row(b, tile, row, kind):
    return _load(b, tile, b.mul(row, _integer(kind.count)), kind)


@operation
def weigh(b, spec, count, tile, columns, weights, first, u):
    """u + sum of weights[j] * tile[columns[j]] over j in [first, first + count)."""
    for i in range(count):
        j = b.add(first, _integer(i))
        x = _load_row(b, tile, _load_index(b, columns, j, spec.column), spec.vector)
        u = _fma(b, _splat(b, _load(b, weights, j, spec.scalar), spec.lanes), x, u)
    return u


@operation
def correlate(b, spec, count, tile, columns, first, q):
    """Lane i: the sum over samples of q * tile[columns[first + i]], for i < count, a power of 2;
    count 0 means as many as a register has lanes.
    """
    qs = _pieces(b, q, spec.width)

    def product(i):
        column = _load_index(b, columns, b.add(first, _integer(i)), spec.column)
        return _dot(b, qs, _pieces(b, _load_row(b, tile, column, spec.vector), spec.width))

    return _sums(b, product, count or spec.width)


@operation
def gather(b, spec, count, tile, rows, weights, first, x, dx):
    """For slots j in [first, first + count) and q = tile[rows[j]] (uint16 rows): the pair of
    dx + weights[j] * q over all j, and a vector whose lane i is the sum over samples of q * x.
    """
    xs, parts = _pieces(b, x, spec.width), _pieces(b, dx, spec.width)

    def product(i):
        j = b.add(first, _integer(i))
        q = _load_row(b, tile, _load_index(b, rows, j, "uint16"), spec.vector)
        qs = _pieces(b, q, spec.width)
        weight = _splat(b, _load(b, weights, j, spec.scalar), spec.width)
        parts[:] = [_fma(b, weight, q, s) for q, s in zip(qs, parts, strict=True)]
        return _dot(b, qs, xs)

    dots = _sums(b, product, count)
    return _join(b, parts), dots


# --- squares of one register's lanes, between row-major memory and tiles ---


@operation
def transpose_in(b, spec, source, stride, rows, tile):
    """tile[c][r] = source[r][c] for r < rows, else 0; memory past the last row is not touched."""
    square = []
    for r in range(spec.width):
        valid = b.icmp_signed("<", _integer(r), rows)
        offset = b.select(valid, b.mul(stride, _integer(r)), _integer(0))
        row = _load(b, source, offset, spec.register)
        square.append(b.select(valid, row, _zero(spec.register)))
    for c, row in enumerate(_transposed(b, square)):
        _store(b, tile, _integer(c * spec.lanes), row)


@operation
def transpose_out(b, spec, tile, target, stride, rows):
    """target[r][c] = tile[c][r] for r < rows; there is a row 0, and memory past the last row is not
    touched.
    """
    square = [_load(b, tile, _integer(c * spec.lanes), spec.register) for c in range(spec.width)]
    for r, row in reversed(list(enumerate(_transposed(b, square)))):
        valid = b.icmp_signed("<", _integer(r), rows)  # else it goes to row 0, which comes last
        offset = b.select(valid, b.mul(stride, _integer(r)), _integer(0))
        _store(b, target, offset, row)
