"""Draw the figures and write one HTML page: our numbers beside the article's, what each run cost.

The figure of embeddings needs `analyse --embed` with the same --output before.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.paper.report_page import report
from bench.paper.table import read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tables", type=Path, nargs="+", metavar="TABLE")
    parser.add_argument("--output", type=Path, default=Path("reports/paper"), help="(%(default)s)")


def main(options: argparse.Namespace) -> int:
    paths = report(read(options.tables), options.output)
    print("\n".join(f"Wrote {path}" for path in paths))
    return 0
