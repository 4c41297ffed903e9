"""PTX -> C++ for the emulator: every entry point becomes a function that one thread runs.

A register becomes a local variable, a label stays a label, and an instruction becomes a statement.
What is not known is an error that names its line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tests.cuda_emulator.ptx.instructions import TYPES, Scope, translated, variable
from tests.cuda_emulator.ptx.parse import Entry, UnknownPtx, entries, instruction, statements


def translate(ptx: str) -> str:
    """The C++ of a unit."""
    functions = "".join(_function(entry) for entry in entries(ptx))
    return f'#include "runtime.h"\n\nnamespace ptx {{\n{functions}\n}}  // namespace ptx\n'


def _function(entry: Entry) -> str:
    # By its mangled name the linker takes it for the kernel of the same name; see build.py.
    body = "\n  ".join(_body(Scope(entry)))
    parameter = f"Parameter<{entry.bytes_}> parameter"
    return f"""
static void run_{entry.name}(const void*);
static Kernel kernel_{entry.name}("{entry.name}", run_{entry.name});
extern "C" __attribute__((weak)) void {entry.name}({parameter}) {{ run_{entry.name}(&parameter); }}
static void run_{entry.name}(const void* parameter) {{
  Thread& me = enter(kernel_{entry.name});
  {body}
}}
"""


def _body(scope: Scope) -> Iterator[str]:
    """Registers first: C++ does not let jumps skip their initialisation."""
    code = []
    for line, label, statement in statements(scope.entry):
        try:
            if label:
                code.append(f"{variable(label)}:;")
            elif statement.startswith(".reg"):
                _declare(scope, statement)
            elif not statement.startswith(".pragma"):
                code.append(_statement(scope, line, statement))
        except UnknownPtx as error:
            raise UnknownPtx(f"line {line}: {statement}: unknown {error}") from None
    yield from (f"{cpp} {variable(name)}{{}};" for name, cpp in scope.registers.items())
    yield from code


def _declare(scope: Scope, statement: str) -> None:
    """.reg .b32 %r<4>, x;"""
    _, type_, names = statement.split(maxsplit=2)
    for name in re.split(r",\s*", names):
        stem, _, count = name.rstrip(">").partition("<")
        new = [f"{stem}{i}" for i in range(int(count))] if count else [stem]
        for register in new:
            cpp = TYPES.get(type_[1:], "")
            if not cpp or scope.registers.get(register, cpp) != cpp:
                raise UnknownPtx(f"register {register}")
            scope.registers[register] = cpp


def _statement(scope: Scope, line: int, statement: str) -> str:
    """@p opcode operands -> if (p) { ... }"""
    guard, read = instruction(line, statement)
    code = translated(scope, read)
    return f"if ({scope.value(guard, 'bool')}) {{ {code} }}" if guard else f"{{ {code} }}"
