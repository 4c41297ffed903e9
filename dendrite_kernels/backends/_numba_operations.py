"""What kernels call: operations on memory and vectors, made of the emitters of `_numba_vector.py`.

The first argument `token` stands for a `Spec` (`_numba_token.py`): a tile's vector has `spec.lanes`
elements. An address is an int64, an index counts elements, nothing is bounds-checked and nothing
allocated. Each `emit` gets the LLVM builder and the values of the arguments; see `operation`.
"""

from __future__ import annotations

from dataclasses import replace

from numba.core import types

from . import _numba_vector as llvm
from ._numba_token import Token, operation
from ._numba_vector import Vector

INT, VOID = types.int64, types.void


def _tile(token):
    return Vector(token.spec.element, token.spec.lanes)


def _register(token):
    return Vector(token.spec.element, token.spec.register)


# --- facts about the token ---


def _fact(read, kind, constant):
    return operation(lambda token: (kind(token), lambda b, _: constant(read(token))))


lanes_of = _fact(lambda token: token.spec.lanes, INT, llvm.integer)
register_of = _fact(lambda token: token.spec.register, INT, llvm.integer)
size_of = _fact(lambda token: _tile(token).size, INT, llvm.integer)
is_linear = _fact(lambda token: token.spec.linear, types.boolean, llvm.boolean)


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
    return kind.scalar(token, INT, INT), lambda b, _, a, i: llvm.load(b, a, i, kind.llvm.element)


@operation
def store(token, address, index, value):
    """address[index] = value, an element."""
    scalar = _tile(token).scalar
    return VOID(token, INT, INT, scalar), lambda b, _, a, i, x: llvm.store(b, a, i, x)


@operation
def clear(token, address, begin, end):
    """address[begin:end] = 0."""
    kind = _tile(token).llvm.element
    return VOID(token, INT, INT, INT), lambda b, _, *args: llvm.clear(b, *args, kind)


@operation
def load_column(token, address, index):
    """The column index address[index]."""
    emit = lambda b, _, a, i: llvm.load_index(b, a, i, token.spec.column)  # noqa: E731
    return INT(token, INT, INT), emit


def _index_loader(name):
    emit = lambda b, address, index: llvm.load_index(b, address, index, name)  # noqa: E731
    return operation(lambda address, index: (INT(INT, INT), emit))


load_uint16, load_int32, load_int64 = map(_index_loader, ("uint16", "int32", "int64"))


# --- one value per sample ---


@operation
def vload(token, address, index):
    """The vector address[index : index + lanes]."""
    kind = _tile(token)
    return kind(token, INT, INT), lambda b, _, a, i: llvm.load(b, a, i, kind.llvm)


@operation
def vstore(address, index, x):
    """address[index : index + lanes] = x."""
    return VOID(INT, INT, x), llvm.store


@operation
def accumulate(address, index, x):
    """address[index : index + lanes] += x."""

    def emit(b, address, index, x):
        llvm.store(b, address, index, b.fadd(llvm.load(b, address, index, x.type), x))

    return VOID(INT, INT, x), emit


@operation
def prefetch(token, address, index):
    """Ask for the cache lines of the vector at address[index]."""
    kind = _tile(token).llvm
    return VOID(token, INT, INT), lambda b, _, a, i: llvm.prefetch(b, a, i, kind)


@operation
def splat(token, scalar):
    """The same element in every lane."""
    kind = _tile(token)
    return kind(token, kind.scalar), lambda b, _, scalar: llvm.splat(b, scalar, kind.lanes)


add = operation(lambda x, y: (x(x, x), lambda b, *args: b.fadd(*args)))
multiply = operation(lambda x, y: (x(x, x), lambda b, *args: b.fmul(*args)))
multiply_add = operation(lambda x, y, z: (x(x, x, x), llvm.fma))  # x * y + z
total = operation(lambda x: (x.scalar(x), llvm.total))  # the sum of all lanes


@operation
def leaky(x, slope):
    """x where x > 0, else slope * x; NaN stays NaN."""
    return x(x, x), lambda b, x, slope: llvm.leaky(b, x, x, slope)


@operation
def store_signs(words, index, x):
    """Bit i of the 32-bit word words[index]: is lane i of x positive.

    Fewer lanes than 32 write part of the word: give the address of that part of word 0.
    """
    return VOID(INT, INT, x), llvm.store_signs


