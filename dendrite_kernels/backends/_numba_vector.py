"""LLVM vector types for Numba: the only file that knows LLVM.

Array code in Numba leaves half of the speed to LLVM's auto-vectoriser: it keeps sums in memory,
uses half of AVX-512's width and cannot put four synapses' sums into one register. LLVM itself has
vectors of any length as plain values, `<32 x float>`, with arithmetic, comparison, `select` and
`shufflevector` on them, on every machine: it splits a wide one over as many registers as it takes
and picks the machine's own instructions. Numba only lacks a type for such a value. So this file has

    Vector    that type: one value per sample of a tile, passed and returned like a float
    emitters  functions of an LLVM builder `b` that write the few instructions they name

and `_numba_operations.py` makes of them the functions that kernels call. Neither knows dendrites.

Memory is raw: an address is an i64, an index counts items of the kind read there, nothing is
bounds-checked. x86 moves lanes cheaply within units of 16 bytes, and whole units; shuffles keep to
these two, and other machines compile them as well as any.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import models, register_model

_I1, _I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
INTEGERS = {"uint16": _I16, "int32": _I32, "int64": _I64}
_ELEMENTS = {"float32": ir.FloatType(), "float64": ir.DoubleType()}
_SIZES = {str(_ELEMENTS["float32"]): 4, str(_ELEMENTS["float64"]): 8}
_UNIT = 16  # bytes
_CACHE_LINE = 64  # bytes
_WORD = 32  # sign bits per word


class Vector(types.Type):
    """Numba's type of a vector of `lanes` elements."""

    def __init__(self, element, lanes):
        self.llvm = ir.VectorType(_ELEMENTS[element], lanes)
        self.scalar = getattr(types, element)
        self.element, self.lanes, self.size = element, lanes, size_of(self.llvm)
        super().__init__(name=f"Vector({element}, {lanes})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    """A value of this type is its LLVM value: it lives in registers."""

    def __init__(self, manager, kind):
        super().__init__(manager, kind, kind.llvm)


def size_of(kind):
    """Bytes of an integer or of an element of a (vector of) floating-point type."""
    if isinstance(kind, ir.IntType):
        return kind.width // 8
    return _SIZES[str(getattr(kind, "element", kind))]


# --- constants ---


def integer(value):
    return ir.Constant(_I64, value)


def boolean(value):
    return ir.Constant(_I1, value)


def zero(kind):
    return ir.Constant(kind, [0.0] * kind.count)


# --- memory ---


def _place(b, address, index, item, kind):
    """Pointer to a `kind` at address[index], counting in items."""
    return b.inttoptr(b.add(address, b.mul(index, integer(size_of(item)))), kind.as_pointer())


def load(b, address, index, kind):
    return b.load(_place(b, address, index, kind, kind), align=size_of(kind))


def store(b, address, index, value):
    b.store(value, _place(b, address, index, value.type, value.type), align=size_of(value.type))


def load_index(b, address, index, name):
    """An integer of the type `name`, none of which is negative, as an i64."""
    value = load(b, address, index, INTEGERS[name])
    return value if name == "int64" else b.zext(value, _I64)


def clear(b, address, begin, end, kind):
    place = _place(b, address, begin, kind, _I8)
    cgutils.memset(b, place, b.mul(b.sub(end, begin), integer(size_of(kind))), 0)


def prefetch(b, address, index, kind):
    """Ask for the cache lines of the vector at address[index]."""
    byte = _I8.as_pointer()
    signature = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(b.module, signature, "llvm.prefetch.p0")
    to_read, to_keep, data = (ir.Constant(_I32, hint) for hint in (0, 3, 1))
    for offset in range(0, kind.count, _CACHE_LINE // size_of(kind)):
        place = _place(b, address, b.add(index, integer(offset)), kind.element, _I8)
        b.call(function, [place, to_read, to_keep, data])


# --- arithmetic, lane by lane ---


def fma(b, x, y, z):
    """x * y + z, fused where the machine can."""
    name = f"llvm.fmuladd.v{x.type.count}f{8 * size_of(x.type)}"
    function = cgutils.get_or_insert_function(b.module, ir.FunctionType(x.type, [x.type] * 3), name)
    return b.call(function, [x, y, z])


def dot(b, xs, ys):
    """The sum of the products of two lists of vectors, a vector."""
    total = b.fmul(xs[0], ys[0])
    for x, y in zip(xs[1:], ys[1:], strict=True):
        total = fma(b, x, y, total)
    return total


def leaky(b, gate, x, slope):
    """x where gate > 0, else slope * x; where the gate is NaN, slope * x."""
    return b.select(_positive(b, gate), x, b.fmul(slope, x))


def _positive(b, x):
    """Lanes where x > 0; false for NaN."""
    return b.fcmp_ordered(">", x, zero(x.type))


# --- sign bits ---


def store_signs(b, words, index, x):
    """Bit i of the word words[index], or of a part of it: is lane i positive."""
    bits = b.bitcast(_positive(b, x), ir.IntType(x.type.count))
    b.store(bits, _place(b, words, index, _I32, bits.type), align=1)


def select_signs(b, low, high, index, on, off):
    """`on` in lanes whose bit of low[index] is set, else `off`; lanes from 32 on look at high."""
    lanes = on.type.count
    bits = ir.IntType(min(lanes, _WORD))
    words = [b.load(_place(b, word, index, _I32, bits), align=1) for word in (low, high)]
    masks = [b.bitcast(word, ir.VectorType(_I1, bits.width)) for word in words]
    return b.select(join(b, masks[: lanes // bits.width]), on, off)


# --- from lane to lane ---


def shuffle(b, x, y, picks):
    """Lane i of the result is lane picks[i] of x, or of y if that is beyond x."""
    return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(_I32, len(picks)), list(picks)))


def splat(b, scalar, lanes):
    empty = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    return shuffle(b, b.insert_element(empty, scalar, ir.Constant(_I32, 0)), empty, [0] * lanes)


def pieces(b, x, width):
    """A wide vector as the registers it lives in."""
    starts = range(0, x.type.count, width)
    return [shuffle(b, x, x, range(start, start + width)) for start in starts]


def join(b, parts):
    while len(parts) > 1:
        both = range(2 * parts[0].type.count)
        parts = [shuffle(b, x, y, both) for x, y in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def total(b, x):
    """The sum of the lanes of x, a scalar."""
    while x.type.count > 1:
        x = b.fadd(*pieces(b, x, x.type.count // 2))
    return b.extract_element(x, ir.Constant(_I32, 0))


def _unit(x):
    """Elements in a unit."""
    return _UNIT // size_of(x.type)


def _interleave(b, x, y, step):
    """Unit by unit, x and y in turns of `step` elements: of the low halves, of the high halves."""
    lanes, unit = x.type.count, _unit(x)

    def half(offset):
        units = range(offset, lanes, unit)
        starts = [i for u in units for i in range(u, u + unit // 2, step)]
        return [i + j for start in starts for i in (start, lanes + start) for j in range(step)]

    return shuffle(b, x, y, half(0)), shuffle(b, x, y, half(unit // 2))


def _sift(b, x, y):
    """The even units of x, then those of y; the odd units likewise."""
    unit, lanes = _unit(x), 2 * x.type.count
    even, odd = (
        [i for u in range(first, lanes, 2 * unit) for i in range(u, u + unit)]
        for first in (0, unit)
    )
    return shuffle(b, x, y, even), shuffle(b, x, y, odd)


def sums(b, part, count):
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
            return join(b, [x, y])
        return b.fadd(*(_interleave(b, x, y, n // 2) if n <= _unit(x) else _sift(b, x, y)))

    x = tree(0, count)
    while x.type.count > count:
        half = x.type.count // 2
        low, high = _sift(b, x, x) if count > _unit(x) else pieces(b, x, half)
        x = b.fadd(*(shuffle(b, side, side, range(half)) for side in (low, high)))
    return x


def transposed(b, rows):
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
