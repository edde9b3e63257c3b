"""A worker process that is told to end (SIGTERM) has the run save before it goes.

Whoever takes a machine away says so first with that signal: Slurm, Kubernetes, systemd, an operator. By itself Ray
2.60 ends a worker at once, and all that was not saved is lost. Here the worker trains on, and what it knows reaches
the others with the next step.
"""

import signal
import threading
from types import FrameType

from ray_trainer.cluster.internals import WorkerCallback, missing_call, unless_missing

_told = threading.Event()


class TerminationNotice(WorkerCallback):
    """Runs in every worker, at its start, on the main thread: the first SIGTERM is a notice, the second one ends it."""

    def after_init_train_context(self) -> None:
        """Called by Ray before training begins, which is done by another thread."""
        before = signal.getsignal(signal.SIGTERM)

        def hear(number: int, frame: FrameType | None) -> None:
            if _told.is_set() and callable(before):
                before(number, frame)  # Ray's own
            _told.set()

        signal.signal(signal.SIGTERM, hear)


def listeners() -> list[TerminationNotice]:
    """What Ray has to call on each worker; nothing where another version of Ray has no such calls."""
    missing = missing_call([(WorkerCallback, "after_init_train_context", 0)])
    return unless_missing(missing, "A worker that gets SIGTERM ends unsaved", TerminationNotice)


def is_to_go() -> bool:
    """Whether this process was told to end."""
    return _told.is_set()