@operation
def select_signs(low, high, index, x, y):
    """x in lanes whose bit of low[index] is set, else y; lanes from 32 on look at high[index]."""
    return x(INT, INT, INT, x, x), llvm.select_signs


# --- synapses, a literal `count` at a time ---


def _load_row(b, tile, row, kind):
    return llvm.load(b, tile, b.mul(row, llvm.integer(kind.lanes)), kind.llvm)


@operation
def weigh(token, count, tile, columns, weights, first, u):
    """u + sum of weights[j] * tile[columns[j]] over j in [first, first + count)."""
    kind, column = _tile(token), token.spec.column

    def emit(b, _, __, tile, columns, weights, first, u):
        for i in range(count.literal_value):
            j = b.add(first, llvm.integer(i))
            x = _load_row(b, tile, llvm.load_index(b, columns, j, column), kind)
            weight = llvm.load(b, weights, j, kind.llvm.element)
            u = llvm.fma(b, llvm.splat(b, weight, kind.lanes), x, u)
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
        qs = llvm.pieces(b, q, spec.register)

        def product(i):
            column = llvm.load_index(b, columns, b.add(first, llvm.integer(i)), spec.column)
            return llvm.dot(b, qs, llvm.pieces(b, _load_row(b, tile, column, kind), spec.register))

        return llvm.sums(b, product, n)

    return Vector(spec.element, n)(token, count, INT, INT, INT, kind), emit


@operation
def gather(token, count, tile, rows, weights, first, x, sum):
    """For slots j in [first, first + count) and q = tile[rows[j]] (uint16 rows): the pair of
    sum + weights[j] * q over all j, and a vector whose lane i is the sum over samples of q * x.
    """
    kind, spec, n = _tile(token), token.spec, count.literal_value

    def emit(b, _, __, tile, rows, weights, first, x, sum):
        xs, parts = llvm.pieces(b, x, spec.register), llvm.pieces(b, sum, spec.register)

        def product(i):
            j = b.add(first, llvm.integer(i))
            q = _load_row(b, tile, llvm.load_index(b, rows, j, "uint16"), kind)
            qs, weight = llvm.pieces(b, q, spec.register), llvm.load(b, weights, j, x.type.element)
            weight = llvm.splat(b, weight, spec.register)
            parts[:] = [llvm.fma(b, weight, q, s) for q, s in zip(qs, parts, strict=True)]
            return llvm.dot(b, qs, xs)

        dots = llvm.sums(b, product, n)
        return llvm.join(b, parts), dots

    pair = types.Tuple((kind, Vector(spec.element, n)))
    return pair(token, count, INT, INT, INT, INT, kind, kind), emit


# --- squares of one register's lanes, between row-major memory and tiles ---


def _square(b, source, stride, rows, kind):
    """Row r of a square, or zeros where r >= rows; memory past the last row is not touched."""
    square = []
    for r in range(kind.lanes):
        valid = b.icmp_signed("<", llvm.integer(r), rows)
        offset = b.select(valid, b.mul(stride, llvm.integer(r)), llvm.integer(0))
        row = llvm.load(b, source, offset, kind.llvm)
        square.append(b.select(valid, row, llvm.zero(kind.llvm)))
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
            slopes = llvm.splat(b, slope, kind.lanes)
            gates = _square(b, gate_value, stride, rows, kind)
            pairs = zip(gates, square, strict=True)
            square = [llvm.leaky(b, y, x, slopes) for y, x in pairs]
        for c, row in enumerate(llvm.transposed(b, square)):
            llvm.store(b, tile, llvm.integer(c * token.spec.lanes), row)

    return VOID(token, INT, gate, kind.scalar, INT, INT, INT), emit


@operation
def transpose_out(token, tile, target, stride, rows, spare):
    """target[r][c] = tile[c][r] for r < rows; what would go to further rows goes to `spare`."""
    kind = _register(token)

    def emit(b, _, tile, target, stride, rows, spare):
        starts = range(0, kind.lanes * token.spec.lanes, token.spec.lanes)
        square = [llvm.load(b, tile, llvm.integer(start), kind.llvm) for start in starts]
        for r, row in enumerate(llvm.transposed(b, square)):
            place = b.add(target, b.mul(stride, llvm.integer(r * kind.size)))
            valid = b.icmp_signed("<", llvm.integer(r), rows)
            llvm.store(b, b.select(valid, place, spare), llvm.integer(0), row)

    return VOID(token, INT, INT, INT, INT, INT), emit
