"""The article's experiments: `python -m bench.paper COMMAND ...`, see docs/paper.md."""

from __future__ import annotations

import argparse
import sys
from types import ModuleType

from bench.paper.commands import analyse, guarded, report, show, sweep, train

COMMANDS: tuple[ModuleType, ...] = (train, sweep, show, analyse, report)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.paper",
        description="Train the networks of the article, beside its numbers.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in COMMANDS:
        name, text = module.__name__.rpartition(".")[2], str(module.__doc__)
        command = commands.add_parser(name, help=text.partition("\n")[0], description=text)
        module.add_arguments(command)
        command.set_defaults(main=module.main)
    options = parser.parse_args(arguments)
    return guarded(lambda: int(options.main(options)))


if __name__ == "__main__":
    sys.exit(main())
