"""Runs the `main` of a module on the stub: python -m bench.gpu.stub MODULE ARGUMENTS."""

from __future__ import annotations

import importlib
import sys

from bench.gpu.stub import device, sizes


def main() -> int:
    module = sys.argv[1]
    device.install()
    sizes.shrink()
    sys.argv = sys.argv[1:]
    if module == "pytest":
        sys.argv += ["-p", "bench.gpu.stub.sizes"]
    code: int = importlib.import_module(module).main()
    return code


if __name__ == "__main__":
    sys.exit(main())
