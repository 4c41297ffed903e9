"""Instructions of PTX beside what they mean in Python: operands of each type, results, a program.

Floats are numpy scalars, integers are Python's: results are cut to the type of the destination.
"""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

LANES = 32
FORMATS = {
    "u8": "B", "s8": "b", "u16": "H", "s16": "h", "u32": "I", "s32": "i", "u64": "Q", "s64": "q",
    "f32": "f", "f64": "d",
}  # fmt: skip
NUMPY: dict[str, Any] = {"f32": np.float32, "f64": np.float64}


@dataclass(frozen=True)
class Operation:
    """`code` computes %d from %a, %b, ...; for `warp`, `meaning` maps whole columns of lanes."""

    code: str
    result: str
    operands: tuple[str, ...]
    meaning: Callable[..., Any]
    warp: bool = False


def bits(type_: str) -> int:
    return int(type_[1:])


def cut(value: int, type_: str) -> int:
    """An integer as the type holds it."""
    value &= (1 << bits(type_)) - 1
    negative = type_[0] == "s" and value >> (bits(type_) - 1)
    return value - (1 << bits(type_)) if negative else value


def _binary(bits_: int) -> Callable[[int], str]:
    return lambda a: format(a & (1 << bits_) - 1, f"0{bits_}b")


def _divide(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1) if b else -1


def _bfe(a: int, at: int, length: int, size: int, signed: bool) -> int:
    """Bit by bit, as the manual of PTX defines it."""
    at, length = at & 255, length & 255
    top = min(at + length - 1, size - 1)
    sign = a >> top & 1 if signed and length else 0
    taken = [a >> (at + i) & 1 if i < length and at + i < size else sign for i in range(size)]
    return sum(bit << i for i, bit in enumerate(taken))


def _bfi(a: int, b: int, at: int, length: int) -> int:
    at, length = at & 255, length & 255
    for i in range(length):
        if at + i < 32:
            b = b & ~(1 << at + i) | (a >> i & 1) << at + i
    return b


def _permute(a: int, b: int, selector: int) -> int:
    source = (b << 32 | a).to_bytes(8, "little")
    nibbles = [selector >> 4 * i & 15 for i in range(4)]
    byte = [source[n & 7] if n < 8 else 255 * (source[n & 7] >> 7) for n in nibbles]
    return int.from_bytes(bytes(byte), "little")


def _lop3(a: int, b: int, c: int) -> int:
    table = 0xCA  # a ? b : c
    return sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1) & 1) << i
               for i in range(32))  # fmt: skip


def _bfind(a: int, size: int) -> int:
    return (a if a >= 0 else ~a).bit_length() - 1 if a not in (0, -1) else -1


def _to_integer(type_: str, round_: Callable[[Any], Any]) -> Callable[[Any], int]:
    low, high = cut(1 << bits(type_) - 1, type_), cut((1 << bits(type_) - 1) - 1, type_)
    if type_[0] == "u":
        low, high = 0, (1 << bits(type_)) - 1

    def convert(a: Any) -> int:
        if math.isnan(a):
            return 0
        return high if a > high else low if a < low else int(round_(a))

    return convert


def _minimum(a: Any, b: Any) -> Any:
    return b if math.isnan(a) else a if math.isnan(b) or a < b or (a == b and np.signbit(a)) else b


def _compared(test: Callable[[Any, Any], bool]) -> Callable[[Any, Any], int]:
    return lambda a, b: int(test(a, b))


