"""Fake compute-sanitizer and ncu: they run the command on the stub and find nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from bench.gpu.processes import ROOT
from tests.cuda_emulator import build

PROGRAMS = ("compute-sanitizer", "ncu")
COUNTERS = """==PROF== Profiling "forward": 0%....100% - 2 passes
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","1","forward","gpu__time_duration.sum","ns","1,234"
"0","1","forward","dram__bytes.sum","byte","5,678.5"
"""


def install(folder: Path) -> None:
    """Puts them first on PATH, and compiles the emulator before stages need it."""
    programs = folder / "programs"
    programs.mkdir()
    for name in PROGRAMS:
        script = programs / name
        start = f'exec "{sys.executable}" -m bench.gpu.stub.tools {name}'
        script.write_text(f'#!/bin/sh\n{start} "$@"\n')
        script.chmod(0o755)
    os.environ["PATH"] = f"{programs}{os.pathsep}{os.environ['PATH']}"
    build.build(sanitize=False)


def main() -> int:
    program, *arguments = sys.argv[1:]
    if "--version" in arguments:
        print(f"stub of {program}, version 0")
        return 0
    module = arguments[arguments.index("-m") + 1 :]
    command = [sys.executable, "-m", "bench.gpu.stub", *module]
    code = subprocess.run(command, cwd=ROOT).returncode
    if program == "ncu":
        print(COUNTERS)
    return code


if __name__ == "__main__":
    sys.exit(main())
