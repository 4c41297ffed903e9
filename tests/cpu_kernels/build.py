"""Compiles check.cpp with the CPU kernels and runs it, for another processor in an emulator.

    python -m tests.cpu_kernels.build neon|sanitize|threads|valgrind|native|coverage

Object files are kept and used again for the same sources and flags.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import platform
import runpy
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pybind11
import setuptools

from tests.cuda_emulator import build as cuda_emulator

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc" / "cpu"
CHECK = Path(__file__).with_name("check.cpp")
OUTPUT = ROOT / "build" / "cpu_kernels"
HOST = platform.machine().lower()
PREFIX = "" if HOST in ("aarch64", "arm64") else "aarch64-linux-gnu-"


@dataclass(frozen=True)
class Target:
    """A machine to compile for."""

    machine: str  # a key of UNITS in setup.py
    prefix: str = ""  # of the names of compiler and binutils
    flags: tuple[str, ...] = ()  # in addition to those of setup.py
    link: tuple[str, ...] = ()
    emulator: tuple[str, ...] = ()  # the program that runs it, with options


# -O1, because GCC compiles sanitized code very slowly with -O3.
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g1")
THREADS = ("-fsanitize=thread", "-O1", "-g1")
# Threads count the same lines. -O1 keeps the lines apart that -O3 would move and merge.
COUNT = ("--coverage", "-fprofile-update=atomic", "-O1")
TARGETS = {
    "native": Target(HOST),
    "sanitize": Target(HOST, flags=SANITIZE, link=SANITIZE[:1]),
    "threads": Target(HOST, flags=THREADS, link=THREADS[:1]),
    "coverage": Target(HOST, flags=COUNT, link=COUNT[:1]),
    "valgrind": Target(
        HOST, flags=("-O1", "-g1"), emulator=("valgrind", "--quiet", "--error-exitcode=1")
    ),
    "neon": Target(
        "aarch64", PREFIX, link=("-static",), emulator=("qemu-aarch64",) if PREFIX else ()
    ),
}


def missing(name: str) -> str | None:
    """Why a target cannot be compiled or run here, or None."""
    target = TARGETS[name]
    if not SOURCES.is_dir():
        return "no csrc beside the tests"
    if name == "sanitize":
        return cuda_emulator.missing()
    needed = [f"{target.prefix}g++", f"{target.prefix}nm", *target.emulator[:1]]
    absent = [tool for tool in needed if shutil.which(tool) is None]
    if not absent:
        return None
    packages = "g++-aarch64-linux-gnu qemu-user" if target.prefix else " ".join(absent)
    return f"no {', '.join(absent)} on PATH (on Debian and Ubuntu: apt install {packages})"


@functools.cache
def setup_constants() -> dict[str, Any]:
    """The constants of setup.py, which runs here without building anything."""
    real, before = setuptools.setup, Path.cwd()
    setuptools.setup = lambda **_: None
    os.chdir(ROOT)
    try:
        return runpy.run_path(str(ROOT / "setup.py"))
    finally:
        setuptools.setup = real
        os.chdir(before)


def units(name: str) -> list[str]:
    """Source files for the instruction sets of a target, base first."""
    found: list[str] = setup_constants()["UNITS"].get(TARGETS[name].machine, ["kernels_base.cpp"])
    return found


def compile_unit(name: str, unit: str) -> Path:
    """The object file of such a source, compiled with the flags of setup.py."""
    setup = setup_constants()
    flags = [*setup["FLAGS"], "-fPIC", *setup["KERNEL_FLAGS"], *setup["ISA_FLAGS"][unit]]
    return _compile(name, SOURCES / unit, flags)


def build(name: str) -> Path:
    """Compile the program if needed; its path."""
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", f"-I{SOURCES}"]
    return _link(name, "check", CHECK, flags, "-pthread")


def extension(name: str) -> Path:
    """The same kernels as a module for the Python that runs this."""
    setup = setup_constants()
    includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    flags = [*setup["FLAGS"], "-fPIC", *setup["BIND_FLAGS"], *includes]
    return _link(name, "extension", SOURCES / "bind.cpp", flags, "-shared")


def _link(name: str, result: str, source: Path, flags: list[str], option: str) -> Path:
    """A source with the kernels."""
    target = TARGETS[name]
    with ThreadPoolExecutor(2) as pool:
        kernels = pool.map(lambda unit: compile_unit(name, unit), units(name))
        objects = [_compile(name, source, flags), *kernels]
    made = OUTPUT / name / f"{result}-{_digest(*(str(path).encode() for path in objects))}"
    if not made.exists():
        _run_to(made, [f"{target.prefix}g++", *target.link, option, *map(str, objects)])
    return made


def run(name: str) -> subprocess.CompletedProcess[str]:
    """Compile and run the program; its output is captured."""
    program = build(name)
    return subprocess.run([*TARGETS[name].emulator, str(program)], capture_output=True, text=True)


def _compile(name: str, source: Path, flags: list[str]) -> Path:
    target = TARGETS[name]
    command = [f"{target.prefix}g++", *flags, *target.flags, "-c", str(source)]
    folders = {SOURCES, source.parent}
    headers = [
        path for folder in folders for end in ("h", "inl") for path in folder.glob(f"*.{end}")
    ]
    content = [path.read_bytes() for path in [source, *sorted(headers)]]
    made = OUTPUT / name / f"{source.stem}-{_digest(repr(command).encode(), *content)}.o"
    if not made.exists():
        _run_to(made, command)
    return made


def _run_to(made: Path, command: list[str]) -> None:
    made.parent.mkdir(parents=True, exist_ok=True)
    temporary = made.with_suffix(f".{os.getpid()}.tmp")
    subprocess.run([*command, "-o", str(temporary)], check=True)
    temporary.replace(made)


def _digest(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    name = parser.parse_args().target
    reason = missing(name)
    if reason is not None:
        raise SystemExit(f"cannot check the kernels: {reason}")
    result = run(name)
    print(result.stdout + result.stderr, end="")
    raise SystemExit(result.returncode)


if __name__ == "__main__":
    main()
