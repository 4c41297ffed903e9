"""Copies of what is needed to build the package, to build from and to damage."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("bench", "csrc", "dendrite_kernels", "docs", "tests")
_BUILT = {".so", ".pyd", ".pyc", ".nbi", ".nbc"}


def missing() -> str | None:
    """Why nothing can be built here, or None."""
    absent = [name for name in (*FOLDERS, "setup.py") if not (ROOT / name).exists()]
    return f"no {', '.join(absent)} beside the tests" if absent else None


def is_checkout() -> bool:
    return (ROOT / ".git").exists() and shutil.which("git") is not None


def files() -> list[str]:
    """What git has or would add; without git, what lies here and was not built."""
    if is_checkout():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        found = [ROOT / name for name in filter(None, printed.stdout.split("\0"))]
    else:
        found = [*ROOT.iterdir(), *(path for name in FOLDERS for path in (ROOT / name).rglob("*"))]
    kept = [path for path in found if path.is_file() and path.suffix not in _BUILT]
    return sorted(path.relative_to(ROOT).as_posix() for path in kept)


def copy(folder: Path) -> Path:
    """A copy of these files that holds nothing built before."""
    for name in files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def setup(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py of a copy; its output is captured, what it prints as errors with the rest."""
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=folder,
        env={**os.environ, "DENDRITE_KERNELS_CUDA": "0", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
