"""Everything that needs a GPU, in one call of under ten minutes.

    python -m bench.speed.gpu [--only build test citizen memcheck ...] [--output bench/results]

Builds the extension for the GPU of this machine, then runs tests/gpu (kernels first; missing CUDA
is an error), memcheck and racecheck of compute-sanitizer, the timing table and the memory search.
Every stage is a process with a time limit. The results are one JSON file per device. Needs a
checkout, a CUDA build of torch, nvcc, pybind11, setuptools and pytest, but no network.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SANITIZED = [sys.executable, "-m", "tests.gpu.sanitized"]
SHOWN_LINES = 60  # of a failed stage


@dataclass(frozen=True)
class Stage:
    name: str
    command: list[str]
    seconds: int
    output: str | None = None  # file it writes into the temporary folder


def stages(folder: Path) -> list[Stage]:
    python = sys.executable
    sanitizer = shutil.which("compute-sanitizer") or "compute-sanitizer"
    check = [sanitizer, "--error-exitcode=9", "--target-processes=all"]
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    kernels, citizen, distributed = (
        f"tests/gpu/test_gpu_{name}.py" for name in ("kernels", "citizen", "distributed")
    )
    timing, memory = folder / "timing.json", folder / "memory.json"
    return [
        Stage("build", [python, "setup.py", "-q", "build_ext", "--inplace"], 150),
        Stage("test", [*tests, kernels], 150),
        Stage("memcheck", [*check, "--tool=memcheck", *SANITIZED], 60),
        Stage("racecheck", [*check, "--tool=racecheck", *SANITIZED], 60),
        Stage(
            "time", [python, "-m", "bench.speed.gpu_timing", f"--output={timing}"], 190, timing.name
        ),
        Stage(
            "memory",
            [python, "-m", "bench.speed.gpu_memory", f"--output={memory}"],
            75,
            memory.name,
        ),
        Stage("citizen", [*tests, citizen, distributed], 200),
    ]


def run(stage: Stage, folder: Path, seconds: float) -> dict[str, Any]:
    """How the stage ended, its last lines of output and the results that it wrote."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "DENDRITE_KERNELS_REQUIRE": "cuda",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    started = time.monotonic()
    log = folder / f"{stage.name}.log"
    try:
        with log.open("w") as file:
            code = subprocess.run(
                stage.command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
                timeout=min(seconds, stage.seconds),
            ).returncode  # fmt: skip
        ending = "passed" if code == 0 else f"failed ({code})"
    except subprocess.TimeoutExpired:
        ending = f"out of time ({min(seconds, stage.seconds):.0f} s)"
    except OSError as error:
        ending = f"failed ({error})"
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    shown = lines if ending != "passed" else lines[-SHOWN_LINES:]
    print(f"== {stage.name}: {ending}, {time.monotonic() - started:.0f} s")
    print("\n".join(shown[-SHOWN_LINES:]), flush=True)
    result: dict[str, Any] = {"ending": ending, "last_lines": lines[-5:]}
    written = folder / (stage.output or "")
    if stage.output and written.exists():
        result["results"] = json.loads(written.read_text())
    return result


def device_name() -> str:
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"Expected an NVIDIA GPU and nvidia-smi, got: {error}") from None
    return found.splitlines()[0].strip()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.speed.gpu", description=__doc__)
    names = [stage.name for stage in stages(Path())]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--seconds", type=float, default=580, help="for everything")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results")
    options = parser.parse_args()
    device = device_name()
    end = time.monotonic() + options.seconds
    results: dict[str, Any] = {"device": device, "stages": {}}
    options.output.mkdir(parents=True, exist_ok=True)
    target = options.output / f"gpu-{re.sub('[^a-z0-9]+', '-', device.lower())}.json"
    with tempfile.TemporaryDirectory() as name:
        for stage in stages(Path(name)):
            if stage.name not in options.only:
                continue
            left = end - time.monotonic()
            if left < 5:
                results["stages"][stage.name] = {"ending": "no time left"}
                continue
            results["stages"][stage.name] = run(stage, Path(name), left)
            target.write_text(json.dumps(results, indent=2) + "\n")  # later stages may not finish
            if stage.name == "build" and results["stages"]["build"]["ending"] != "passed":
                break
    endings = {name: entry["ending"] for name, entry in results["stages"].items()}
    print(f"{device}: {endings}\nWrote {target}")
    return int(any(ending != "passed" for ending in endings.values()))


if __name__ == "__main__":
    sys.exit(main())
