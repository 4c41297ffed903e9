"""A few calls of every kernel, for compute-sanitizer: python -m tests.gpu.sanitized."""

from __future__ import annotations

import sys

from tests.cuda_emulator import check


def main() -> int:
    wrong = 0
    for case in check.QUICK:
        for fault in check.faults(case, check.run(case, "cuda"), check.expected(case)):
            wrong += 1
            print(f"{case}: {fault}")
    print("all good" if not wrong else f"{wrong} faults")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
