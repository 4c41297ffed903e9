"""PTX instructions -> C++ statements: tables of those that are expressions, functions for the rest.

Memory and what lanes do together is left to runtime.h, which checks it; arithmetic without an
operator in C++ is in operations.h. What is not known here is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.cuda_emulator.ptx.parse import Entry, Instruction, UnknownPtx

TYPES = {
    "pred": "bool",
    **{f"{kind}{bits}": f"uint{bits}_t" for kind in ("b", "u") for bits in (8, 16, 32, 64)},
    **{f"s{bits}": f"int{bits}_t" for bits in (8, 16, 32, 64)},
    "f16": "uint16_t",  # as bits: only conversions know it
    "bf16": "uint16_t",
    "f16x2": "uint32_t",
    "bf16x2": "uint32_t",
    "f32": "float",
    "f64": "double",
}
HALF_TYPES = {"f16", "bf16", "f16x2", "bf16x2"}
BITS = {"bool": 1, "float": 32, "double": 64} | {
    f"{sign}int{bits}_t": bits for sign in ("u", "") for bits in (8, 16, 32, 64)
}

# Opcode without its last type -> C++. {a} {b} {c} {d} are the operands behind the destination, as
# values of the last type, or of the type behind the colon.
RULES = {
    **dict.fromkeys(("add", "add.rn"), "{a} + {b}"),
    **dict.fromkeys(("sub", "sub.rn"), "{a} - {b}"),
    **dict.fromkeys(("mul", "mul.rn", "mul.lo"), "{a} * {b}"),
    "mul.hi": "multiply_high({a}, {b})",
    "mad.lo": "{a} * {b} + {c}",
    "mad.hi": "multiply_high({a}, {b}) + {c}",
    "fma.rn": "std::fma({a}, {b}, {c})",
    "div": "divide({a}, {b})",
    "div.rn": "{a} / {b}",
    "rem": "remainder({a}, {b})",
    "rcp.rn": "1 / {a}",
    "sqrt.rn": "std::sqrt({a})",
    "ex2.approx": "std::exp2({a})",
    "abs": "absolute({a})",
    "neg": "-{a}",
    "min": "minimum({a}, {b})",
    "max": "maximum({a}, {b})",
    "min.NaN": "nan_or({a}, {b}, minimum({a}, {b}))",
    "max.NaN": "nan_or({a}, {b}, maximum({a}, {b}))",
    "copysign": "std::copysign({b}, {a})",
    "sad": "{c} + ({a} < {b} ? {b} - {a} : {a} - {b})",
    "and": "{a} & {b}",
    "or": "{a} | {b}",
    "xor": "{a} ^ {b}",
    "not": "invert({a})",
    "cnot": "{a} == 0",
    "lop3": "lop3({a}, {b}, {c}, {d:u32})",
    "shl": "shift_left({a}, {b:u32})",
    "shr": "shift_right({a}, {b:u32})",
    "shf.l.wrap": "funnel_left({a}, {b}, {c:u32} & 31)",
    "shf.r.wrap": "funnel_right({a}, {b}, {c:u32} & 31)",
    "shf.l.clamp": "funnel_left({a}, {b}, std::min(32u, {c:u32}))",
    "shf.r.clamp": "funnel_right({a}, {b}, std::min(32u, {c:u32}))",
    "bfe": "extract({a}, {b:u32}, {c:u32})",
    "bfi": "insert({a}, {b}, {c:u32}, {d:u32})",
    "brev": "reverse({a})",
    "prmt": "permute({a}, {b}, {c})",
    "selp": "{c:pred} ? {a} : {b}",
}
# The same for instructions with a destination of another type; `wide` is twice as wide.
RETYPED = {
    "mul.wide": ("wide", "WIDE{a} * WIDE{b}"),
    "mad.wide": ("wide", "WIDE{a} * WIDE{b} + {c:wide}"),
    "popc": ("u32", "count_ones({a})"),
    "clz": ("u32", "leading_zeros({a})"),
    "bfind": ("u32", "highest_bit({a})"),
}
# Of numbers in order; the second column holds for NaN too.
COMPARE = {
    "eq": "{a} == {b}", "equ": "!({a} < {b} || {a} > {b})",
    "ne": "({a} < {b} || {a} > {b})", "neu": "{a} != {b}",
    "lt": "{a} < {b}", "ltu": "!({a} >= {b})", "lo": "{a} < {b}",
    "le": "{a} <= {b}", "leu": "!({a} > {b})", "ls": "{a} <= {b}",
    "gt": "{a} > {b}", "gtu": "!({a} <= {b})", "hi": "{a} > {b}",
    "ge": "{a} >= {b}", "geu": "!({a} < {b})", "hs": "{a} >= {b}",
    "num": "({a} == {a} && {b} == {b})", "nan": "({a} != {a} || {b} != {b})",
}  # fmt: skip
COMBINE = {"and": "&", "or": "|", "xor": "^"}
ROUND = {"rni": "std::nearbyint", "rzi": "std::trunc", "rmi": "std::floor", "rpi": "std::ceil"}
# Conversions of half precision: (destination, source) -> C++.
HALVES = {
    "f32.f16": "dk::widen_f16({a})",
    "f32.bf16": "dk::float_of_bits(uint32_t({a}) << 16)",
    "rn.f16.f32": "dk::narrow_f16({a})",
    "rn.bf16.f32": "dk::narrow_bf16({a})",
    "rn.f16x2.f32": "uint32_t(dk::narrow_f16({a})) << 16 | dk::narrow_f16({b})",
    "rn.bf16x2.f32": "uint32_t(dk::narrow_bf16({a})) << 16 | dk::narrow_bf16({b})",
}
SPECIAL = {
    **{f"%tid.{axis}": f"threadIdx.{axis}" for axis in "xyz"},
    **{f"%ntid.{axis}": f"blockDim.{axis}" for axis in "xyz"},
    **{f"%ctaid.{axis}": f"blockIdx.{axis}" for axis in "xyz"},
    **{f"%nctaid.{axis}": f"gridDim.{axis}" for axis in "xyz"},
    "%laneid": "uint32_t(me.lane)",
    "%lanemask_eq": "(1u << me.lane)",
    "%lanemask_lt": "((1u << me.lane) - 1)",
    "%lanemask_le": "((2u << me.lane) - 1)",
    "%lanemask_gt": "~((2u << me.lane) - 1)",
    "%lanemask_ge": "~((1u << me.lane) - 1)",
    "WARP_SZ": "32u",
}
CACHE_HINTS = re.compile(r"nc|c[agsv]|lu|volatile|L[12]::\w+")  # change no value


@dataclass
class Scope:
    """What names mean inside an entry."""

    entry: Entry
    registers: dict[str, str] = field(default_factory=dict)  # name -> C++ type

    def value(self, operand: str, cpp: str) -> str:
        """C++ expression of an operand, of this C++ type."""
        if operand in self.registers:
            return _cast(variable(operand), self.registers[operand], cpp)
        if operand[:1] == "!":
            return f"!{self.value(operand[1:], cpp)}"
        if operand[:2] in ("0f", "0F"):
            return _cast(f"__builtin_bit_cast(float, 0x{operand[2:]}u)", "float", cpp)
        if operand[:2] in ("0d", "0D"):
            return _cast(f"__builtin_bit_cast(double, 0x{operand[2:]}ull)", "double", cpp)
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", operand):
            return f"({cpp}){operand.rstrip('U')}ull"  # minus wraps around, as it should
        if operand in SPECIAL:
            return f"({cpp}){SPECIAL[operand]}"
        if operand == self.entry.parameter:
            return f"({cpp})parameter"
        if operand in self.entry.shared:
            return f"({cpp})0"
        raise UnknownPtx(f"operand {operand}")

    def assign(self, operand: str, expression: str, cpp: str) -> str:
        """C++ statement that puts a value of this C++ type into a register."""
        if operand == "_":
            return f"(void)({expression});"
        if operand not in self.registers:
            raise UnknownPtx(f"destination {operand}")
        cast = _cast(f"({cpp})({expression})", cpp, self.registers[operand])
        return f"{variable(operand)} = {cast};"

    def address(self, operand: str) -> str:
        """[register + offset] as 64 bits; registers of 32 bits wrap around."""
        found = re.fullmatch(r"\[([^\s+\]]+)(?:\s*\+\s*(-?\w+))?\]", operand)
        if found is None:
            raise UnknownPtx(f"address {operand}")
        base, offset = found[1], found[2] or "0"
        cpp = self.registers.get(base, "uint64_t")
        return f"(uint64_t)({cpp})({self.value(base, cpp)} + ({cpp})({offset}ll))"


def translated(scope: Scope, i: Instruction) -> str:
    if i.name in HANDLERS:
        return HANDLERS[i.name](scope, i)
    if not i.modifiers or i.type not in TYPES.keys() - HALF_TYPES:
        raise UnknownPtx("instruction")
    rule = i.opcode.rpartition(".")[0]
    if rule in RULES:
        return _apply(scope, i, RULES[rule], TYPES[i.type])
    if rule in RETYPED:
        type_, expression = RETYPED[rule]
        if "wide" in expression or type_ == "wide":
            wide = f"{i.type[0]}{int(i.type[1:]) * 2}"
            type_ = type_.replace("wide", wide)
            expression = expression.replace("wide", wide).replace("WIDE", TYPES[wide])
        return _apply(scope, i, expression, TYPES[type_])
    raise UnknownPtx("instruction")


def _apply(scope: Scope, i: Instruction, rule: str, cpp: str) -> str:
    return scope.assign(i.operands[0], _fill(scope, i, rule), cpp)


def _fill(scope: Scope, i: Instruction, rule: str) -> str:
    """{a}, {b:u32} of a rule -> C++ of the first, the second operand behind the destination."""

    def operand(match: re.Match[str]) -> str:
        place = 1 + "abcd".index(match[1])
        if place >= len(i.operands):
            raise UnknownPtx("number of operands")
        return f"({scope.value(i.operands[place], TYPES[match[2] or i.type])})"

    return re.sub(r"\{([abcd])(?::(\w+))?\}", operand, rule)


def variable(name: str) -> str:
    return name.replace("%", "v_").replace("$", "l_")


def _cast(expression: str, from_: str, to: str) -> str:
    """C++ of a register's bits seen as another type; integers are cut or extended."""
    if from_ == to:
        return expression
    if "bool" in (from_, to):
        raise UnknownPtx("use of a predicate")
    floats = {"float", "double"}
    if not floats & {from_, to}:
        return f"({to})({expression})"
    if BITS[from_] != BITS[to]:
        raise UnknownPtx("use of a register of another width")
    return f"__builtin_bit_cast({to}, {expression})"


