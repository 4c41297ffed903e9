"""Fresh interpreters for tests, with the package itself or a copy of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import dendrite_kernels as dk

PACKAGE = Path(dk.__file__).parent

# An editable install would find modules that a copy of the package lacks on purpose.
NO_EDITABLE_INSTALL = """
import sys
sys.meta_path = [f for f in sys.meta_path if getattr(f, "__name__", "") != "_EditableFinder"]
"""


def run_python(
    script: str, package: Path = PACKAGE, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `script` in a fresh interpreter that imports the package only from this folder."""
    path = os.pathsep.join([str(package.parent), str(Path(__file__).parents[1])])
    clean = {k: v for k, v in os.environ.items() if k != "DENDRITE_KERNELS_ISA"}
    return subprocess.run(
        [sys.executable, "-c", f"{NO_EDITABLE_INSTALL}\n{script}"],
        cwd=package.parent,
        env={**clean, "PYTHONPATH": path, "OMP_NUM_THREADS": "2", **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def output(script: str, package: Path = PACKAGE, **environment: str) -> str:
    """The output of the script; if it fails, the test fails with its errors."""
    done = run_python(script, package, **environment)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    return done.stdout


def copy_package(folder: Path) -> Path:
    """Copy the Python files and Numba's cache of compiled kernels, without the extensions."""
    left_out = ("*.so", "*.pyd", "*.pyc", "_cpu.*")
    copied: Path = shutil.copytree(
        PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns(*left_out)
    )
    return copied
