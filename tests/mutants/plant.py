"""Copies of the repository with a bug, and what the tests say about them.

Each mutant gets a fresh copy of a folder in which the tests have passed before. So it inherits what
that run compiled (objects, Numba's cache, bytecode), all of which is found by content or date, and
nothing of another mutant.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import pybind11

import dendrite_kernels as dk
from tests.cpu_kernels.build import setup_constants, units
from tests.package import sources

EXTENSION = Path("dendrite_kernels", f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}")
KERNELS = "csrc/cpu/"
QUICK = "not slow and not tools"  # what `make test` runs


class Mutant(NamedTuple):
    file: str
    old: str  # occurs exactly once
    new: str
    tests: str  # arguments of pytest: those that should notice


class Outcome(NamedTuple):
    kind: Literal["passed", "failed", "broken"]
    reason: str


class Broken(ValueError):
    """A mutant that cannot be planted, and why."""


def planted(mutant: Mutant, text: str) -> str:
    """The text of its file with the bug."""
    count = text.count(mutant.old)
    if count != 1:
        raise Broken(f"Expected {mutant.old!r} once in {mutant.file}, got it {count} times")
    return text.replace(mutant.old, mutant.new)


def prepare(folder: Path, mutants: Iterable[Mutant]) -> Path:
    """A copy of the repository, with an extension: that of the checkout if no mutant changes it."""
    sources.copy(folder)
    if any(mutant.file.startswith(KERNELS) for mutant in mutants):
        _build(folder, ["bind.cpp", *units("native")])
    else:
        shutil.copy(sources.ROOT / EXTENSION, folder / EXTENSION)
    return folder


def outcome(clean: Path, folder: Path, mutant: Mutant, limit: float) -> Outcome:
    """What its tests say in `folder`, which becomes a copy of `clean` with the bug."""
    shutil.copytree(clean, folder)
    path = folder / mutant.file
    try:
        path.write_text(planted(mutant, path.read_text()))
        if mutant.file.startswith(KERNELS):
            own = f"kernels_{dk.backend_info()['cpp']['isa']}.cpp"
            _build(folder, [unit for unit in ("bind.cpp", own) if _reads(folder, unit, path)])
    except Broken as error:
        return Outcome("broken", str(error))
    return run_tests(folder, mutant.tests.split(), limit)


def run_tests(folder: Path, tests: Sequence[str], limit: float) -> Outcome:
    """Run tests of `make test` until the first that fails."""
    report = folder / "outcome.xml"
    report.unlink(missing_ok=True)  # that of the folder this one is a copy of
    options = ["-q", "-x", "-m", QUICK, "-p", "no:cacheprovider", f"--junitxml={report}"]
    environment = {"PYTHONPATH": str(folder), "DENDRITE_KERNELS_REQUIRE": "cpu"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *tests],
            cwd=folder,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Outcome("broken", f"more than {limit:.0f} s")
    return _read(report) or Outcome("broken", f"exit {done.returncode}: {done.stdout[-2000:]}")


def _read(report: Path) -> Outcome | None:
    """None unless tests ran and, if one failed, it did so by itself, not in its set-up."""
    suite = ET.parse(report).getroot().find("testsuite") if report.exists() else None
    if suite is None:
        return None
    ran, failed, errors, skipped = (
        int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")
    )
    if errors or ran == skipped:
        return None
    if not failed:
        return Outcome("passed", f"{ran - skipped} tests")
    ((case, failure),) = (
        (case, found) for case in suite.iter("testcase") for found in case.iter("failure")
    )
    message = failure.get("message", "").split("\n")[0][:100]
    return Outcome("failed", f"{case.get('classname')}::{case.get('name')}: {message}")


def _build(folder: Path, changed: Sequence[str]) -> None:
    """Compile these units and link them with the others, which are compiled already.

    -O1 takes a quarter of the time. A mutant is compiled for the instruction set that this machine
    chooses: a bug in another one would need its tests.
    """
    setup, cpu = setup_constants(), folder / "csrc" / "cpu"
    objects = folder / "build" / "mutants"
    objects.mkdir(parents=True, exist_ok=True)
    for unit in changed:
        kernels = unit in setup["ISA_FLAGS"]
        own = setup["KERNEL_FLAGS"] + setup["ISA_FLAGS"][unit] if kernels else _includes()
        flags = [*setup["FLAGS"], "-fPIC", *own, "-O1"]
        _compile([*flags, "-c", str(cpu / unit)], objects / f"{unit}.o")
    linked = [str(path) for path in sorted(objects.iterdir())]
    _compile(["-shared", *linked], folder / EXTENSION)


def _reads(folder: Path, unit: str, header: Path) -> bool:
    """Whether a unit includes this file, or is it."""
    command = ["g++", "-std=c++17", "-MM", *_includes(), str(folder / "csrc" / "cpu" / unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return header.name in {Path(name).name for name in done.stdout.split()}


def _includes() -> list[str]:
    return [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]


def _compile(arguments: Sequence[str], made: Path) -> None:
    command = ["g++", *arguments, "-o", str(made)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Broken(f"g++: {done.stderr[-2000:]}")
