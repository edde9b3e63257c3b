"""Has Ray's controller carry out a run, and starts another one where it was lost."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import ray
import ray.train
from ray.actor import ActorHandle
from ray.train.torch import TorchTrainer

from ray_trainer.checkpoint.catalog import list_checkpoints
from ray_trainer.cluster.events import explain_failure, final_error, furthest_step, record
from ray_trainer.cluster.groups import Holdings
from ray_trainer.cluster.rejoin import Rejoining
from ray_trainer.cluster.retries import Retries
from ray_trainer.cluster.storage import mirror
from ray_trainer.cluster.watching import Watch, exchange
from ray_trainer.cluster.worker import Outcome
from ray_trainer.errors import RunError
from ray_trainer.runtime import Stop
from ray_trainer.storage import Storage

logger = logging.getLogger(__name__)

POLL_INTERVAL_S = 0.25
_ASK_EVERY_S = 10.0
_ASK_OFTEN_S = 3.0  # once the run is to stop: Ray's controller may wait for room all the while
_STARTS_WITHIN_S = 20.0
_NO_ROOM = "the cluster has had no room for all workers for {:.0f} s; they start as soon as there is"
_LEAVES = "a node or a worker of the run is going to be taken away; all workers have saved and are started anew"


def run_to_end(
    prepare: Callable[[], tuple[TorchTrainer, Rejoining | None]],
    storage: Storage,
    link: ActorHandle,
    watch: Watch,
    retries: Retries,
) -> Outcome:
    """Train until the run ends, through losses of Ray's controller that had progress in between, and of nodes.

    Workers that leave a node which is going to be taken away have saved; Ray starts none there any more. Those of a
    controller that is gone are ended; they can't save any more once the next ones have claimed the run.

    Args:
        prepare: makes what a start needs: a trainer, and how its workers find each other if they do.
        storage: the run's directory, fenced.
        link: to the workers.
        watch: sees the run, and may end it.
        retries: how many losses in a row there may be without progress.

    Raises:
        RunError: the run failed.
    """
    while True:
        mirror(storage, list_checkpoints(storage))
        start = _Start(*prepare(), link, watch)
        ended = start.wait()
        if isinstance(ended, Outcome) and ended.stop is Stop.PREEMPTION:
            if watch.wish() is not Stop.NONE:  # of all processes, as by Slurm
                return replace(ended, stop=watch.wish())
            record(storage, link, "preemption", reason=_LEAVES)
            continue
        if not isinstance(ended, ray.exceptions.RayActorError) or not retries.allow(furthest_step(storage, link)):
            mirror(storage, list_checkpoints(storage))
            return _outcome(ended, storage)
        record(storage, link, "controller_lost", reason="Ray's controller of the run died; another one is started")
        start.end()


class _Start:
    """One start of a controller, which works in a thread."""

    def __init__(self, trainer: TorchTrainer, rejoining: Rejoining | None, link: ActorHandle, watch: Watch) -> None:
        self._trainer = trainer
        self._rejoining = rejoining
        self._link = link
        self._watch = watch
        self._ended: Outcome | BaseException | None = None
        self._told: Outcome | None = None
        self._asked_s = 0.0
        self._holdings = Holdings()
        self._looked_s = 0.0
        self._waits_since_s: float | None = None
        self._is_told = False

    def wait(self) -> Outcome | BaseException:
        """What came of it; meanwhile this thread passes on what is new, and the wish to stop."""
        thread = threading.Thread(target=self._work, name="ray-trainer-fit", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(timeout=POLL_INTERVAL_S)
            self._exchange()
            outcome = self._outcome_without_ray() or self._outcome_without_workers()
            if outcome is not None:
                self.end()
                return outcome
        self._exchange()
        assert self._ended is not None  # the thread leaves with it
        return self._ended

    def end(self) -> None:
        """End all that there is of it: Ray does so after the loss of a controller only where it has a dashboard."""
        self._holdings.end()
        if self._rejoining is not None:
            self._rejoining.close()

    def _outcome_without_ray(self) -> Outcome | None:
        """What the workers have said a while ago, if Ray's controller does not: it waits for one that died."""
        every_s = _ASK_EVERY_S if self._watch.wish() is Stop.NONE else _ASK_OFTEN_S
        if self._rejoining is None or time.monotonic() < self._asked_s + every_s:
            return None
        self._asked_s = time.monotonic()
        before, self._told = self._told, self._rejoining.outcome()
        if before is None or self._told is None:
            return None
        logger.warning("The run has ended, but Ray's controller has not: it is ended.")
        return before

    def _outcome_without_workers(self) -> Outcome | None:
        """What the wish to stop comes to where the cluster has no room for the workers: nothing is there to be saved.

        Workers that are on their way are waited for: Ray 2.60's controller may hang if it is ended meanwhile.
        """
        now_s = time.monotonic()
        if now_s < self._looked_s + _ASK_OFTEN_S:
            return None
        self._looked_s = now_s
        if not self._holdings.wait_for_room():
            self._waits_since_s = None
            return None
        self._waits_since_s = self._waits_since_s or now_s
        waited_s = now_s - self._waits_since_s
        if waited_s < _STARTS_WITHIN_S:
            return None
        if not self._is_told:
            self._is_told = True
            self._watch.see({}, [{"event": "waiting_for_room", "reason": _NO_ROOM.format(waited_s)}])
        wish = self._watch.wish()
        return None if wish is Stop.NONE else Outcome(results=None, error=None, stop=wish)

    def _work(self) -> None:
        try:
            self._ended = self._trainer.fit().return_value
        except BaseException as error:  # carried to the caller's thread
            self._ended = error

    def _exchange(self) -> None:
        wish = self._watch.wish()
        if self._rejoining is not None and wish is not Stop.NONE:
            self._rejoining.stop(wish)  # again and again: it forgets all when it starts anew
        for event in exchange(self._link, self._watch):
            self._holdings.take(event)


def _outcome(ended: Outcome | BaseException, storage: Storage) -> Outcome:
    if isinstance(ended, ray.train.TrainingFailedError):
        final = final_error(ended)
        if final is not None:
            return Outcome(results=None, error=final, stop=Stop.NONE)
        raise RunError(explain_failure(ended, storage)) from ended
    if isinstance(ended, ray.exceptions.RayError):
        raise RunError(explain_failure(ended, storage)) from ended
    if isinstance(ended, BaseException):
        raise ended
    return ended
