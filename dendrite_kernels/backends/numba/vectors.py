"""LLVM vector types for Numba, and the operations that kernels call: all that knows LLVM.

Array code in Numba leaves half of the speed to LLVM's auto-vectorizer: it keeps sums in memory,
uses half of AVX-512's width and cannot put the sums of four synapses into one register. LLVM itself
has vectors of any length as plain values, `<32 x float>`, with arithmetic, comparison, `select` and
`shufflevector` on them, on every machine: it splits a wide one over as many registers as it takes.
Numba only lacks a type for such a value. So this file has

    Spec        what a kernel is compiled for; passed as a token that has no value at run time
    Vector      a value per sample of a tile, passed and returned like a float
    emitters    functions of an LLVM builder `b` that write the few instructions they name: `_fma`
    operations  what kernels call; the first argument `token` stands for a Spec

Memory is raw: an address is an int64, an index counts items of the kind read there, nothing is
bounds-checked. x86 moves lanes cheaply within units of 16 bytes, and whole units; shuffles keep to
these two, and other machines compile them as well as any. Nothing here knows dendrites.
"""

from __future__ import annotations

import functools
import inspect
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

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
    listed = numba.config.CPU_FEATURES
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
    register: int  # lanes of one vector register
    linear: bool  # plain sparse rows: no nonlinearity, no somas
    build: str  # fingerprint of the sources, so that no cache outlives them