def _elements(operand: str) -> list[str]:
    """{a, b} -> its registers; a lone register is a vector of one."""
    return re.findall(r"[^\s{},]+", operand)


def _allow(i: Instruction, modifiers: tuple[str, ...], *known: str) -> None:
    for modifier in modifiers:
        if modifier not in known:
            raise UnknownPtx(f"modifier {modifier}")


def _space(i: Instruction) -> str:
    """Where a load or store goes; checks its other modifiers."""
    rest = [m for m in i.modifiers[:-1] if not CACHE_HINTS.fullmatch(m)]
    space = rest[0] if rest and rest[0] in ("global", "shared", "param") else ""
    _allow(i, tuple(rest[bool(space) :]), "v2", "v4", "v8")
    return space or "generic"


def _load(scope: Scope, i: Instruction) -> str:
    cpp, names, space = TYPES[i.type], _elements(i.operands[0]), _space(i)
    address = scope.address(i.operands[1])
    source = address
    if space != "param":
        source = f"read(me, {i.line}, {space}, {address}, {len(names)} * sizeof({cpp}))"
    # A pointer among the parameters becomes the address that the checks know.
    element = "checked_pointer({})" if space == "param" and cpp == "uint64_t" else "{}"
    parts = [scope.assign(n, element.format(f"from[{k}]"), cpp) for k, n in enumerate(names)]
    return f"const {cpp}* from = (const {cpp}*){source}; " + " ".join(parts)