def _integers(t: str) -> list[Operation]:
    size, two, signed = bits(t), (t, t), t[0] == "s"
    wide = f"{t[0]}{2 * size}"
    found = [
        Operation(f"add.{t} %d, %a, %b;", t, two, lambda a, b: a + b),
        Operation(f"sub.{t} %d, %a, %b;", t, two, lambda a, b: a - b),
        Operation(f"mul.lo.{t} %d, %a, %b;", t, two, lambda a, b: a * b),
        Operation(f"mul.hi.{t} %d, %a, %b;", t, two, lambda a, b: a * b >> size),
        Operation(f"mad.lo.{t} %d, %a, %b, %c;", t, (t, t, t), lambda a, b, c: a * b + c),
        Operation(f"div.{t} %d, %a, %b;", t, two, lambda a, b: _divide(a, b) if b else -1),
        Operation(f"rem.{t} %d, %a, %b;", t, two, lambda a, b: a - b * _divide(a, b) if b else a),
        Operation(f"min.{t} %d, %a, %b;", t, two, min),
        Operation(f"max.{t} %d, %a, %b;", t, two, max),
        Operation(f"shl.b{size} %d, %a, %b;", t, (t, "u32"), lambda a, b: a << min(b, size)),
        Operation(f"shr.{t} %d, %a, %b;", t, (t, "u32"), lambda a, b: a >> min(b, size)),
        Operation(f"and.b{size} %d, %a, %b;", t, two, lambda a, b: a & b),
        Operation(f"xor.b{size} %d, %a, 0x55;", t, (t,), lambda a: a ^ 0x55),
        Operation(f"not.b{size} %d, %a;", t, (t,), lambda a: ~a),
        Operation(f"setp.lt.{t} %p, %a, %b; selp.{t} %d, 7, -3, %p;", t, two,
                  lambda a, b: 7 if a < b else -3),
        Operation(f"setp.ge.{t} %p, %a, %b; @!%p mov.b{size} %d, 5;", t, two,
                  lambda a, b: 0 if a >= b else 5),
    ]  # fmt: skip
    if size < 64:
        found += [
            Operation(f"mul.wide.{t} %d, %a, %b;", wide, two, lambda a, b: a * b),
            Operation(f"mad.wide.{t} %d, %a, %b, %c;", wide, (t, t, wide),
                      lambda a, b, c: a * b + c),
        ]  # fmt: skip
    if size > 16:
        found += [
            Operation(f"bfe.{t} %d, %a, %b, %c;", t, (t, "u32", "u32"),
                      lambda a, b, c: _bfe(a, b, c, size, signed)),
            Operation(f"bfind.{t} %d, %a;", "u32", (t,), lambda a: _bfind(a, size)),
        ]  # fmt: skip
    if signed:
        found += [
            Operation(f"abs.{t} %d, %a;", t, (t,), abs),
            Operation(f"neg.{t} %d, %a;", t, (t,), lambda a: -a),
        ]
    elif size > 16:
        found += [
            Operation(f"popc.b{size} %d, %a;", "u32", (t,), lambda a: a.bit_count()),
            Operation(f"clz.b{size} %d, %a;", "u32", (t,), lambda a: size - a.bit_length()),
            Operation(f"brev.b{size} %d, %a;", t, (t,),
                      lambda a: int(_binary(size)(a)[::-1], 2)),
        ]  # fmt: skip
    return found


