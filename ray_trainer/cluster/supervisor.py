"""Has Ray's controller carry out a run, and starts another one where it was lost."""

import threading
from collections.abc import Callable

import ray
import ray.train
from ray.actor import ActorHandle
from ray.train.torch import TorchTrainer

from ray_trainer.checkpoint.catalog import list_checkpoints
from ray_trainer.cluster.events import explain_failure, final_error, furthest_step, record
from ray_trainer.cluster.retries import Retries
from ray_trainer.cluster.storage import mirror
from ray_trainer.cluster.watching import Watch, exchange
from ray_trainer.cluster.worker import Outcome
from ray_trainer.errors import RunError
from ray_trainer.runtime import Stop
from ray_trainer.storage import Storage

POLL_INTERVAL_S = 0.25


def run_to_end(
    trainer: Callable[[], TorchTrainer], storage: Storage, link: ActorHandle, watch: Watch, retries: Retries
) -> Outcome:
    """Train until the run ends, through any number of losses of Ray's controller that had progress in between.

    Workers of a controller that is gone end by themselves, and can't save any more once the next ones have claimed
    the run.

    Args:
        trainer: makes one anew for each start.
        storage: the run's directory, fenced.
        link: to the workers.
        watch: sees the run, and may end it.
        retries: how many losses in a row there may be without progress.

    Raises:
        RunError: the run failed.
    """
    while True:
        mirror(storage, list_checkpoints(storage))
        ended = _wait(trainer(), link, watch)
        if not isinstance(ended, ray.exceptions.RayActorError) or not retries.allow(furthest_step(storage, link)):
            mirror(storage, list_checkpoints(storage))
            return _outcome(ended, storage)
        record(storage, link, "controller_lost", reason="Ray's controller of the run died; another one is started")


def _wait(trainer: TorchTrainer, link: ActorHandle, watch: Watch) -> Outcome | BaseException:
    """Let the controller work in a thread; this one passes on what is new, and the wish to stop."""
    box: list[Outcome | BaseException] = []

    def work() -> None:
        try:
            box.append(trainer.fit().return_value)
        except BaseException as error:  # carried to the caller's thread
            box.append(error)

    thread = threading.Thread(target=work, name="ray-trainer-fit", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(timeout=POLL_INTERVAL_S)
        exchange(link, watch)
    exchange(link, watch)
    return box[0]


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
