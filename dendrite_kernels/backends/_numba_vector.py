"""LLVM vector types for Numba: the vocabulary in which the kernels are written.

Array code in Numba leaves half of the speed to LLVM's auto-vectoriser. Here a kernel says what it
means: a `Vector` is one value per sample of a tile, whatever the width of the machine's registers
(LLVM splits wide ones), and every operation below emits just the few instructions it names. The
file knows no dendrites, only memory and arithmetic.

Memory is raw: an address is an int64, an index counts elements, nothing is bounds-checked and
nothing allocated. The first argument `token` stands for a `Spec` (`_numba_token.py`).
"""

from __future__ import annotations

from dataclasses import replace

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import models, register_model

from ._numba_token import Token, operation

INT, VOID = types.int64, types.void
_I1, _I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_INDEX = {"uint16": _I16, "int32": _I32, "int64": _I64}
_ELEMENT = {"float32": ir.FloatType(), "float64": ir.DoubleType()}
_SIZE = {str(_ELEMENT["float32"]): 4, str(_ELEMENT["float64"]): 8}
_UNIT = 16  # bytes that x86 shuffles cheaply; whole units move cheaply between places too


class Vector(types.Type):
    """Numba's type of a vector of `lanes` elements."""

    def __init__(self, element, lanes):
        self.llvm = ir.VectorType(_ELEMENT[element], lanes)
        self.scalar = getattr(types, element)
        self.element, self.lanes, self.size = element, lanes, _size(self.llvm)
        super().__init__(name=f"Vector({element}, {lanes})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, kind.llvm)


def _tile(token):
    return Vector(token.spec.element, token.spec.lanes)


def _register(token):
    return Vector(token.spec.element, token.spec.register)


# --- instructions, written with an LLVM builder b ---


def _size(kind):
    """Bytes of an integer or of an element of a (vector of) floating-point type."""
    if isinstance(kind, ir.IntType):
        return kind.width // 8
    return _SIZE[str(getattr(kind, "element", kind))]


def _int(value):
    return ir.Constant(_I64, value)


def _place(b, address, index, item, kind):
    """Pointer to a `kind` at address[index], counting in items."""
    return b.inttoptr(b.add(address, b.mul(index, _int(_size(item)))), kind.as_pointer())


def _load(b, address, index, kind):
    return b.load(_place(b, address, index, kind, kind), align=_size(kind))


def _store(b, address, index, value):
    b.store(value, _place(b, address, index, value.type, value.type), align=_size(value.type))


def _load_index(b, address, index, name):
    value = _load(b, address, index, _INDEX[name])
    return value if name == "int64" else b.zext(value, _I64)  # none is negative


def _shuffle(b, x, y, picks):
    return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(_I32, len(picks)), list(picks)))


def _splat(b, scalar, lanes):
    empty = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    return _shuffle(b, b.insert_element(empty, scalar, ir.Constant(_I32, 0)), empty, [0] * lanes)


def _zero(kind):
    return ir.Constant(kind, [0.0] * kind.count)


def _fma(b, x, y, z):
    """x * y + z, fused where the machine can."""
    name = f"llvm.fmuladd.v{x.type.count}f{8 * _size(x.type)}"
    function = cgutils.get_or_insert_function(b.module, ir.FunctionType(x.type, [x.type] * 3), name)
    return b.call(function, [x, y, z])


def _dot(b, xs, ys):
    total = b.fmul(xs[0], ys[0])
    for x, y in zip(xs[1:], ys[1:], strict=True):
        total = _fma(b, x, y, total)
    return total


def _positive(b, x):
    """Lanes where x > 0; false for NaN."""
    return b.fcmp_ordered(">", x, _zero(x.type))


def _pieces(b, x, width):
    """A wide vector as the registers it lives in."""
    starts = range(0, x.type.count, width)
    return [_shuffle(b, x, x, range(start, start + width)) for start in starts]


