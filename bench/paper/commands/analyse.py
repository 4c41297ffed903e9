"""Write what a table says as JSON: efficiency, matched parameters, tests, the article's numbers.

With --embed, the best network of each family is trained again, and the activities of its nodes are
laid out by t-SNE: needed for the figure of embeddings, takes some minutes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.paper.analysis import analyse
from bench.paper.embeddings import embed_best
from bench.paper.table import read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tables", type=Path, nargs="+", metavar="TABLE")
    parser.add_argument("--output", type=Path, default=Path("reports/paper"), help="(%(default)s)")
    parser.add_argument("--embed", action="store_true", help="embeddings, too")
    parser.add_argument("--data-root", help="folder with the data sets' files, for --embed")


def main(options: argparse.Namespace) -> int:
    results = read(options.tables)
    for path in analyse(results, options.output):
        print(f"Wrote {path}", flush=True)
    if options.embed:
        print("Training the best networks again for their embeddings", flush=True)
        for path in embed_best(results, options.output, options.data_root):
            print(f"Wrote {path}")
    return 0
