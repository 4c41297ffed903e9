"""Machine instructions (SASS) that a CUDA kernel executes in one turn of each of its loops.

    python -m tests.cuda_emulator.sass f32 [--kernel REGEX] [--loops]
    python -m tests.cuda_emulator.sass --update   writes "instructions" of budget.json

Instruction issue bounds our kernels: the innermost loop is a step, the loop around it a row, the
outermost a soma or input. A turn is counted by the longest path through the loop's own body, inner
loops as nothing: an upper bound, as what a kernel does only for some rows is on that path too.
nvcc unrolls loops: "per 4 gathers" is what one step costs, and "no gather" is a turn of an outer
loop less the steps that were moved out of the inner one.

Machine code before sm_90 calls its shuffles in ways that this does not follow.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from dataclasses import dataclass
from graphlib import TopologicalSorter

from tests.cuda_emulator import resources

ARCH = "90"
DTYPES = ("f32", "bf16")  # those in the budget
JUMPS = ("BRA", "BRX", "JMP", "JMX")


@dataclass(frozen=True)
class Instruction:
    guard: str  # "@P0", "@!UP1" or ""
    name: str  # "LDS.64"
    operands: str

    @property
    def target(self) -> str | None:
        """Label that this instruction jumps to.

        BRA.DIV jumps when the lanes of a warp have diverged, to copies of shuffles and votes that
        wait for them. Ours have not, so it does not jump, and those copies are not reached. Other
        labels (BSSY, WARPSYNC.COLLECTIVE) say where lanes meet. The body of a CALL isn't counted.
        """
        if self.name.split(".")[0] not in JUMPS or ".DIV" in self.name:
            return None
        found = re.search(r"`\(([^)]+)\)", self.operands)
        if found is None:
            raise ValueError(f"a jump without a label: {self}")
        return found[1]

    @property
    def falls_through(self) -> bool:
        if self.name.split(".")[0] not in (*JUMPS, "EXIT", "RET", "KILL"):
            return True
        # A condition is a guard, or a predicate before the label: "BRA.U UP0, `(.L_x_1)".
        return bool(self.guard) or ".DIV" in self.name or bool(re.match(r"!?U?P\d", self.operands))


@dataclass(frozen=True)
class Block:
    """Instructions that are executed one after the other, and the blocks that may follow."""

    instructions: list[Instruction]
    next: list[int]


@dataclass(frozen=True)
class Loop:
    """`names` are the instructions of one turn; depth 0 is what lies outside of all loops."""

    depth: int
    names: list[str]

    def count(self, pattern: str) -> int:
        return sum(bool(re.match(pattern, name)) for name in self.names)

    @property
    def gathers(self) -> int:
        """Loads of samples from the tile: 8 bytes a lane, or 16."""
        return self.count(r"LDS\.(64|128)")


def loops(text: str) -> list[Loop]:
    """The loops of a function in the order of its code; first what is outside of all loops."""
    blocks = _blocks(text)
    bodies = {0: set(_reachable(blocks))} | _natural_loops(blocks)
    found = []
    for header in sorted(bodies):
        depth = sum(header in other for other in bodies.values()) - 1
        found.append(Loop(depth, _longest_path(blocks, header, bodies)))
    return found


def _blocks(text: str) -> list[Block]:
    """Block 0 is empty, so that no loop begins there and it can stand for the whole function."""
    parts: list[list[Instruction]] = [[], []]
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"([.$\w]+):", line):
            if parts[-1]:
                parts.append([])
            labels[label[1]] = len(parts) - 1
        elif found := re.match(r"\s+/\*\w+\*/\s+(@!?U?P\w+)?\s*([A-Z][\w.]*)\s*(.*?)\s*;", line):
            instruction = Instruction(found[1] or "", found[2], found[3])
            parts[-1].append(instruction)
            if instruction.target or not instruction.falls_through:
                parts.append([])
    blocks = []
    for i, part in enumerate(parts):
        last = part[-1] if part else None
        follow = [i + 1] if i + 1 < len(parts) and (not last or last.falls_through) else []
        if last and last.target:
            follow.append(labels[last.target])
        real = [instruction for instruction in part if instruction.name != "NOP"]
        blocks.append(Block(real, follow))
    return blocks


def _reachable(blocks: list[Block]) -> list[int]:
    found, waiting = {0}, [0]
    while waiting:
        for i in blocks[waiting.pop()].next:
            if i not in found:
                found.add(i)
                waiting.append(i)
    return sorted(found)


def _before(blocks: list[Block]) -> dict[int, list[int]]:
    """Predecessors of each block that can be reached."""
    before: dict[int, list[int]] = defaultdict(list)
    for i in _reachable(blocks):
        for to in blocks[i].next:
            before[to].append(i)
    return before


def _dominators(blocks: list[Block]) -> dict[int, set[int]]:
    """For each block the blocks that every path to it goes through, itself included."""
    reachable, before = _reachable(blocks), _before(blocks)
    found = {i: set(reachable) for i in reachable}
    found[0] = {0}
    changed = True
    while changed:
        changed = False
        for i in reachable[1:]:
            new = {i} | set.intersection(*(found[j] for j in before[i]))
            changed |= new != found[i]
            found[i] = new
    return found


def _natural_loops(blocks: list[Block]) -> dict[int, set[int]]:
    """Blocks of each loop by its header, the only block where a loop is entered.

    An edge back to a block that dominates its source closes a loop: of all blocks that lead to the
    edge without the header.
    """
    dominators, before = _dominators(blocks), _before(blocks)
    found: dict[int, set[int]] = {}
    for i, above in dominators.items():
        for header in above.intersection(blocks[i].next):
            body, waiting = found.setdefault(header, {header}), [i]
            while waiting:
                block = waiting.pop()
                if block not in body:
                    body.add(block)
                    waiting += before[block]
    return found


def _longest_path(blocks: list[Block], header: int, bodies: dict[int, set[int]]) -> list[str]:
    """Names of the instructions on the longest path through a loop, inner loops as nothing.

    Without edges to the header, and with each inner loop as one node, no cycle is left: graphlib
    raises CycleError if there is one, as in a loop with two entries. Every block of a loop leads to
    its end, so the longest path to any block is the longest through it.
    """
    body = bodies[header]
    inner = {i: i for i in body}  # block -> header of the largest loop inside that holds it
    for other in sorted(bodies, key=lambda i: len(bodies[i])):
        if other != header and other in body and header not in bodies[other]:
            inner |= dict.fromkeys(bodies[other], other)
    graph: dict[int, set[int]] = {inner[i]: set() for i in body}
    for i in body:
        for to in body.intersection(blocks[i].next) - {header}:
            if inner[i] != inner[to]:
                graph[inner[to]].add(inner[i])
    paths: dict[int, list[str]] = {}
    for i in TopologicalSorter(graph).static_order():
        before = max((paths[j] for j in sorted(graph[i])), key=len, default=[])
        is_loop = i != header and i in bodies
        own = [] if is_loop else [instruction.name for instruction in blocks[i].instructions]
        paths[i] = before + own
    return max(paths.values(), key=len)


def measure(dtype: str) -> dict[str, list[Loop]]:
    return {name: loops(text) for name, text in resources.machine_code(dtype, ARCH).items()}


def nest(found: list[Loop]) -> list[Loop]:
    """The loop that gathers most (else: multiplies most) and those around it, outermost first."""
    best = max(
        range(len(found)), key=lambda i: (found[i].gathers, found[i].count("FFMA"), found[i].depth)
    )
    chain = [found[best]]
    for loop in reversed(found[:best]):
        if loop.depth < chain[-1].depth:
            chain.append(loop)
    return chain[::-1]


def budget() -> dict[str, list[tuple[int, int]]]:
    """Depth and instructions of every loop: {"f32 kernel<...>": [(0, 80), (1, 60), (2, 46)]}."""
    return {
        f"{dtype} {name}": [(loop.depth, len(loop.names)) for loop in found]
        for dtype in DTYPES
        for name, found in sorted(measure(dtype).items())
    }


def _table(found: list[Loop], step: Loop) -> str:
    """A line for each loop; `step` is the innermost loop of the main nest."""
    lines = []
    for loop in found:
        counts = [len(loop.names), *(loop.count(name) for name in ("LDS", "LDG", "FFMA"))]
        columns = [f"{count:6}" for count in counts]
        if loop.gathers:
            columns.append(f"{4 * len(loop.names) / loop.gathers:16.1f}")
            if loop is not step and step.gathers:
                steps = loop.gathers / step.gathers
                columns.append(f"{len(loop.names) - steps * len(step.names):11.1f}")
        lines.append(f"  {'  ' * loop.depth + str(loop.depth):12}" + "".join(columns))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dtype", nargs="?", choices=resources.DTYPES)
    parser.add_argument("--kernel", default="", metavar="REGEX", help="only kernels so named")
    parser.add_argument("--loops", action="store_true", help="all loops, not the main nest alone")
    parser.add_argument("--update", action="store_true", help="write budget.json")
    arguments = parser.parse_args()
    if arguments.update:
        resources.write_budget(instructions_nvcc=resources.nvcc_version(), instructions=budget())
    if arguments.dtype is None:
        return
    columns = f"{'instr.':>6}{'LDS':>6}{'LDG':>6}{'FFMA':>6}{'per 4 gathers':>16}{'no gather':>11}"
    print(f"  {'depth':12}{columns}")
    for name, found in sorted(measure(arguments.dtype).items()):
        if re.search(arguments.kernel, name):
            main_nest = nest(found)
            print(name)
            print(_table(found if arguments.loops else main_nest, main_nest[-1]))


if __name__ == "__main__":
    main()
