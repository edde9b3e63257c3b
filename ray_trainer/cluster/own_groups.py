"""Process groups of their own for what a thread starts, so that a signal to its own group does not reach them."""

import functools
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_here = threading.local()


@contextmanager
def own_process_groups() -> Iterator[None]:
    """Each process that this thread starts inside leads a group of its own, as far as it is started by a plain fork.

    For Ray, which starts its processes in the group of the driver and has no setting for another one: `timeout`, for
    example, sends SIGTERM to the whole group, and Ray would end before the workers have saved. Ray gives
    `subprocess` a ``preexec_fn``, for which Python calls the functions that are registered for a fork. Should Ray
    stop to do so, its processes are in the driver's group again. They end with the driver as before: on Linux the
    kernel sees to it. Elsewhere Ray itself does, by their group, which is left alone there.
    """
    _register()
    _here.is_inside = True
    try:
        yield
    finally:
        _here.is_inside = False


@functools.cache
def _register() -> None:
    if sys.platform == "linux":
        os.register_at_fork(after_in_child=_leave)


def _leave() -> None:
    if getattr(_here, "is_inside", False):
        os.setpgid(0, 0)
