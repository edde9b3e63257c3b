"""Errors of file systems that say which file."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Add the file's name to errors that came without it."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and getattr(error, "filename2", None) is None:
            raise
        if error.errno is None and isinstance(error, FileNotFoundError):
            error.errno = errno.ENOENT
        if error.errno is None:
            raise type(error)(f"{error}: {str(path)!r}") from error
        raise OSError(error.errno, error.strerror or os.strerror(error.errno), str(path)) from error
