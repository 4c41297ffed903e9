"""Runs a kernel of planted.cu on one block (race_blocks: two); the last line is a report in JSON.

python -m tests.cuda_emulator.ptx.planted LIBRARY KERNEL
"""

from __future__ import annotations

import json
import struct
import sys

import numpy as np

from tests.cuda_emulator.ptx.calls import Library

THREADS = 64


def main() -> None:
    _, path, kernel = sys.argv
    library = Library(path)
    memory = np.arange(2 * THREADS, dtype=np.float32)  # in, and next to it out
    size = memory.nbytes // 2
    start = memory.ctypes.data
    library.announce([(start, size), (start + size, size)])
    library.set_order(7)
    blocks = 2 if kernel == "race_blocks" else 1
    parameter = struct.pack("QQixxxx", start, start + size, THREADS)
    library.launch(kernel, blocks, THREADS, 4 * THREADS, parameter)
    print(json.dumps(library.report()))


if __name__ == "__main__":
    main()