def _words() -> list[Operation]:
    u, s, three = "u32", "s32", ("u32", "u32", "u32")
    return [
        Operation("prmt.b32 %d, %a, %b, %c;", u, three, _permute),
        Operation("lop3.b32 %d, %a, %b, %c, 0xCA;", u, three, _lop3),
        Operation("bfi.b32 %d, %a, %b, %c, %e;", u, (u, u, u, u), _bfi),
        Operation("shf.l.wrap.b32 %d, %a, %b, %c;", u, three,
                  lambda a, b, c: (b << 32 | a) << (c & 31) >> 32),
        Operation("shf.r.wrap.b32 %d, %a, %b, %c;", u, three,
                  lambda a, b, c: (b << 32 | a) >> (c & 31)),
        Operation("shf.r.clamp.b32 %d, %a, %b, %c;", u, three,
                  lambda a, b, c: (b << 32 | a) >> min(c, 32)),
        Operation("sad.s32 %d, %a, %b, %c;", s, (s, s, s), lambda a, b, c: c + abs(a - b)),
        Operation("slct.u32.s32 %d, %a, %b, %c;", u, (u, u, s), lambda a, b, c: a if c >= 0 else b),
        Operation("set.gt.u32.s32 %d, %a, %b;", u, (s, s), lambda a, b: -(a > b)),
        Operation("cnot.b32 %d, %a;", u, (u,), lambda a: int(a == 0)),
        Operation("mov.b32 {%h, %g}, %a; mov.b32 %d, {%g, %h};", u, (u,),
                  lambda a: a << 16 | a >> 16),
        Operation("setp.lt.and.s32 %p|%q, %a, %b, 1; selp.u32 %d, 1, 0, %q;", u, (s, s),
                  lambda a, b: int(a >= b)),
        *(Operation(f"cvt.{to}.{of} %d, %a;", to, (of,), lambda a: a)
          for to in ("u16", "s16", "u32", "s32", "u64", "s64")
          for of in ("u16", "s16", "u32", "s32", "u64", "s64") if to[1:] != of[1:]),
        Operation("cvt.s32.s8 %d, %a;", s, (s,), lambda a: cut(a, "s8")),
        Operation("cvt.u32.u8 %d, %a;", u, (u,), lambda a: cut(a, "u8")),
    ]  # fmt: skip


def _floats(t: str) -> list[Operation]:
    kind, two = NUMPY[t], (t, t)
    fused = np.longdouble if t == "f64" else np.float64  # near enough for the operands below
    found = [
        Operation(f"add.{t} %d, %a, %b;", t, two, lambda a, b: a + b),
        Operation(f"sub.{t} %d, %a, %b;", t, two, lambda a, b: a - b),
        Operation(f"mul.{t} %d, %a, %b;", t, two, lambda a, b: a * b),
        Operation(f"div.rn.{t} %d, %a, %b;", t, two, lambda a, b: a / b),
        Operation(f"sqrt.rn.{t} %d, %a;", t, (t,), np.sqrt),
        Operation(f"rcp.rn.{t} %d, %a;", t, (t,), lambda a: kind(1) / a),
        Operation(f"fma.rn.{t} %d, %a, %b, %c;", t, (t, t, t),
                  lambda a, b, c: kind(fused(a) * fused(b) + fused(c))),
        Operation(f"abs.{t} %d, %a;", t, (t,), abs),
        Operation(f"neg.{t} %d, %a;", t, (t,), lambda a: -a),
        Operation(f"min.{t} %d, %a, %b;", t, two, _minimum),
        Operation(f"max.{t} %d, %a, %b;", t, two, lambda a, b: -_minimum(-a, -b)),
        Operation(f"copysign.{t} %d, %a, %b;", t, two, lambda a, b: np.copysign(b, a)),
        *(Operation(f"cvt.{mode}.{to}.{t} %d, %a;", to, (t,), _to_integer(to, round_))
          for to in ("s32", "u32", "s64")
          for mode, round_ in [("rzi", np.trunc), ("rni", np.rint), ("rmi", np.floor)]),
        *(Operation(f"cvt.rn.{t}.{of} %d, %a;", t, (of,), kind) for of in ("s32", "u32", "u64")),
        Operation(f"cvt.rpi.{t}.{t} %d, %a;", t, (t,), np.ceil),
        Operation(f"selp.{t} %d, %a, 0d3FF0000000000000, %p;" if t == "f64" else
                  f"selp.{t} %d, %a, 0f3F800000, %p;", t, (t,), lambda a: kind(1)),
    ]  # fmt: skip
    tests: dict[str, Callable[[Any, Any], bool]] = {
        "eq": lambda a, b: a == b,
        "ne": lambda a, b: a < b or a > b,
        "neu": lambda a, b: a != b,
        "lt": lambda a, b: a < b,
        "geu": lambda a, b: not a < b,
        "nan": lambda a, b: a != a or b != b,
    }
    return found + [
        Operation(f"setp.{name}.{t} %p, %a, %b; selp.u32 %d, 1, 0, %p;", "u32", two, _compared(f))
        for name, f in tests.items()
    ]


