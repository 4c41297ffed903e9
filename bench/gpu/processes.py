"""Runs one stage as a process with a time limit, and keeps the ends of its output."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NO_DEVICE = "dry run: no device"
LOG_BYTES = 400_000  # kept of a stage: half from its begin, half from its end
SHOWN = 16  # last lines of a stage that passed
LIVE: set[int] = set()  # process groups that run
UNAVAILABLE = 77  # exit code of a stage whose tool is missing or not allowed here


@dataclass(frozen=True)
class Stage:
    """A command; `{results}` in it is the file that the stage writes, `{seconds}` its share."""

    name: str
    command: list[str]
    share: float  # seconds
    alone: bool = True  # it measures: nothing else may run
    needs_build: bool = True


def run(stage: Stage, seconds: float, limit: float, folder: Path, log: Path) -> dict[str, Any]:
    """How the stage ended, and what it wrote before that."""
    results, output = folder / f"{stage.name}.json", folder / f"{stage.name}.log"
    words = {"{results}": str(results), "{seconds}": f"{seconds:.0f}"}
    command = [words.get(word, word) for word in stage.command]
    started = time.monotonic()
    with output.open("wb") as file:
        ending = _run(command, limit, folder, file.fileno())
    text = _ends(output)
    entry: dict[str, Any] = {
        "ending": ending,
        "seconds": round(time.monotonic() - started, 1),
        "last_lines": text.splitlines()[-5:],
    }
    with contextlib.suppress(OSError, ValueError):  # none, or it was killed while writing
        entry["results"] = json.loads(results.read_text())
    title = f"== {stage.name}: {ending}, {entry['seconds']} s"
    with log.open("a") as file:
        file.write(f"{title}\n$ {' '.join(command)}\n{text}\n")
    print(title, *text.splitlines()[-SHOWN if ending == "passed" else -40 :], sep="\n", flush=True)
    return entry


def _run(command: list[str], limit: float, folder: Path, output: int) -> str:
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(os.environ, folder), stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return f"failed ({error})"
    LIVE.add(process.pid)
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"out of time ({limit:.0f} s)"
    finally:  # what it started and left behind, too
        kill(process.pid)
        process.wait()
    return {0: "passed", UNAVAILABLE: "not available"}.get(code, f"failed ({code})")


def kill(group: int) -> None:
    LIVE.discard(group)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def environment(outer: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Our modules before any others of their names; caches where one may write."""
    caches = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "NUMBA_CACHE_DIR", "TMPDIR")
    for name in caches:
        (folder / name.lower()).mkdir(exist_ok=True)
    return {
        **outer,
        **{name: str(folder / name.lower()) for name in caches},
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), outer.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "DENDRITE_KERNELS_REQUIRE": "cuda",
    }


def _ends(path: Path) -> str:
    """The text of a log without its middle, if it is long."""
    half = LOG_BYTES // 2
    with path.open("rb") as file:
        begin = file.read(half)
        left = os.fstat(file.fileno()).st_size - half
        file.seek(max(half, half + left - half))
        end = file.read()
    gap = f"\n... {left - half} bytes left out ...\n".encode() if left > half else b""
    return (begin + gap + end).decode(errors="replace")
