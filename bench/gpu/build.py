"""Builds the extension _cuda in place for the GPU of this machine: python -m bench.gpu.build.

With functions of setup.py but without its `setup`, since setuptools older than 77 refuses our
pyproject.toml.
"""

from __future__ import annotations

import os
import runpy
import sys
import sysconfig
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
    os.environ["CUDA_HOME"] = str(Path(compiler).parents[1])
    os.environ["DENDRITE_KERNELS_CUDA_ARCHS"] = f"{major}{minor}"
    os.chdir(ROOT)
    target = ROOT / "dendrite_kernels" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    target.unlink(missing_ok=True)  # no older one takes the place of one that cannot be built
    functions = runpy.run_path("setup.py")
    functions["build_cuda"](functions["cuda_extension"](), target, ROOT / "build" / "gpu")
    print(f"{compiler} built {target.name} for sm_{major}{minor}, {target.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
