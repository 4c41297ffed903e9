"""The commands of `python -m bench.paper`.

Each is a module: its docstring is its help, `add_arguments` has its options, and `main` returns the
exit code.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


def guarded(command: Callable[[], int]) -> int:
    """Run a command; what a user may have caused ends with a line on stderr, not a traceback."""
    try:
        code = command()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who reads the output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return code