def _store(scope: Scope, i: Instruction) -> str:
    cpp, names, space = TYPES[i.type], _elements(i.operands[1]), _space(i)
    if space == "param":
        raise UnknownPtx("store to parameters")
    address = scope.address(i.operands[0])
    to = f"write(me, {i.line}, {space}, {address}, {len(names)} * sizeof({cpp}))"
    parts = [f"to[{k}] = {scope.value(name, cpp)};" for k, name in enumerate(names)]
    return f"{cpp}* to = ({cpp}*){to}; " + " ".join(parts)


def _move(scope: Scope, i: Instruction) -> str:
    """A register, or a wide one from or into the parts of a vector."""
    into, source = _elements(i.operands[0]), _elements(i.operands[1])
    if len(into) == len(source) == 1:
        return scope.assign(into[0], scope.value(source[0], TYPES[i.type]), TYPES[i.type])
    bits = int(i.type[1:])
    part = bits // max(len(into), len(source))
    whole = f"uint{bits}_t"
    if len(source) > 1:
        parts = [f"({whole}){scope.value(s, f'uint{part}_t')}" for s in source]
        sum_ = " | ".join(f"{value} << {part * k}" for k, value in enumerate(parts))
        return scope.assign(into[0], sum_, whole)
    split = [scope.assign(r, f"from >> {part * k}", f"uint{part}_t") for k, r in enumerate(into)]
    return f"const {whole} from = {scope.value(source[0], whole)}; " + " ".join(split)


