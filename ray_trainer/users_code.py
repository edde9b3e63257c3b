"""Where in the user's own code an error came from."""

import sysconfig
import traceback
from pathlib import Path

_LIBRARIES = tuple(Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "purelib", "platlib"))
_HERE = Path(__file__).resolve().parent


def is_users(filename: str) -> bool:
    """Whether a file belongs neither to Python, nor to an installed package, nor to this one."""
    path = Path(filename).resolve()
    if not path.is_file():  # "<string>", or where a compiled library was built
        return False
    if {"site-packages", "dist-packages"} & set(path.parts):
        return False
    return not any(path.is_relative_to(place) for place in (*_LIBRARIES, _HERE))


def users_line(error: BaseException) -> str:
    """The innermost line of the user's code that an error passed, in brackets after a space; or nothing."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if is_users(frame.filename)]
    return f" ({frames[-1].filename}, line {frames[-1].lineno}: {frames[-1].line})" if frames else ""
