"""What Ray knows before it happens: a node that is going to be taken away, a head that does not answer any more."""

import logging
import threading
import time
from collections.abc import Callable

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined] # Ray Serve looks for drained nodes with it too

from ray_trainer.errors import LeaseLostError
from ray_trainer.metrics import EventLog
from ray_trainer.runtime import Stop
from ray_trainer.storage import Storage

logger = logging.getLogger(__name__)

POLL_INTERVAL_S = 1.0
ANSWER_WITHIN_S = 3.0
#: Ray ends all processes of a cluster whose head is gone for 60 s (``RAY_gcs_rpc_server_reconnect_timeout_s``).
LOST_AFTER_S = 8.0


class Notices:
    """Asks Ray's head again and again in a thread; training reads what came of it at each step.

    Ray's own way, `ray.train.get_preemption_info`, is a barrier of all workers at each step.

    Args:
        storage: the run's directory as it is at the moment, for the events.
        nodes: ids of the nodes on which workers of this run are.

    Attributes:
        stop: `Stop.PREEMPTION` once one of these nodes is going to be taken away.
    """

    def __init__(self, storage: Callable[[], Storage], nodes: frozenset[str]) -> None:
        self._storage = storage
        self._nodes = nodes
        self._head = GcsClient(address=ray.get_runtime_context().gcs_address)
        self._closed = threading.Event()
        self._wants_save = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ray-trainer-notices", daemon=True)
        self.stop = Stop.NONE

    def open(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def close(self) -> None:
        """End; an answer that is waited for is given up."""
        self._closed.set()

    def take_wish_to_save(self) -> bool:
        """Whether a checkpoint is wanted at once; true once for each loss of the head."""
        if not self._wants_save.is_set():
            return False
        self._wants_save.clear()
        return True

    def _run(self) -> None:
        answered_at_s = time.monotonic()
        is_lost = False
        while not self._closed.wait(POLL_INTERVAL_S):
            try:
                drained = set(self._head.get_draining_nodes(timeout=ANSWER_WITHIN_S))  # hexadecimal ids
            except (ray.exceptions.RpcError, ray.exceptions.GetTimeoutError) as error:
                if not is_lost and time.monotonic() - answered_at_s > LOST_AFTER_S:
                    is_lost = True
                    self._wants_save.set()
                    self._record("head_lost", "Ray's head does not answer; a checkpoint is written at once", error)
                continue
            if is_lost:
                self._record("head_back", "Ray's head answers again")
            answered_at_s, is_lost = time.monotonic(), False
            if self.stop is Stop.NONE and drained & self._nodes:
                self.stop = Stop.PREEMPTION

    def _record(self, event: str, reason: str, error: BaseException | None = None) -> None:
        logger.warning("%s%s", reason, "" if error is None else f": {error}")
        try:
            EventLog.of_controller(self._storage(), writer="notices").record(event, reason=reason)
        except (OSError, LeaseLostError) as failure:
            logger.warning("The event %s could not be recorded: %s", event, failure)