def _halves() -> list[Operation]:
    def narrow(a: Any) -> int:
        return int(np.float16(a).view(np.uint16))

    return [
        Operation("cvt.f32.f16 %d, %a;", "f32", ("u16",),
                  lambda a: np.float32(np.uint16(a).view(np.float16))),
        Operation("cvt.rn.f16.f32 %d, %a;", "u16", ("f32",), narrow),
        Operation("cvt.rn.f16x2.f32 %d, %a, %b;", "u32", ("f32", "f32"),
                  lambda a, b: narrow(a) << 16 | narrow(b)),
        Operation("cvt.rn.f32.f64 %d, %a;", "f32", ("f64",), np.float32),
        Operation("cvt.rni.f32.f32 %d, %a; ex2.approx.f32 %d, %d;", "f32", ("f32",),
                  lambda a: np.exp2(np.rint(a))),  # exact, of integers: expm1 takes no other
        Operation("cvt.f64.f32 %d, %a;", "f64", ("f32",), np.float64),
    ]  # fmt: skip


def _lanes() -> list[Operation]:
    """Shuffles also say whether the source was inside: its negation is added."""
    u, s, lanes = "u32", "s32", range(LANES)

    def shuffle(mode: str, at: int, limits: int, source: Callable[[int], int]) -> Operation:
        code = f"shfl.sync.{mode}.b32 %d|%p, %a, {at}, {limits}, -1; @!%p add.u32 %d, %d, 1;"

        def meaning(a: list[int]) -> list[int]:
            return [a[source(i)] if source(i) >= 0 else a[i] + 1 for i in lanes]

        return Operation(code, u, (u,), meaning, warp=True)

    return [
        shuffle("bfly", 5, 31, lambda i: i ^ 5),
        shuffle("idx", 7, 31, lambda i: 7),
        shuffle("idx", 3, 0x181F, lambda i: i & ~7 | 3),  # segments of 8 lanes
        shuffle("up", 4, 0, lambda i: i - 4),
        shuffle("down", 4, 31, lambda i: i + 4 if i + 4 < LANES else -1),
        shuffle("down", 3, 0x181F, lambda i: i + 3 if (i & 7) + 3 < 8 else -1),
        Operation("setp.lt.s32 %p, %a, 0; vote.sync.ballot.b32 %d, %p, -1;", u, (s,),
                  lambda a: [sum((x < 0) << i for i, x in enumerate(a))] * LANES, warp=True),
        Operation("setp.lt.s32 %p, %a, 0; vote.sync.any.pred %q, %p, -1; selp.u32 %d, 1, 0, %q;",
                  u, (s,), lambda a: [int(min(a) < 0)] * LANES, warp=True),
        Operation("setp.lt.s32 %p, %a, 0; vote.sync.all.pred %q, !%p, -1; selp.u32 %d, 1, 0, %q;",
                  u, (s,), lambda a: [int(min(a) >= 0)] * LANES, warp=True),
        Operation("redux.sync.add.s32 %d, %a, -1;", s, (s,), lambda a: [sum(a)] * LANES, warp=True),
        Operation("redux.sync.min.s32 %d, %a, -1;", s, (s,), lambda a: [min(a)] * LANES, warp=True),
        Operation("redux.sync.max.u32 %d, %a, -1;", u, (u,), lambda a: [max(a)] * LANES, warp=True),
        Operation("mov.u32 %d, %lanemask_lt;", u, (u,),
                  lambda a: [(1 << i) - 1 for i in lanes], warp=True),
    ]  # fmt: skip


