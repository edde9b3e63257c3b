"""Errors of file systems that say which file, and what to do."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray_trainer.storage.faults import advice

_EXPLAINED = "ray_trainer_explained"


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Add the file's name to errors that came without it, and advice where there is some."""
    try:
        yield
    except OSError as error:
        named = _named(error, str(path))
        if named is error:
            raise
        raise named from error


def _named(error: OSError, path: str) -> OSError:
    has_name = error.filename is not None and getattr(error, "filename2", None) is None
    if error.errno is None and isinstance(error, FileNotFoundError):
        error.errno = errno.ENOENT
    if _EXPLAINED in error.__dict__ and (has_name or error.errno is None):
        return error
    help_text = advice(error, path)
    if error.errno is not None:
        text = error.strerror or os.strerror(error.errno)
        if has_name and not help_text:
            return error
        named = OSError(error.errno, f"{text}{_in_brackets(help_text)}", str(error.filename) if has_name else path)
    else:
        named = type(error)(f"{error}{_in_brackets(help_text)}: {path!r}")
    named.__dict__[_EXPLAINED] = True  # where one operation is within another, the inner one has said it
    return named


def _in_brackets(text: str) -> str:
    return f" ({text})" if text else ""
