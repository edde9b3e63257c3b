"""The thin line between a driver and the workers of its run: progress one way, a wish to stop the other."""

import threading
from collections.abc import Mapping
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_trainer.runtime import Stop

EXCHANGE_INTERVAL_S = 0.5


def beside_driver() -> NodeAffinitySchedulingStrategy:
    """Where an actor goes that must not be lost with another node: it ends with the driver anyway.

    A soft affinity would not do: what needs no CPU is then put on any node (Ray 2.60).
    """
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def open_link() -> ActorHandle:
    """Start a link that lives as long as this driver.

    It holds the newest progress, events not yet shown, and the driver's wish. Nothing that training needs goes
    through it.
    """

    class Link:  # in here it travels by value: its process starts without importing this package and torch
        def __init__(self) -> None:
            self._progress: dict[str, Any] = {}
            self._events: list[dict[str, Any]] = []
            self._stop = 0
            self._wants_save = False

        def exchange(self, progress: dict[str, Any], events: list[dict[str, Any]]) -> tuple[int, bool]:
            """Rank 0 tells what is new, and learns of a wish to stop, and of one to save."""
            self._progress = progress
            self._events += events
            wants_save, self._wants_save = self._wants_save, False
            return self._stop, wants_save

        def want_save(self) -> None:
            """Ray's controller is going to end the workers."""
            self._wants_save = True

        def announce(self, event: dict[str, Any]) -> None:
            """Ray's controller tells what it saw."""
            self._events.append(event)

        def take(self, stop: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
            """The driver says what it wants, and learns the newest progress and the events since last time."""
            self._stop = max(self._stop, stop)
            events, self._events = self._events, []
            return self._progress, events

        def newest_step(self) -> int:
            """The last completed step that rank 0 has told of."""
            return int(self._progress.get("step", 0))

    options = {"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": beside_driver()}
    return ray.remote(**options, enable_task_events=False)(Link).remote()  # Ray's head remembers each call otherwise


class Wish:
    """Something that is wanted once: told by a thread, seen to by training."""

    def __init__(self) -> None:
        self._told = threading.Event()

    def tell(self) -> None:
        """It is wanted."""
        self._told.set()

    def take(self) -> bool:
        """Whether it is wanted; true once for each time that it was told anew. Cheap."""
        if not self._told.is_set():
            return False
        self._told.clear()
        return True


class WorkerLink:
    """Rank 0's end: a thread exchanges in the background, so that a step never waits for the network."""

    def __init__(self, link: ActorHandle | None) -> None:
        self._link = link
        self._lock = threading.Lock()
        self._progress: Mapping[str, Any] = {}
        self._events: list[dict[str, Any]] = []
        self._closed = threading.Event()
        self.save = Wish()
        self._thread = threading.Thread(target=self._run, name="ray-trainer-link", daemon=True)
        self.stop = Stop.NONE

    def open(self) -> None:
        """Begin to exchange, where there is another end."""
        if self._link is not None:
            self._thread.start()

    def close(self) -> None:
        """Send what is left and end."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def show(self, progress: Mapping[str, Any]) -> None:
        """Replace the progress that goes out next."""
        self._progress = progress

    def announce(self, event: dict[str, Any]) -> None:
        """Add an event that goes out next."""
        with self._lock:
            self._events.append(event)

    def _run(self) -> None:
        while True:
            is_last = self._closed.wait(EXCHANGE_INTERVAL_S)
            with self._lock:
                events, self._events = self._events, []
            try:
                assert self._link is not None
                wish, wants_save = ray.get(self._link.exchange.remote(dict(self._progress), events), timeout=30)
            except ray.exceptions.RayError:
                wish, wants_save = int(Stop.NONE), False  # nobody is watching at the moment, or ever again
            self.stop = max(self.stop, Stop(wish))
            if wants_save:
                self.save.tell()
            if is_last:
                return