def _convert_address(scope: Scope, i: Instruction) -> str:
    """cvta.to.shared.u64: from generic; cvta.shared.u64: to generic."""
    to_space, space = i.modifiers[0] == "to", i.modifiers[-2]
    _allow(i, (space,), "global", "shared")
    offset = "kSharedWindow" if space == "shared" else "0"
    return _apply(scope, i, f"{{a}} {'-' if to_space else '+'} {offset}", TYPES[i.type])


def _convert(scope: Scope, i: Instruction) -> str:
    *how, to, from_ = i.modifiers
    if (key := ".".join(i.modifiers)) in HALVES:
        return _apply(scope, i, HALVES[key], TYPES[to])
    if {to, from_} & HALF_TYPES:
        raise UnknownPtx("conversion")
    cpp, to_float, from_float = TYPES[to], to[0] == "f", from_[0] == "f"
    saturates = how[-1:] == ["sat"] and not to_float
    how = how[:-1] if saturates else how
    round_ = ROUND[how[0]] if how and how[0] in ROUND and from_float else ""
    needs_rn = to_float and not round_ and (not from_float or to < from_)
    if how != (["rn"] if needs_rn else how[:1] if round_ else []):
        raise UnknownPtx("rounding")
    if from_float and not to_float:
        return _apply(scope, i, f"to_integer<{cpp}>({round_}({{a}}))", cpp)
    return _apply(scope, i, f"saturate<{cpp}>({{a}})" if saturates else f"{round_}({{a}})", cpp)


def _comparison(scope: Scope, i: Instruction, compare: str) -> str:
    rule = COMPARE.get(compare)
    if rule is None:
        raise UnknownPtx("comparison")
    return _fill(scope, i, rule)


def _set_predicate(scope: Scope, i: Instruction) -> str:
    """setp.lt.and.s32 p|q, a, b, c: p = (a < b) & c, q = !(a < b) & c"""
    compare, *combine = i.modifiers[:-1]
    test, _, opposite = i.operands[0].partition("|")
    result = _comparison(scope, i, compare)
    rest = f" {COMBINE[combine[0]]} {scope.value(i.operands[3], 'bool')}" if combine else ""
    code = f"const bool test = {result}; " + scope.assign(test, f"test{rest}", "bool")
    return code + (" " + scope.assign(opposite, f"!test{rest}", "bool") if opposite else "")


