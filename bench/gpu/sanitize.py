"""A few calls of every kernel under compute-sanitizer: python -m bench.gpu.sanitize memcheck."""

from __future__ import annotations

import os
import subprocess
import sys

from bench.gpu.preflight import find
from bench.gpu.processes import UNAVAILABLE


def main() -> int:
    program, tool = find("compute-sanitizer"), sys.argv[1]
    if program is None:
        print("compute-sanitizer not found")
        return UNAVAILABLE
    check = [program, f"--tool={tool}", "--error-exitcode=9", "--target-processes=all"]
    # torch's caching allocator hands out parts of large blocks, whose ends memcheck cannot see.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [*check, sys.executable, "-m", "tests.gpu.sanitized"]
    return subprocess.run(command, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