def _join(b, parts):
    while len(parts) > 1:
        both = range(2 * parts[0].type.count)
        parts = [_shuffle(b, x, y, both) for x, y in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _unit(x):
    """Elements in a unit."""
    return _UNIT // _size(x.type)


def _interleave(b, x, y, step):
    """Unit by unit, x and y in turns of `step` elements: of the low halves, of the high halves."""
    lanes, unit = x.type.count, _unit(x)

    def half(offset):
        starts = [
            i for u in range(offset, lanes, unit) for i in range(u, u + unit // 2, step)
        ]  # fmt: skip
        return [i + j for start in starts for i in (start, lanes + start) for j in range(step)]

    return _shuffle(b, x, y, half(0)), _shuffle(b, x, y, half(unit // 2))


def _sift(b, x, y):
    """The even units of x, then those of y; the odd units likewise."""
    unit, lanes = _unit(x), 2 * x.type.count
    parts = [
        [i for u in range(first, lanes, 2 * unit) for i in range(u, u + unit)]
        for first in (0, unit)
    ]
    return _shuffle(b, x, y, parts[0]), _shuffle(b, x, y, parts[1])


def _sums(b, part, count):
    """A vector whose lane i is the sum of the lanes of part(i), for i < count, a power of 2.

    Parts are asked for in order and soon used up, so that few registers are alive.
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


# --- facts about the token ---


def _fact(read, kind, llvm):
    return operation(lambda token: (kind(token), lambda b, _: ir.Constant(llvm, read(token.spec))))


lanes_of = _fact(lambda spec: spec.lanes, INT, _I64)
register_of = _fact(lambda spec: spec.register, INT, _I64)
size_of = _fact(lambda spec: _size(_ELEMENT[spec.element]), INT, _I64)
is_linear = _fact(lambda spec: spec.linear, types.boolean, _I1)


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
    return VOID(token, INT, INT, _tile(token).scalar), lambda b, _, a, i, x: _store(b, a, i, x)


@operation
def clear(token, address, begin, end):
    """address[begin:end] = 0."""
    kind = _tile(token).llvm.element

    def emit(b, _, address, begin, end):
        place = _place(b, address, begin, kind, _I8)
        cgutils.memset(b, place, b.mul(b.sub(end, begin), _int(_size(kind))), 0)

    return VOID(token, INT, INT, INT), emit


@operation
def load_column(token, address, index):
    """The column index address[index]."""
    return INT(token, INT, INT), lambda b, _, a, i: _load_index(b, a, i, token.spec.column)


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
def splat(token, scalar):
    """The same element in every lane."""
    kind = _tile(token)
    return kind(token, kind.scalar), lambda b, _, scalar: _splat(b, scalar, kind.lanes)


add = operation(lambda x, y: (x(x, x), lambda b, *args: b.fadd(*args)))
multiply = operation(lambda x, y: (x(x, x), lambda b, *args: b.fmul(*args)))
multiply_add = operation(lambda x, y, z: (x(x, x, x), _fma))  # x * y + z


@operation
def leaky(x, slope):
    """x where x > 0, else slope * x; NaN stays NaN."""
    return x(x, x), lambda b, x, slope: b.select(_positive(b, x), x, b.fmul(slope, x))


@operation
def total(x):
    """The sum of all lanes."""

    def emit(b, x):
        while x.type.count > 1:
            x = b.fadd(*_pieces(b, x, x.type.count // 2))
        return b.extract_element(x, ir.Constant(_I32, 0))

    return x.scalar(x), emit


@operation
def store_signs(words, index, x):
    """Bit i of the 32-bit word words[index]: is lane i of x positive.

    Fewer lanes than 32 write part of the word: give the address of that part of word 0.
    """

    def emit(b, words, index, values):
        bits = b.bitcast(_positive(b, values), ir.IntType(x.lanes))
        b.store(bits, _place(b, words, index, _I32, bits.type), align=1)

    return VOID(INT, INT, x), emit


@operation
def select_signs(low, high, index, x, y):
    """x in lanes whose bit of low[index] is set, else y; lanes from 32 on look at high[index]."""
    bits = ir.IntType(min(x.lanes, 32))

    def emit(b, low, high, index, on, off):
        words = [b.load(_place(b, word, index, _I32, bits), align=1) for word in (low, high)]
        masks = [b.bitcast(word, ir.VectorType(_I1, bits.width)) for word in words]
        return b.select(_join(b, masks[: x.lanes // bits.width]), on, off)

    return x(INT, INT, INT, x, x), emit


@operation
def prefetch(token, address, index):
    """Ask for the cache lines of the vector at address[index]."""
    kind, byte = _tile(token), _I8.as_pointer()
    signature = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
    to_read, to_keep, data = (ir.Constant(_I32, hint) for hint in (0, 3, 1))

    def emit(b, _, address, index):
        function = cgutils.get_or_insert_function(b.module, signature, "llvm.prefetch.p0")
        for offset in range(0, kind.lanes, 64 // kind.size):
            place = _place(b, address, b.add(index, _int(offset)), kind.llvm.element, _I8)
            b.call(function, [place, to_read, to_keep, data])

    return VOID(token, INT, INT), emit


# --- synapses, a literal `count` at a time ---


@operation
def weigh(token, count, tile, columns, weights, first, u):
    """u + sum of weights[j] * tile[columns[j]] over j in [first, first + count)."""
    kind, column = _tile(token), token.spec.column

    def emit(b, _, __, tile, columns, weights, first, u):
        for i in range(count.literal_value):
            j = b.add(first, _int(i))
            x = _load_row(b, tile, _load_index(b, columns, j, column), kind)
            u = _fma(b, _splat(b, _load(b, weights, j, kind.llvm.element), kind.lanes), x, u)
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
            column = _load_index(b, columns, b.add(first, _int(i)), spec.column)
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
        xs, sums = _pieces(b, x, spec.register), _pieces(b, sum, spec.register)

        def product(i):
            j = b.add(first, _int(i))
            q = _load_row(b, tile, _load_index(b, rows, j, "uint16"), kind)
            qs, weight = _pieces(b, q, spec.register), _load(b, weights, j, kind.llvm.element)
            weight = _splat(b, weight, spec.register)
            sums[:] = [_fma(b, weight, q, s) for q, s in zip(qs, sums, strict=True)]
            return _dot(b, qs, xs)

        dots = _sums(b, product, n)
        return _join(b, sums), dots

    pair = types.Tuple((kind, Vector(spec.element, n)))
    return pair(token, count, INT, INT, INT, INT, kind, kind), emit


def _load_row(b, tile, row, kind):
    return _load(b, tile, b.mul(row, _int(kind.lanes)), kind.llvm)


# --- squares of one register's lanes, between row-major memory and tiles ---


def _square(b, source, stride, rows, kind):
    """Row r of a square, or zeros where r >= rows; memory past the last row is not touched."""
    square = []
    for r in range(kind.lanes):
        valid = b.icmp_signed("<", _int(r), rows)
        offset = b.select(valid, b.mul(stride, _int(r)), _int(0))
        square.append(b.select(valid, _load(b, source, offset, kind.llvm), _zero(kind.llvm)))
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
            slopes, gates = _splat(b, slope, kind.lanes), _square(b, gate_value, stride, rows, kind)
            square = [
                b.select(_positive(b, y), x, b.fmul(slopes, x))
                for x, y in zip(square, gates, strict=True)
            ]
        for c, row in enumerate(_transposed(b, square)):
            _store(b, tile, _int(c * token.spec.lanes), row)

    return VOID(token, INT, gate, kind.scalar, INT, INT, INT), emit


@operation
def transpose_out(token, tile, target, stride, rows, spare):
    """target[r][c] = tile[c][r] for r < rows; what would go to further rows goes to `spare`."""
    kind = _register(token)

    def emit(b, _, tile, target, stride, rows, spare):
        starts = range(0, kind.lanes * token.spec.lanes, token.spec.lanes)
        square = [_load(b, tile, _int(start), kind.llvm) for start in starts]
        for r, row in enumerate(_transposed(b, square)):
            place = b.add(target, b.mul(stride, _int(r * kind.size)))
            valid = b.icmp_signed("<", _int(r), rows)
            _store(b, b.select(valid, place, spare), _int(0), row)

    return VOID(token, INT, INT, INT, INT, INT), emit