def _set(scope: Scope, i: Instruction) -> str:
    """set.lt.u32.f32: all ones, or 1.0"""
    compare, to, _ = i.modifiers
    true = "1.0f" if to == "f32" else "~0u"
    return scope.assign(i.operands[0], f"{_comparison(scope, i, compare)} ? {true} : 0", TYPES[to])


def _select_by_sign(scope: Scope, i: Instruction) -> str:
    """slct.u32.s32 d, a, b, c: c >= 0 ? a : b"""
    to, _ = i.modifiers
    return _apply(scope, i, f"{{c}} >= 0 ? {{a:{to}}} : {{b:{to}}}", TYPES[to])


def _branch(scope: Scope, i: Instruction) -> str:
    _allow(i, i.modifiers, "uni")
    return f"goto {variable(i.operands[0])};"


def _return(scope: Scope, i: Instruction) -> str:
    _allow(i, i.modifiers, "uni")
    return "return;"


def _nothing(scope: Scope, i: Instruction) -> str:
    return ""


def _barrier(scope: Scope, i: Instruction) -> str:
    if i.opcode in ("bar.warp.sync", "barrier.warp.sync"):
        return f"warp_barrier(me, {i.line}, {scope.value(i.operands[0], 'uint32_t')});"
    _allow(i, i.modifiers, "sync", "cta", "aligned")
    if i.operands != ("0",):
        raise UnknownPtx("barrier: expected the one of the whole block")
    return f"block_barrier(me, {i.line});"


def _shuffle(scope: Scope, i: Instruction) -> str:
    """shfl.sync.bfly.b32 d|p, value, lane, limits, members"""
    sync, mode, type_ = i.modifiers
    _allow(i, (sync, mode, type_), "sync", "bfly", "idx", "up", "down", "b32")
    into, _, inside = i.operands[0].partition("|")
    sources = ", ".join(scope.value(operand, "uint32_t") for operand in i.operands[1:])
    call = f"shuffle(me, {i.line}, '{mode[0]}', inside, {sources})"
    code = f"bool inside; const uint32_t got = {call}; {scope.assign(into, 'got', 'uint32_t')}"
    return code + (" " + scope.assign(inside, "inside", "bool") if inside else "")


def _vote(scope: Scope, i: Instruction) -> str:
    """vote.sync.ballot.b32 d, p, members"""
    sync, mode, type_ = i.modifiers
    _allow(i, (sync, mode), "sync", "ballot", "any", "all", "uni")
    vote, members = scope.value(i.operands[1], "bool"), scope.value(i.operands[2], "uint32_t")
    return scope.assign(
        i.operands[0], f"vote_{mode}(me, {i.line}, {vote}, {members})", TYPES[type_]
    )


def _reduce(scope: Scope, i: Instruction) -> str:
    """redux.sync.add.s32 d, value, members"""
    sync, operation, type_ = i.modifiers
    _allow(i, (sync, operation), "sync", "add", "min", "max", "and", "or", "xor")
    cpp = TYPES[type_]
    value, members = scope.value(i.operands[1], cpp), scope.value(i.operands[2], "uint32_t")
    call = f"reduce_{operation}<{cpp}>(me, {i.line}, {value}, {members})"
    return scope.assign(i.operands[0], call, cpp)


HANDLERS: dict[str, Callable[[Scope, Instruction], str]] = {
    "ld": _load,
    "ldu": _load,
    "st": _store,
    "mov": _move,
    "cvta": _convert_address,
    "cvt": _convert,
    "setp": _set_predicate,
    "set": _set,
    "slct": _select_by_sign,
    "bra": _branch,
    "ret": _return,
    "exit": _return,
    "prefetch": _nothing,
    "prefetchu": _nothing,
    "bar": _barrier,
    "barrier": _barrier,
    "shfl": _shuffle,
    "vote": _vote,
    "redux": _reduce,
}
