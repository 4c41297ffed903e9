"""Fuzz one target with atheris: `python -m tests.fuzz npz --seconds 300`.

Needs atheris (Linux, x86-64). The inputs that reach new code gather in reports/fuzz/TARGET, an
input that fails is written there as crash-*, and one line of numbers is printed at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import Any

import atheris

MOST_MEMORY = 2048  # MiB
LONGEST_RUN = 30  # seconds for one input

# Coverage is that of our modules and of the parsers in Python that they call.
with atheris.instrument_imports(include=["ast", "json", "tokenize", "zipfile"]):
    import zipfile

import numpy  # noqa: E402, F401
import torch  # noqa: E402, F401

with atheris.instrument_imports(include=["dendrite_kernels"]):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("reports/fuzz"))
    given = parser.parse_args()
    target, folder = TARGETS[given.target], given.folder / given.target
    folder.mkdir(parents=True, exist_ok=True)
    for data in target.seeds():
        (folder / hashlib.sha1(data).hexdigest()).write_bytes(data)

    def run(data: bytes) -> None:
        try:
            target.run(data)
        except BaseException:  # libFuzzer may not come to write it down
            print(f"failing input: {data!r}", flush=True)
            raise

    checksum: Any = zipfile.ZipExtFile
    checksum._update_crc = lambda *_: None  # it would stop the fuzzer before our code
    options = [
        f"-max_total_time={given.seconds}",
        f"-seed={given.seed}",
        f"-rss_limit_mb={MOST_MEMORY}",
        f"-timeout={LONGEST_RUN}",
        f"-artifact_prefix={folder}/",
        "-print_final_stats=1",
        "-max_len=65536",
    ]
    atheris.Setup([sys.argv[0], *options, str(folder)], run)
    atheris.Fuzz()


main()
