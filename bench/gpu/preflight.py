"""What this machine offers: versions, headers, programs; the first stage of `python -m bench.gpu`.

    python -m bench.gpu.preflight --output preflight.json

`find` looks for NVIDIA's programs where toolkits, drivers and pip put them.
"""

from __future__ import annotations

import argparse
import glob
import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from bench.gpu.processes import ROOT

PROGRAMS = ("nvcc", "g++", "compute-sanitizer", "ncu", "nvidia-smi", "git")
NEEDED = ("nvcc", "g++")
MODULES = ("setuptools", "pybind11", "numpy", "numba", "pytest", "torch", "safetensors", "triton")


def find(program: str) -> str | None:
    """Its path: on PATH, in CUDA_HOME, beside nvcc, in toolkits of this machine or of pip."""
    found = shutil.which(program)
    if found is not None:
        return found
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    compiler = shutil.which("nvcc")
    if compiler is not None:
        homes.append(str(Path(compiler).resolve().parents[1]))
    packages = sysconfig.get_path("purelib")
    homes += [*sorted(glob.glob("/usr/local/cuda*"), reverse=True), f"{packages}/nvidia/*"]
    homes += ["/opt/nvidia/nsight-compute/*", "/usr/lib/nvidia-cuda-toolkit"]
    for home in homes:
        for folder in ("bin", "compute-sanitizer", "nsight-compute*", "."):
            for path in sorted(glob.glob(f"{home}/{folder}/{program}"), reverse=True):
                if os.access(path, os.X_OK):
                    return path
    return None


def version(program: str) -> str:
    """The line of `program --version` that has a number in it."""
    try:
        run = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as fault:
        return str(fault)
    lines = [line for line in run.stdout.splitlines() if any(c.isdigit() for c in line)]
    wanted = [line for line in lines if "release" in line.lower() or "ersion" in line]
    return (wanted or lines or ["no version"])[0].strip()


def modules() -> dict[str, str]:
    found = {}
    for name in MODULES:
        try:
            found[name] = str(getattr(importlib.import_module(name), "__version__", "?"))
        except Exception as fault:  # a broken module is what we want to hear of
            found[name] = f"missing: {fault}"[:200]
    return found


def device() -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "name": torch.cuda.get_device_name(0),
        "capability": torch.cuda.get_device_capability(0),
        "memory_gb": properties.total_memory / 1e9,
        "multiprocessors": properties.multi_processor_count,
        "torch_cuda": torch.version.cuda,
    }


def tests_folder() -> str:
    folder = getattr(importlib.import_module("tests"), "__file__", None)
    return str(Path(folder).parent) if folder else "a folder without __init__.py"


def headers(nvcc: str | None) -> dict[str, bool]:
    """nvcc includes its own header in an empty source, and needs a C++ compiler to do so."""
    empty = [nvcc or "nvcc", "-x", "cu", "-E", os.devnull]
    return {
        "Python.h": Path(sysconfig.get_path("include"), "Python.h").exists(),
        "cuda_runtime.h": nvcc is not None
        and subprocess.run(empty, capture_output=True, timeout=15).returncode == 0,
    }


def examine() -> tuple[dict[str, Any], list[str]]:
    """All that was found, and what is missing or wrong."""
    programs = {name: find(name) for name in PROGRAMS}
    report: dict[str, Any] = {
        "python": sys.version.split()[0],
        "cores": os.cpu_count(),
        "modules": modules(),
        "programs": {name: path and f"{path}: {version(path)}" for name, path in programs.items()},
        "headers": headers(programs["nvcc"]),
        "tests": tests_folder(),
    }
    wrong = [f"{name} not found" for name in NEEDED if programs[name] is None]
    wrong += [f"{name} not found" for name, there in report["headers"].items() if not there]
    optional = "triton"  # of torch.compile alone
    faults = report["modules"].items()
    wrong += [f"{n} {v}" for n, v in faults if v.startswith("missing") and n != optional]
    if report["tests"] != str(ROOT / "tests"):
        wrong.append(f"the package `tests` is that of {report['tests']}")
    try:
        report["device"] = device()
        from bench.environment import describe

        report["environment"] = describe()
    except Exception as fault:
        wrong.append(f"no device: {fault}")
    return report, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    report, wrong = examine()
    options.output.write_text(json.dumps({**report, "wrong": wrong}))
    print(json.dumps(report, indent=1), *wrong, sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
