"""Builds the extension _cuda in place for the GPU of this machine: python -m bench.gpu.build."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from bench.gpu.preflight import find
from bench.gpu.processes import ROOT


def main() -> int:
    major, minor = torch.cuda.get_device_capability(0)
    compiler = find("nvcc")
    if compiler is None:
        print("Expected nvcc on PATH or in a CUDA toolkit, got none")
        return 1
    environment = {
        **os.environ,
        "CUDA_HOME": str(Path(compiler).parents[1]),
        "DENDRITE_KERNELS_CUDA_ARCHS": f"{major}{minor}",
    }
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    built = subprocess.run(command, cwd=ROOT, env=environment).returncode
    files = [path.name for path in (ROOT / "dendrite_kernels").glob("_cuda.*")]
    print(f"nvcc {compiler}, sm_{major}{minor}: {files or 'no extension'}")
    return built


if __name__ == "__main__":
    sys.exit(main())