OPERATIONS = [
    *(operation for t in ("u16", "s16", "u32", "s32", "u64", "s64") for operation in _integers(t)),
    *_words(), *_floats("f32"), *_floats("f64"), *_halves(), *_lanes(),
]  # fmt: skip


def draw(type_: str, chance: random.Random) -> Any:
    """Awkward values often, and small integers for shifts and lengths."""
    if type_[0] == "f":
        awkward = [0.0, -0.0, 1.0, -1.5, 2.5, math.nan, math.inf, -math.inf, 3e9, -3e9, 65519.0]
        value = chance.choice(awkward) if chance.random() < 0.5 else chance.uniform(-100, 100)
        return NUMPY[type_](value)
    edges = [0, 1, 31, 32, -1, 1 << bits(type_) - 1, (1 << bits(type_) - 1) - 1]
    kinds = [chance.choice(edges), chance.randrange(70), chance.getrandbits(64)]
    return cut(chance.choice(kinds), type_)


def program() -> str:
    """PTX with an entry operation_N for each; their parameter holds four inputs and the output."""
    head = ".version 9.0\n.target sm_90\n.address_size 64\n\n"
    return head + "".join(_entry(i, operation) for i, operation in enumerate(OPERATIONS))


def _entry(number: int, operation: Operation) -> str:
    name, letters = f"operation_{number}", "abce"[: len(operation.operands)]
    registers = zip("d" + letters, (operation.result, *operation.operands), strict=True)
    declared = [f".reg .{_register(t)} %{letter};" for letter, t in registers]
    lines = [".reg .pred %p, %q;", ".reg .b16 %g, %h;", ".reg .b32 %r1;", ".reg .b64 %rd<3>;"]
    lines += [*declared, "mov.u32 %r1, %tid.x;", "setp.ne.u32 %p, %r1, %r1;"]
    lines += [f"mov.b{bits(operation.result)} %d, 0;"] if operation.result[0] != "f" else []
    for place, (letter, t) in enumerate(zip(letters, operation.operands, strict=True)):
        lines += [*_address(name, place, t), f"ld.global.{t} %{letter}, [%rd2];"]
    lines += [operation.code, *_address(name, 4, operation.result)]
    lines += [f"st.global.{operation.result} [%rd2], %d;", "ret;"]
    body = "\n".join("\t" + line for line in lines)
    parameter = f".param .align 8 .b8 {name}_param_0[40]"
    return f".visible .entry {name}(\n\t{parameter}\n)\n{{\n{body}\n}}\n\n"


def _register(type_: str) -> str:
    return type_ if type_[0] == "f" else f"b{bits(type_)}"


def _address(name: str, place: int, type_: str) -> list[str]:
    size = bits(type_) // 8
    return [
        f"ld.param.u64 %rd1, [{name}_param_0+{8 * place}];",
        f"mad.wide.u32 %rd2, %r1, {size}, %rd1;",
    ]


def pack(type_: str, values: list[Any]) -> bytes:
    return struct.pack(f"{len(values)}{FORMATS[type_]}", *values)


def expected(operation: Operation, columns: list[list[Any]]) -> bytes:
    """The bytes of all results; every NaN is the same one."""
    if operation.warp:
        warps = range(0, len(columns[0]), LANES)
        values = [v for w in warps for v in operation.meaning(*(c[w : w + LANES] for c in columns))]
    else:
        with np.errstate(all="ignore"):
            values = [operation.meaning(*row) for row in zip(*columns, strict=True)]
    if operation.result[0] == "f":
        return canonical(operation.result, np.array(values, NUMPY[operation.result]).tobytes())
    return pack(operation.result, [cut(int(value), operation.result) for value in values])


def canonical(type_: str, data: bytes) -> bytes:
    if type_[0] != "f":
        return data
    values = np.frombuffer(data, NUMPY[type_]).copy()
    values[np.isnan(values)] = np.nan
    return bytes(values.tobytes())
