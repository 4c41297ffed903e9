"""Builds, checks and times the CUDA backend on an NVIDIA GPU, in one call of under ten minutes.

    python -m bench.gpu --output DIR [--only build smoke ...] [--seconds 580] [--dry-run]

Every stage is a process of its own. It may use its share of the time and what those before it left;
then its whole process group is killed and the next one runs. Stages that measure run alone and
first; the long checks run side by side at the end. Needs a checkout, a CUDA build of torch, nvcc,
pybind11, setuptools and pytest, but no network, no make and no git.

DIR gets two files: gpu.json, replaced whenever a stage has ended, and gpu.log. A dry run has a stub
in place of the device, tiny sizes, and "dry-run" in the names of its files.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.gpu.processes import LIVE, NO_DEVICE, ROOT, Stage, kill, run


def stages(python: list[str]) -> list[Stage]:
    """`python` starts a module of Python: `python -m`, or the stub in a dry run."""
    writes = ["--output", "{results}"]
    timed = [*writes, "--seconds", "{seconds}"]
    tests = [*python, "pytest", "-q", "-p", "no:cacheprovider"]
    citizens = [f"tests/gpu/test_gpu_{name}.py" for name in ("citizen", "distributed")]
    sanitize = [*python, "bench.gpu.sanitize"]
    return [
        Stage("preflight", [*python, "bench.gpu.preflight", *writes], 40, needs_build=False),
        Stage("build", [*python, "bench.gpu.build"], 60, needs_build=False),
        Stage("smoke", [*python, "tests.gpu.sanitized"], 30),
        Stage("timing", [*python, "bench.gpu.timing", *timed], 120),
        Stage("sweep", [*python, "bench.gpu.sweep", *timed], 100),
        Stage("memory", [*python, "bench.gpu.memory", *writes], 40),
        Stage("profile", [*python, "bench.gpu.profile", *writes], 30),
        Stage("tests", [*tests, "tests/gpu/test_gpu_kernels.py"], 160, alone=False),
        Stage("memcheck", [*sanitize, "memcheck"], 160, alone=False),
        Stage("racecheck", [*sanitize, "racecheck"], 160, alone=False),
        Stage("citizens", [*tests, *citizens], 160, alone=False),
    ]


class Call:
    """The stages that are to run, and what has come of them."""

    def __init__(self, chosen: list[Stage], seconds: float, output: Path, dry: bool) -> None:
        self.chosen, self.output = chosen, output
        together = max((stage.share for stage in chosen if not stage.alone), default=0.0)
        self.scale = seconds / (sum(stage.share for stage in chosen if stage.alone) + together)
        self.started, self.shared = time.monotonic(), 0.0
        self.lock = threading.Lock()
        self.name = "gpu-dry-run" if dry else "gpu"
        self.results: dict[str, Any] = {
            "run": NO_DEVICE if dry else "on a GPU",
            "command": ["python", "-m", "bench.gpu", *sys.argv[1:]],
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "stages": {},
        }

    def run(self, folder: Path) -> None:
        for stage in self.chosen:
            if stage.alone:
                self._run_one(stage, folder)
        checks = [stage for stage in self.chosen if not stage.alone]
        with ThreadPoolExecutor(max(1, min(len(checks), os.cpu_count() or 1))) as pool:
            list(pool.map(lambda check: self._run_one(check, folder), checks))

    def _run_one(self, stage: Stage, folder: Path) -> None:
        shared = self.shared + stage.share
        if stage.alone:
            self.shared = shared
        limit = self.started + self.scale * shared - time.monotonic()
        build = self.results["stages"].get("build", {"ending": "passed"})["ending"]
        if stage.needs_build and build != "passed":
            entry = {"ending": f"skipped: build {build}"}
            print(f"== {stage.name}: {entry['ending']}", flush=True)
        elif limit < 1:
            entry = {"ending": "no time left"}
        else:
            log = self.output / f"{self.name}.log"
            entry = run(stage, 0.9 * self.scale * stage.share, limit, folder, log)
        with self.lock:
            self.results["stages"][stage.name] = entry
            self._save()

    def _save(self) -> None:
        target = self.output / f"{self.name}.json"
        temporary = target.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.results, indent=1) + "\n")
        temporary.replace(target)

    def summary(self) -> str:
        lines = [f"{self.results['run']}: {self.output / self.name}.json"]
        for name, entry in self.results["stages"].items():
            lines.append(f"{name:12s}{entry.get('seconds', 0):6.1f} s  {entry['ending']}")
        return "\n".join(lines)

    def good(self) -> bool:
        return all(entry["ending"] == "passed" for entry in self.results["stages"].values())


def substitute(folder: Path) -> None:
    """Stands in for safetensors, where it is missing: the package needs it for files only."""
    if importlib.util.find_spec("safetensors") is not None:
        return
    package = folder / "substitutes" / "safetensors"
    package.mkdir(parents=True)
    names = '__version__ = "0, a substitute"\nSafetensorError = OSError\nsafe_open = None\n'
    (package / "__init__.py").write_text(names)
    (package / "torch.py").write_text("save_file = None\n")
    paths = [os.environ.get("PYTHONPATH", ""), str(package.parent)]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


def stop(*_: object) -> None:
    """The call itself is told to end: nothing that it started lives on."""
    for group in list(LIVE):
        kill(group)
    os._exit(1)


def main() -> int:
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    start = [sys.executable, "-m"]
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    names = [stage.name for stage in stages(start)]
    parser.add_argument("--output", type=Path, default=ROOT / "reports" / "gpu")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="STAGE")
    parser.add_argument("--seconds", type=float, default=580, help="for everything")
    parser.add_argument("--dry-run", action="store_true", help="a stub in place of the device")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        substitute(Path(name))
        if options.dry_run:
            from bench.gpu.stub import tools

            tools.install(Path(name))
            start = [*start, "bench.gpu.stub"]
        chosen = [stage for stage in stages(start) if stage.name in options.only]
        call = Call(chosen, options.seconds, options.output.resolve(), options.dry_run)
        (call.output / f"{call.name}.log").unlink(missing_ok=True)
        call.run(Path(name))
    print(call.summary())
    return int(not call.good())


if __name__ == "__main__":
    sys.exit(main())
