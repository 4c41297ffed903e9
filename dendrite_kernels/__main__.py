"""python -m dendrite_kernels [check | info | bench]: see docs/command-line.md."""

from __future__ import annotations

import argparse
import os
import sys

import dendrite_kernels as dk

from . import _info
from ._check import check
from .benchmark import command


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, or 1 where a result is wrong; argparse ends with 2 for bad arguments."""
    parser, bench = _parsers()
    options = parser.parse_args(arguments)
    if options.command == "bench":
        return command.run(bench, options)
    if options.command == "info":
        _info.print_machine()
    _info.print_backends()
    return 0 if options.command == "info" else int(check() > 0)


def _parsers() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """The whole, and that of `bench`."""
    parser = argparse.ArgumentParser(
        prog="python -m dendrite_kernels",
        description="What runs here, whether it computes right, and how fast a layer is.",
        epilog="Without a command: check.",
    )
    parser.add_argument("--version", action="version", version=dk.__version__)
    commands = parser.add_subparsers(dest="command", metavar="check | info | bench")
    for name, what in (
        ("check", "the backends, and a self-check of up to a minute"),
        ("info", "the backends, versions, threads and devices"),
    ):
        commands.add_parser(name, help=what, description=f"Print {what}.")
    bench = commands.add_parser(
        "bench", help="a layer of your size against every other way to compute it"
    )
    command.add_arguments(bench)
    return parser, bench


if __name__ == "__main__":
    try:
        status = main()
        if sys.stdout is not None:  # closed by who called
            sys.stdout.flush()
    except ImportError as error:  # an extension that is broken, or told to use what is not here
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except BrokenPipeError:  # the reader, `head` say, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        status = 0
    sys.exit(status)
