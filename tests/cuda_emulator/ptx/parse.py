"""Reads PTX: entry points, their statements, instructions. What it cannot read is an error."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

ENTRY = re.compile(r"^\.(?:visible|weak) \.entry (\w+)\((.*?)\)([^{]*)^\{$(.*?)^\}$", re.M | re.S)
PARAMETER = re.compile(r"\s*\.param \.align \d+ \.b8 (\w+)\[(\d+)\]\s*")
SHARED = re.compile(r"^\.extern \.shared [^;]* (\w+)\[\];$", re.M)
KNOWN_OUTSIDE = re.compile(r"\s*(\.version|\.target|\.address_size|\.extern \.shared|$)")
STATEMENT = re.compile(r"\s*(?:([{}])|([\w$]+):(?!:)|([^;{}]*(?:\{[^;{}]*\}[^;{}]*)*);)")


class UnknownPtx(Exception):
    """Something that the translator does not know, with its line."""


@dataclass(frozen=True)
class Entry:
    """An entry point: its name, the bytes of its parameter, and its text from `line` on."""

    name: str
    parameter: str
    bytes_: int
    shared: tuple[str, ...]  # symbols of the dynamic shared memory
    body: str
    line: int


@dataclass(frozen=True)
class Instruction:
    """ld.global.nc.v2.f32 {a, b}, [c]: a name, modifiers with the types, operands."""

    line: int
    name: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]

    @property
    def type(self) -> str:
        return self.modifiers[-1]

    @property
    def opcode(self) -> str:
        return ".".join([self.name, *self.modifiers])


def entries(ptx: str) -> list[Entry]:
    """The entry points of a unit; its rest must mean nothing else."""
    shared = tuple(SHARED.findall(ptx))
    found = []
    for match in ENTRY.finditer(ptx):
        parameter = PARAMETER.fullmatch(match[2])
        line = ptx.count("\n", 0, match.start(4)) + 1
        if parameter is None:
            raise UnknownPtx(f"line {line}: parameters {match[2]!r}: expected one structure")
        found.append(Entry(match[1], parameter[1], int(parameter[2]), shared, match[4], line))
    for text in _without_comments(ENTRY.sub("", ptx)).split("\n"):
        if not KNOWN_OUTSIDE.match(text):
            raise UnknownPtx(f"outside of entries: {text}")
    return found


def statements(entry: Entry) -> Iterator[tuple[int, str, str]]:
    """(line, label or "", statement or "") in order; braces only bound the names of registers."""
    text = _without_comments(entry.body).rstrip()
    place = 0
    while place < len(text):
        match = STATEMENT.match(text, place)
        if match is None:
            raise UnknownPtx(f"text after line {entry.line + text.count(chr(10), 0, place)}")
        brace, label, statement = match.groups("")
        start = match.end() - len(match[0].lstrip())
        if not brace:
            yield entry.line + text.count("\n", 0, start), label, " ".join(statement.split())
        place = match.end()


def _without_comments(text: str) -> str:
    return re.sub(r"//.*", "", text)


def instruction(line: int, statement: str) -> tuple[str, Instruction]:
    """@p opcode operands -> the guard, "" for none, and the rest."""
    match = re.fullmatch(r"(?:@(!?[\w%$]+)\s+)?(\S+)\s*(.*)", statement)
    if match is None:
        raise UnknownPtx("statement")
    name, *modifiers = re.split(r"(?<!:)\.", match[2])
    operands = tuple(re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,\s])+", match[3]))
    return match[1] or "", Instruction(line, name, tuple(modifiers), operands)
