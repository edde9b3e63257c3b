"""What Ray knows before it happens: a node that is going to be taken away, a head that does not answer any more."""

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import ray

from ray_trainer.cluster.departure import Departure, Move
from ray_trainer.cluster.link import Wish
from ray_trainer.errors import LeaseLostError
from ray_trainer.metrics import EventLog
from ray_trainer.runtime import Stop
from ray_trainer.storage import Storage

logger = logging.getLogger(__name__)

POLL_INTERVAL_S = 1.0
ANSWER_WITHIN_S = 3.0
#: Ray ends all processes of a cluster whose head is gone for 60 s (``RAY_gcs_rpc_server_reconnect_timeout_s``).
LOST_AFTER_S = 8.0
_NOTICED = (
    "A node of the run is going to be taken away in {:.0f} s, and no other one has room; a checkpoint is written at "
    "once, and training goes on"
)


class Notices:
    """Asks Ray's head again and again in a thread; training reads what came of it at each step.

    Ray's own way, `ray.train.get_preemption_info`, is a barrier of all workers at each step.

    Args:
        storage: the run's directory as it is at the moment, for the events.
        departure: from nodes that are going to be taken away.
        has_room: whether all workers would find room on nodes other than these.

    Attributes:
        stop: `Stop.PREEMPTION` once such a node is to be left.
        save: a checkpoint is wanted at once.
    """

    def __init__(
        self, storage: Callable[[], Storage], departure: Departure, has_room: Callable[[Collection[str]], bool]
    ) -> None:
        self._storage = storage
        self._departure = departure
        self._has_room = has_room
        self._head = _open_head()
        self._closed = threading.Event()
        self.save = Wish()
        self._thread = threading.Thread(target=self._run, name="ray-trainer-notices", daemon=True)
        self.stop = Stop.NONE

    def open(self) -> None:
        """Begin to ask, if this Ray has somebody to ask."""
        if self._head is not None:
            self._thread.start()

    def close(self) -> None:
        """End; an answer that is waited for is given up."""
        self._closed.set()

    def _run(self) -> None:
        answered_at_s = time.monotonic()
        is_lost = False
        while not self._closed.wait(POLL_INTERVAL_S):
            try:
                self._heed(self._head.get_draining_nodes(timeout=ANSWER_WITHIN_S))
            except (ray.exceptions.RpcError, ray.exceptions.GetTimeoutError) as error:
                if not is_lost and time.monotonic() - answered_at_s > LOST_AFTER_S:
                    is_lost = True
                    self.save.tell()
                    self._record("head_lost", "Ray's head does not answer; a checkpoint is written at once", error)
                continue
            if is_lost:
                self._record("head_back", "Ray's head answers again")
            answered_at_s, is_lost = time.monotonic(), False

    def _heed(self, deadlines: Mapping[str, int]) -> None:
        """See to nodes that are going to be taken away: UNIX milliseconds by hexadecimal id, 0 if not known."""
        leaving = self._departure.affected({node: deadline / 1000 for node, deadline in deadlines.items()})
        if not leaving or self.stop is not Stop.NONE:
            return
        move = self._departure.next_move(leaving, self._has_room(leaving), time.time())
        if move is Move.SAVE:
            self.save.tell()
            self._record("preemption_notice", _NOTICED.format(min(leaving.values()) - time.time()))
        elif move is Move.LEAVE:
            self.stop = Stop.PREEMPTION

    def _record(self, event: str, reason: str, error: BaseException | None = None) -> None:
        logger.warning("%s%s", reason, "" if error is None else f": {error}")
        try:
            EventLog.of_controller(self._storage(), writer="notices").record(event, reason=reason)
        except (OSError, LeaseLostError) as failure:
            logger.warning("The event %s could not be recorded: %s", event, failure)


def _open_head() -> Any:
    """Whom Ray Serve asks for drained nodes too, though it is not public; None where another Ray has it elsewhere."""
    try:
        from ray._raylet import GcsClient  # type: ignore[attr-defined]

        head = GcsClient(address=ray.get_runtime_context().gcs_address)
        head.get_draining_nodes  # noqa: B018 # looked up when it is used, elsewhere than in the class
        ray._private.state.available_resources_per_node  # noqa: B018 # for `has_room_elsewhere`
    except (ImportError, AttributeError, TypeError) as error:
        logger.warning(
            "Nodes that are going to be taken away are left too late, and a lost head is not noticed, because of "
            "another version of Ray: %s.",
            error,
        )
        return None
    return head