class Token(types.Type):  # type: ignore[misc]
    """Numba's type of one particular `Spec`."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        super().__init__(name=repr(spec))


@register_model(Token)
class _TokenModel(models.OpaqueModel):  # type: ignore[misc]
    pass


@typeof_impl.register(Spec)
def _token_of(value: Spec, context: Any) -> Token:
    return Token(value)


@lower_constant(Token)
def _no_value(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    return context.get_dummy_value()


def operation(typed: Callable[..., Any]) -> Any:
    """A function that kernels can call, from `typed(types of the arguments) -> (signature, emit)`.

    `emit(b, values of the arguments)` writes LLVM instructions with the builder b and returns the
    result, a tuple of results, or None.
    """

    @functools.wraps(typed)
    def define(context: Any, *kinds: Any) -> Any:
        signature, emit = typed(*kinds)

        def generate(context: Any, b: Any, signature: Any, values: Any) -> Any:
            result = emit(b, *values)
            if isinstance(result, tuple):
                return context.make_tuple(b, signature.return_type, result)
            return context.get_dummy_value() if result is None else result

        return signature, generate

    # Numba takes the names of the arguments from here, and the first to be its typing context.
    own = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = inspect.signature(typed).parameters.values()
    define.__signature__ = inspect.Signature([own, *names])  # type: ignore[attr-defined]
    return intrinsic(prefer_literal=True)(define)


# --- vectors, and emitters ---

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
        self.element, self.lanes, self.size = element, lanes, _size_of(self.llvm)
        super().__init__(name=f"Vector({element}, {lanes})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    """A value of this type is its LLVM value: it lives in registers."""

    def __init__(self, manager, kind):
        super().__init__(manager, kind, kind.llvm)


def _size_of(kind):
    """Bytes of an integer or of an element of a (vector of) floating-point type."""
    if isinstance(kind, ir.IntType):
        return kind.width // 8
    return _SIZES[str(getattr(kind, "element", kind))]


# --- constants ---


def _integer(value):
    return ir.Constant(_I64, value)


def _boolean(value):
    return ir.Constant(_I1, value)


def _zero(kind):
    return ir.Constant(kind, [0.0] * kind.count)


# --- memory ---


def _place(b, address, index, item, kind):
    """Pointer to a `kind` at address[index], counting in items."""
    return b.inttoptr(b.add(address, b.mul(index, _integer(_size_of(item)))), kind.as_pointer())


def _load(b, address, index, kind):
    return b.load(_place(b, address, index, kind, kind), align=_size_of(kind))


def _store(b, address, index, value):
    b.store(value, _place(b, address, index, value.type, value.type), align=_size_of(value.type))


def _load_index(b, address, index, name):
    """An integer of the type `name`, none of which is negative, as an i64."""
    value = _load(b, address, index, INTEGERS[name])
    return value if name == "int64" else b.zext(value, _I64)


def _clear(b, address, begin, end, kind):
    place = _place(b, address, begin, kind, _I8)
    cgutils.memset(b, place, b.mul(b.sub(end, begin), _integer(_size_of(kind))), 0)


def _prefetch(b, address, index, kind):
    """Ask for the cache lines of the vector at address[index]."""
    byte = _I8.as_pointer()
    signature = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(b.module, signature, "llvm.prefetch.p0")
    to_read, to_keep, data = (ir.Constant(_I32, hint) for hint in (0, 3, 1))
    for offset in range(0, kind.count, _CACHE_LINE // _size_of(kind)):
        place = _place(b, address, b.add(index, _integer(offset)), kind.element, _I8)
        b.call(function, [place, to_read, to_keep, data])


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


def _leaky(b, gate, x, slope):
    """x where gate > 0, else slope * x; where the gate is NaN, slope * x."""
    return b.select(_positive(b, gate), x, b.fmul(slope, x))


def _positive(b, x):
    """Lanes where x > 0; false for NaN."""
    return b.fcmp_ordered(">", x, _zero(x.type))


# --- sign bits ---


def _store_signs(b, words, index, x):
    """Bit i of the word words[index], or of a part of it: is lane i positive."""
    bits = b.bitcast(_positive(b, x), ir.IntType(x.type.count))
    b.store(bits, _place(b, words, index, _I32, bits.type), align=1)


def _select_signs(b, low, high, index, on, off):
    """`on` in lanes whose bit of low[index] is set, else `off`; lanes from 32 on look at high."""
    lanes = on.type.count
    bits = ir.IntType(min(lanes, _WORD))
    words = [b.load(_place(b, word, index, _I32, bits), align=1) for word in (low, high)]
    masks = [b.bitcast(word, ir.VectorType(_I1, bits.width)) for word in words]
    return b.select(_join(b, masks[: lanes // bits.width]), on, off)


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


# --- operations ---

INT, VOID = types.int64, types.void


def _tile(token):
    return Vector(token.spec.element, token.spec.lanes)


def _register(token):
    return Vector(token.spec.element, token.spec.register)


# --- facts about the token ---


def _fact(read, kind, constant):
    return operation(lambda token: (kind(token), lambda b, _: constant(read(token))))


lanes_of = _fact(lambda token: token.spec.lanes, INT, _integer)
register_of = _fact(lambda token: token.spec.register, INT, _integer)
size_of = _fact(lambda token: _tile(token).size, INT, _integer)
is_linear = _fact(lambda token: token.spec.linear, types.boolean, _boolean)


@operation
def narrow(token):
    """The token whose tile is one register wide."""
    return Token(replace(token.spec, lanes=token.spec.register))(token), lambda b, value: value


# --- scalars ---


@operation
def element(token, value):
    """A float64 as an element."""
    kind = _tile(token)
    same = kind.element == "float64"
    emit = lambda b, _, x: x if same else b.fptrunc(x, kind.llvm.element)  # noqa: E731
    return kind.scalar(token, types.float64), emit


@operation
def load(token, address, index):
    """The element address[index]."""
    kind = _tile(token)
    return kind.scalar(token, INT, INT), lambda b, _, a, i: _load(b, a, i, kind.llvm.element)


@operation
def store(token, address, index, value):
    """address[index] = value, an element."""
    scalar = _tile(token).scalar
    return VOID(token, INT, INT, scalar), lambda b, _, a, i, x: _store(b, a, i, x)


@operation
def clear(token, address, begin, end):
    """address[begin:end] = 0."""
    kind = _tile(token).llvm.element
    return VOID(token, INT, INT, INT), lambda b, _, *args: _clear(b, *args, kind)


@operation
def load_column(token, address, index):
    """The column index address[index]."""
    emit = lambda b, _, a, i: _load_index(b, a, i, token.spec.column)  # noqa: E731
    return INT(token, INT, INT), emit


def _index_loader(name):
    emit = lambda b, address, index: _load_index(b, address, index, name)  # noqa: E731
    return operation(lambda address, index: (INT(INT, INT), emit))


load_uint16, load_int32, load_int64 = map(_index_loader, ("uint16", "int32", "int64"))


# --- one value per sample ---


@operation
def vload(token, address, index):
    """The vector address[index : index + lanes]."""
    kind = _tile(token)
    return kind(token, INT, INT), lambda b, _, a, i: _load(b, a, i, kind.llvm)


@operation
def vstore(address, index, x):
    """address[index : index + lanes] = x."""
    return VOID(INT, INT, x), _store


@operation
def accumulate(address, index, x):
    """address[index : index + lanes] += x."""

    def emit(b, address, index, x):
        _store(b, address, index, b.fadd(_load(b, address, index, x.type), x))

    return VOID(INT, INT, x), emit


@operation
def prefetch(token, address, index):
    """Ask for the cache lines of the vector at address[index]."""
    kind = _tile(token).llvm
    return VOID(token, INT, INT), lambda b, _, a, i: _prefetch(b, a, i, kind)


@operation
def splat(token, scalar):
    """The same element in every lane."""
    kind = _tile(token)
    return kind(token, kind.scalar), lambda b, _, scalar: _splat(b, scalar, kind.lanes)


add = operation(lambda x, y: (x(x, x), lambda b, *args: b.fadd(*args)))
multiply = operation(lambda x, y: (x(x, x), lambda b, *args: b.fmul(*args)))
multiply_add = operation(lambda x, y, z: (x(x, x, x), _fma))  # x * y + z
total = operation(lambda x: (x.scalar(x), _total))  # the sum of all lanes


@operation
def leaky(x, slope):
    """x where x > 0, else slope * x; NaN stays NaN."""
    return x(x, x), lambda b, x, slope: _leaky(b, x, x, slope)


@operation
def store_signs(words, index, x):
    """Bit i of the 32-bit word words[index]: is lane i of x positive.

    Fewer lanes than 32 write part of the word: give the address of that part of word 0.
    """
    return VOID(INT, INT, x), _store_signs


@operation
def select_signs(low, high, index, x, y):
    """x in lanes whose bit of low[index] is set, else y; lanes from 32 on look at high[index]."""
    return x(INT, INT, INT, x, x), _select_signs


# --- synapses, a literal `count` at a time ---


def _load_row(b, tile, row, kind):
    return _load(b, tile, b.mul(row, _integer(kind.lanes)), kind.llvm)


@operation
def weigh(token, count, tile, columns, weights, first, u):
    """u + sum of weights[j] * tile[columns[j]] over j in [first, first + count)."""
    kind, column = _tile(token), token.spec.column

    def emit(b, _, __, tile, columns, weights, first, u):
        for i in range(count.literal_value):
            j = b.add(first, _integer(i))
            x = _load_row(b, tile, _load_index(b, columns, j, column), kind)
            weight = _load(b, weights, j, kind.llvm.element)
            u = _fma(b, _splat(b, weight, kind.lanes), x, u)
        return u

    return kind(token, count, INT, INT, INT, INT, kind), emit


@operation
def correlate(token, count, tile, columns, first, q):
    """Lane i: the sum over samples of q * tile[columns[first + i]], for i < count, a power of 2;
    count 0 means as many as a register has lanes.
    """
    kind, spec = _tile(token), token.spec
    n = count.literal_value or spec.register

    def emit(b, _, __, tile, columns, first, q):
        qs = _pieces(b, q, spec.register)

        def product(i):
            column = _load_index(b, columns, b.add(first, _integer(i)), spec.column)
            return _dot(b, qs, _pieces(b, _load_row(b, tile, column, kind), spec.register))

        return _sums(b, product, n)

    return Vector(spec.element, n)(token, count, INT, INT, INT, kind), emit


@operation
def gather(token, count, tile, rows, weights, first, x, sum):
    """For slots j in [first, first + count) and q = tile[rows[j]] (uint16 rows): the pair of
    sum + weights[j] * q over all j, and a vector whose lane i is the sum over samples of q * x.
    """
    kind, spec, n = _tile(token), token.spec, count.literal_value

    def emit(b, _, __, tile, rows, weights, first, x, sum):
        xs, parts = _pieces(b, x, spec.register), _pieces(b, sum, spec.register)

        def product(i):
            j = b.add(first, _integer(i))
            q = _load_row(b, tile, _load_index(b, rows, j, "uint16"), kind)
            qs, weight = _pieces(b, q, spec.register), _load(b, weights, j, x.type.element)
            weight = _splat(b, weight, spec.register)
            parts[:] = [_fma(b, weight, q, s) for q, s in zip(qs, parts, strict=True)]
            return _dot(b, qs, xs)

        dots = _sums(b, product, n)
        return _join(b, parts), dots

    pair = types.Tuple((kind, Vector(spec.element, n)))
    return pair(token, count, INT, INT, INT, INT, kind, kind), emit


# --- squares of one register's lanes, between row-major memory and tiles ---


def _square(b, source, stride, rows, kind):
    """Row r of a square, or zeros where r >= rows; memory past the last row is not touched."""
    square = []
    for r in range(kind.lanes):
        valid = b.icmp_signed("<", _integer(r), rows)
        offset = b.select(valid, b.mul(stride, _integer(r)), _integer(0))
        row = _load(b, source, offset, kind.llvm)
        square.append(b.select(valid, row, _zero(kind.llvm)))
    return square


@operation
def transpose_in(token, source, gate, slope, stride, rows, tile):
    """tile[c][r] = source[r][c] for r < rows, else 0. With an address for a gate, not None,
    source is multiplied by slope unless gate[r][c] > 0.
    """
    kind = _register(token)

    def emit(b, _, source, gate_value, slope, stride, rows, tile):
        square = _square(b, source, stride, rows, kind)
        if gate is not types.none:
            slopes = _splat(b, slope, kind.lanes)
            gates = _square(b, gate_value, stride, rows, kind)
            pairs = zip(gates, square, strict=True)
            square = [_leaky(b, y, x, slopes) for y, x in pairs]
        for c, row in enumerate(_transposed(b, square)):
            _store(b, tile, _integer(c * token.spec.lanes), row)

    return VOID(token, INT, gate, kind.scalar, INT, INT, INT), emit


@operation
def transpose_out(token, tile, target, stride, rows, spare):
    """target[r][c] = tile[c][r] for r < rows; what would go to further rows goes to `spare`."""
    kind = _register(token)

    def emit(b, _, tile, target, stride, rows, spare):
        starts = range(0, kind.lanes * token.spec.lanes, token.spec.lanes)
        square = [_load(b, tile, _integer(start), kind.llvm) for start in starts]
        for r, row in enumerate(_transposed(b, square)):
            place = b.add(target, b.mul(stride, _integer(r * kind.size)))
            valid = b.icmp_signed("<", _integer(r), rows)
            _store(b, b.select(valid, place, spare), _integer(0), row)

    return VOID(token, INT, INT, INT, INT, INT), emit
