"""Who follows a run from outside, and how it is told to stop."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol, cast

import ray
from ray.actor import ActorHandle

from ray_trainer.metrics import ProgressRecord
from ray_trainer.narration import tell
from ray_trainer.runtime import Stop

logger = logging.getLogger(__name__)

_ANSWER_WITHIN_S = 30.0


class Display(Protocol):
    """Something that shows a run while it lasts."""

    def update(self, record: ProgressRecord) -> None:
        """The newest progress."""

    def message(self, text: str) -> None:
        """Something happened."""


class Watch(Protocol):
    """Somebody who follows a run and may end it: a user, or the trial of a sweep."""

    def wish(self) -> Stop:
        """Whether the run is to stop; asked a few times a second."""

    def see(self, progress: Mapping[str, Any], events: list[dict[str, Any]]) -> None:
        """The newest progress, and the events since the last call."""


class NoDisplay:
    """Shows nothing."""

    def update(self, record: ProgressRecord) -> None:
        """See `Display`."""

    def message(self, text: str) -> None:
        """See `Display`."""


def exchange(link: ActorHandle, watch: Watch) -> list[dict[str, Any]]:
    """Pass on what is new to who watches, and his wish to the workers; returns the events."""
    try:
        answer = ray.get(link.take.remote(int(watch.wish())), timeout=_ANSWER_WITHIN_S)
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
        return []  # it starts anew; the training does not need it
    progress, events = cast(tuple[dict[str, Any], list[dict[str, Any]]], answer)
    watch.see(progress, events)
    return events


class _User:
    """Sees a run through a display, and ends it with a signal."""

    def __init__(self, display: Display, wish: Callable[[], Stop]) -> None:
        self._display = display
        self.wish = wish

    def see(self, progress: Mapping[str, Any], events: list[dict[str, Any]]) -> None:
        """See `Watch`."""
        for text in filter(None, map(tell, events)):
            self._display.message(text)
        if progress:
            self._display.update(ProgressRecord.from_dict(progress))


@contextmanager
def user(display: Display) -> Iterator[Watch]:
    """A user at a display, who may end the run with a signal."""
    with signals() as wish:
        yield _User(display, wish)


@contextmanager
def signals() -> Iterator[Callable[[], Stop]]:
    """Take the first Ctrl-C or SIGTERM as a wish to stop; the second one ends the program at once.

    Entered after Ray has started, which sets handlers of its own.
    """
    received = Stop.NONE

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal received
        if received is not Stop.NONE:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        received = Stop.SIGINT if number == signal.SIGINT else Stop.SIGTERM
        logger.warning("Stopping after the step in progress. Once more to end at once.")

    is_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if is_main else ()
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield lambda: received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
