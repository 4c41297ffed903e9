"""Which lines of the package and of csrc/cpu the tests run: reports/coverage/index.html.

    python -m tests.coverage [arguments of pytest]

Compiles csrc/cpu with counters, runs the check of the kernels and the tests of the package with it,
and prints both tables. All of it happens in build/coverage, a copy: the extension of the checkout
stays as it is. Python that only fresh processes run, such as parallel.py, is not counted; their C++
is. Needs the extra [coverage], g++ and its gcov.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.cpu_kernels import build
from tests.package import sources

ROOT = sources.ROOT
COPY = ROOT / "build" / "coverage"
COUNTS = build.OUTPUT / "coverage"  # what the compiler and the compiled code write
REPORT = ROOT / "reports" / "coverage"
EXTENSION = Path("dendrite_kernels", f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}")
# Those that run the package. The others are on bench/, the docs, builds and the CUDA emulator.
TESTS = (
    *(f"tests/{name}" for name in ("autograd", "backends", "functional", "nn", "operators")),
    *("tests/structure", "tests/package/test_command_line.py", "tests/bench/test_bench_run.py"),
    # The counters export names of their own.
    "--deselect=tests/backends/test_extension.py::test_extension_exports_its_entry_only",
)
INDEX = """<!doctype html>
<meta charset="utf-8">
<title>Coverage of dendrite_kernels</title>
<h1>Coverage of dendrite_kernels</h1>
<ul>
<li><a href="python/index.html">The package, in Python</a></li>
<li><a href="cpp/index.html">csrc/cpu, in C++</a></li>
</ul>
"""


def prepare() -> None:
    for folder in (COPY, COUNTS, REPORT):
        shutil.rmtree(folder, ignore_errors=True)
    sources.copy(COPY)
    shutil.copy(build.extension("coverage"), COPY / EXTENSION)


def run_tests(arguments: list[str]) -> bool:
    """Whether all pass."""
    checked = build.run("coverage")
    print(checked.stdout + checked.stderr, end="", flush=True)
    tests = ["-m", "pytest", "-q", *TESTS, "-m", "not slow and not tools", *arguments]
    return _coverage("run", *tests) == checked.returncode == 0


def report() -> bool:
    """Print both tables and write the pages; whether that worked."""
    failed = _coverage("report") or _coverage("html", "-q", "-d", str(REPORT / "python"))
    (REPORT / "cpp").mkdir(parents=True)
    command = [sys.executable, "-m", "gcovr", "--root", str(ROOT), "--filter", "csrc/cpu/"]
    command += ["--exclude-throw-branches", "--merge-lines", "--txt", "--txt-summary"]
    command += ["--html-nested", str(REPORT / "cpp" / "index.html"), str(COUNTS)]
    failed = failed or subprocess.run(command, check=False).returncode
    (REPORT / "index.html").write_text(INDEX)
    return not failed


def _coverage(*arguments: str) -> int:
    """Run coverage.py on the package in the copy, as pyproject.toml says; its exit status."""
    path = {"PYTHONPATH": str(COPY), "DENDRITE_KERNELS_REQUIRE": "cpu"}
    command = [sys.executable, "-m", "coverage", *arguments]
    return subprocess.run(command, cwd=COPY, env={**os.environ, **path}, check=False).returncode


def main() -> None:
    absent = [tool for tool in ("g++", "gcov") if shutil.which(tool) is None]
    if absent:
        raise SystemExit(f"cannot count lines: no {', '.join(absent)} on PATH")
    prepare()
    passed = run_tests(sys.argv[1:])
    reported = report()
    print(f"wrote {(REPORT / 'index.html').relative_to(ROOT)}")
    raise SystemExit(0 if passed and reported else 1)


if __name__ == "__main__":
    main()
