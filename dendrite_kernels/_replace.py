"""Files that a reader never sees half-written, and files that have an end."""

from __future__ import annotations

import errno
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The path of a temporary file, which takes the place of `path` if all goes well.

    As with `open`, a link leads to the file that is written, and a file that was there keeps its
    permissions.

    Raises:
        OSError: of the class and number of the first one, but about `path`.
    """
    target = Path(os.path.realpath(path))
    temporary = target.parent / f".dendrite_kernels.{uuid.uuid4().hex}"  # however long a name is
    try:
        mode = _mode(target)
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            if mode is not None:
                os.chmod(temporary, mode)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        if error.errno is None:  # words of the caller's own
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def check_regular(path: str | os.PathLike[str]) -> None:
    """OSError about `path` for what is there and no regular file: a pipe or a device has no end."""
    try:
        _mode(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def _mode(target: str | os.PathLike[str]) -> int | None:
    """The permissions of a regular file, None where there is nothing; OSError for anything else."""
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "Expected a regular file, got another kind")
    return stat.S_IMODE(mode)
