"""One HTML page with the figures of `make bench`, from the files that it wrote.

    python -m bench.speed.report [--input reports/bench] [--output reports/bench.html]

A file that is not there is named, with the command that writes it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import page
from bench.speed.report_sections import Found, crossover, memory, overhead, roofline, speed

_TITLE = "Speed and memory of dendrite_kernels"


class Part(NamedTuple):
    """A section, the file it is made from and the command that writes the file."""

    title: str
    file: str
    command: str
    show: Callable[[Found], str]


_RUN, _QUESTION = "python -m bench.speed.run --memory", "python -m bench.questions."
PARTS = (
    Part("Speed", "cpu.json", _RUN, speed),
    Part("Memory of a training step", "cpu.json", _RUN, memory),
    Part("Roofline", "cpu.json", _RUN, roofline),
    Part("Where dense wins", "crossover.json", f"{_QUESTION}crossover", crossover),
    Part("Overhead of a call", "overhead.json", f"{_QUESTION}overhead", overhead),
)


def report(folder: Path) -> str:
    """The page. ValueError for a file that is not what its command writes."""
    files = {part.file: _read(folder / part.file, part.command) for part in PARTS}
    sections = [(part.title, _section(part, folder, files[part.file])) for part in PARTS]
    how = f"<p>{page.code('make bench')} in a checkout of the commit.</p>\n"
    return page.page(_TITLE, _environments(files), [*sections, ("How to make this page", how)])


def _read(path: Path, command: str) -> Found | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {**found, "machine": _machine(found["environment"])}
    except FileNotFoundError:
        return None
    except _BAD as error:
        raise _unlike(path, command, error) from error


def _section(part: Part, folder: Path, found: Found | None) -> str:
    path = folder / part.file
    if found is None:
        command = page.code(f"{part.command} --output {path}")
        return f"<p>Missing: there is no {page.code(str(path))}. {command} writes it.</p>\n"
    try:
        return part.show(found)
    except _BAD as error:
        raise _unlike(path, part.command, error) from error


_BAD = LookupError, TypeError, AttributeError, ValueError


def _unlike(path: Path, command: str, error: Exception) -> ValueError:
    return ValueError(
        f"Expected a file that `{command}` of this version wrote, got {path}: "
        f"{type(error).__name__}: {error}"
    )


def _machine(environment: Mapping[str, Any]) -> str:
    e = environment
    return (
        f"{e['cpu']}, {e['system']}, Python {e['python']}, {page.versions(e)}, commit {e['commit']}"
    )


def _environments(files: Mapping[str, Found | None]) -> str:
    """Files that were written in the same environment share a line."""
    lines: dict[str, list[str]] = {}
    for name, found in files.items():
        if found is not None:
            lines.setdefault(found["machine"], []).append(
                f"{name} of {found['environment']['date']}"
            )
    items = [f"{machine} ({', '.join(names)})" for machine, names in lines.items()]
    return page.bullets(items or ["Nothing was measured yet."])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.speed.report", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--input", type=Path, default=Path("reports/bench"), help="(%(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("reports/bench.html"), help="(%(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        written = report(options.input)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(written, encoding="utf-8")
    print(f"Wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
