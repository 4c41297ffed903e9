"""Runs a module on the stub: python -m bench.gpu.stub MODULE ARGUMENTS."""

from __future__ import annotations

import runpy
import sys

from bench.gpu.stub import device, sizes


def main() -> None:
    module = sys.argv[1]
    device.install()
    sizes.shrink()
    sys.argv = sys.argv[1:]
    if module == "pytest":
        sys.argv += ["-p", "bench.gpu.stub.sizes"]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
