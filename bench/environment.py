"""The environment of a measurement with the commit of the checkout; how results are written."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dendrite_kernels.benchmark import environment

TIMES = ("p20", "p50", "p80", "samples")
_WIDTH = 160


def describe(threads: int | None = None) -> dict[str, Any]:
    """As the package's `describe`, and the commit."""
    return {**environment.describe(threads), "commit": commit()}


def describe_run(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, threads: int
) -> dict[str, Any]:
    """What a file of results begins with: its command and the environment."""
    command = f"{parser.prog} {shlex.join(sys.argv[1:] if arguments is None else arguments)}"
    return {"command": command.rstrip(), "environment": describe(threads)}


def commit() -> str | None:
    """Short hash of the checked-out commit, "-dirty" with changes; None outside a checkout."""
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def write_json(path: Path, content: dict[str, Any], digits: int = 6) -> None:
    """What fits a line is on one line; times are [p20, p50, p80, samples].

    Numbers that are not finite, which JSON has not, become null.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_text(_short(content, digits)) + "\n")


def _short(value: Any, digits: int) -> Any:
    """Fewer digits, and times as rows."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        short = {str(key): _short(item, digits) for key, item in value.items()}
        return list(short.values()) if tuple(short) == TIMES else short
    if isinstance(value, list | tuple):
        return [_short(item, digits) for item in value]
    return value


def _text(value: Any, indent: int = 0, before: int = 0) -> str:
    """JSON; `before`: characters of the line that are taken."""
    line = json.dumps(value, separators=(",", ":"))
    if not isinstance(value, dict | list) or not value or indent + before + len(line) <= _WIDTH:
        return line
    names = [f"{json.dumps(key)}: " for key in value] if isinstance(value, dict) else []
    items = value.values() if isinstance(value, dict) else value
    rows = [
        name + _text(item, indent + 1, len(name))
        for name, item in zip(names or [""] * len(value), items, strict=True)
    ]
    pad, (first, last) = "\n" + " " * indent, "{}" if names else "[]"
    return f"{first}{pad} {f',{pad} '.join(rows)}{pad}{last}"
