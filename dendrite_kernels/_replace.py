"""Files that a reader never sees half-written."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The path of a temporary file beside `path`, which takes its place if all goes well.

    Raises:
        OSError: of the class and number of the first one, but about `path`.
    """
    target = Path(path)
    temporary = target.parent / f".dendrite_kernels.{uuid.uuid4().hex}"  # however long a name is
    try:
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        if error.errno is None:  # words of the caller's own
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
