"""In-job recovery: when a worker dies, the others keep process and state, and go on with the one that replaces it.

A *generation* is the time in which the same processes train together. It ends when a collective fails because one
of them is gone. Then every survivor keeps the state of the last step that it has completed, and asks for the next
generation at the rendezvous; so does the newcomer whom Ray starts in place of the dead one. Once all are there they
form a process group, agree on who has completed the most steps, and all go on from that state. What no survivor has
is looked for where a restart looks: in memory outside of the workers, then on storage.

Workers beyond the ranks of a run are spares, which wait at the rendezvous. One of them takes the place of a worker
that died at once; the newcomer is the next spare.
"""

import gc
import logging
import os
import pickle
import threading
import time
import uuid
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import ray
import ray.train
from ray.actor import ActorHandle
from torch import distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore  # as torch.distributed has them, and typed

from ray_trainer import distributed
from ray_trainer.cluster import rendezvous
from ray_trainer.cluster.config import ClusterConfig
from ray_trainer.cluster.connections import Connection, connections_between_ranks, hang_up, open_connections
from ray_trainer.cluster.link import beside_driver
from ray_trainer.cluster.rendezvous import Card
from ray_trainer.cluster.replacement import missing_interface
from ray_trainer.cluster.termination import is_to_go
from ray_trainer.config import TrainingConfig
from ray_trainer.runtime import Stop
from ray_trainer.storage.snapshots import ProcessMemory

logger = logging.getLogger(__name__)

T = TypeVar("T")

_ASK_EVERY_S = 0.05
_SPARE_ASKS_EVERY_S = 0.1
_ANSWERS_WITHIN_S = 30.0
_TELLS_WITHIN_S = 5.0  # Ray's controller, which has more to do
_LISTENS_EVERY_S = 1.0
_NOTICES_WITHIN_S = 2.0  # where connections are closed a rank sees by itself, at the next collective, that one is gone
_FORMS_WITHIN = timedelta(seconds=30)
_ENDS_WITHIN_S = 300.0
_APPEARS_WITHIN_S = 60.0  # a worker that has lost another one; what it does meanwhile may take a while


def open_rendezvous(num_ranks: int, num_spares: int, may_shrink: bool) -> ActorHandle:
    """Start a `Rendezvous`; it lives as long as this driver has the handle."""
    ray.cloudpickle.register_pickle_by_value(rendezvous)  # see there
    try:
        options = {"num_cpus": 0, "max_restarts": -1, "enable_task_events": False}  # it is asked again and again
        actor = ray.remote(scheduling_strategy=beside_driver(), **options)(rendezvous.Rendezvous)
        return actor.remote(num_ranks, num_ranks + num_spares, may_shrink)
    finally:
        ray.cloudpickle.unregister_pickle_by_value(rendezvous)


def rejoins(cluster: ClusterConfig, training: TrainingConfig) -> bool:
    """Whether workers of a run are replaced one by one; else all of them are started again when one dies."""
    is_possible = (
        cluster.in_job_recovery
        and isinstance(cluster.num_workers, int)  # Ray does not combine this with a changing number
        and cluster.num_workers > 1
        and training.parallelism != "fsdp"  # a dead rank takes its shard with it
        and not cluster.use_gpu  # NCCL ends the process of a rank that lost another one
    )
    if not is_possible:
        return False
    missing = missing_interface()
    if missing is not None:
        logger.warning("Workers that die are not replaced one by one, because of another version of Ray: %s.", missing)
    return missing is None


def may_shrink(training: TrainingConfig) -> bool:
    """Whether the survivors of a run train on until the dead are replaced: the bits are the same with fewer."""
    return training.determinism == "elastic"


@dataclass(frozen=True)
class Rejoining:
    """How the workers of a run find each other; travels from the driver by pickle.

    Attributes:
        rendezvous: where they meet.
        num_ranks: how many train together.
        num_spares: how many more wait for one of them to die.
        patience_s: how long they wait for those that are alive.
        are_watched: a monitor ends those that hang, so that one that does not come is at work.
    """

    rendezvous: ActorHandle
    num_ranks: int
    num_spares: int
    patience_s: float
    are_watched: bool

    @property
    def num_workers(self) -> int:
        """Of Ray."""
        return self.num_ranks + self.num_spares

    def run(self, train: Callable[[ProcessMemory], T], warm_up: Callable[[], None]) -> T:
        """Train through all generations of this process, or wait in vain to be needed.

        Args:
            train: one generation; from what is in the memory if there is something. Leaves there what it was at.
            warm_up: done once by a process that is a spare.

        Returns:
            What rank 0 got, on all workers: any of them may be the one that Ray asks.
        """
        member = _Member(self, warm_up)
        gc.freeze()  # what is imported is not looked through when a group is left
        while True:
            told = member.join()
            if told is None:
                told = self._generation(member, train)
                member.leave()
            if told is not None:
                return cast(T, pickle.loads(told))

    def _generation(self, member: "_Member", train: Callable[[ProcessMemory], T]) -> bytes | None:
        """What the run has come to, or None if there has to be another generation."""
        try:
            outcome = train(member.memory)
        except Exception as error:
            if not distributed.ends_generation(error):
                raise
            member.notice(error)
            return None
        told = member.end(ray.cloudpickle.dumps(outcome))
        if told is None:
            member.memory.kept = None  # what was trained is on storage
        return told

    def outcome(self) -> Any | None:
        """What the workers say that the run has come to; None as long as it lasts."""
        try:
            told = ray.get(self.rendezvous.outcome.remote(), timeout=_TELLS_WITHIN_S)
        except ray.exceptions.RayError:
            return None
        return None if told is None else pickle.loads(told)

    def stop(self, stop: Stop) -> None:
        """Let survivors that wait for others save what they have, and end."""
        self.rendezvous.stop.remote(int(stop))

    def close(self) -> None:
        """End the rendezvous: there are no workers any more."""
        with suppress(ray.exceptions.RayError):
            ray.kill(self.rendezvous)

    def ranks_of(self, places: Collection[int]) -> dict[int, int | None]:
        """See `Rendezvous.bury`; where it does not answer, each place is taken for the rank."""
        try:
            return dict(ray.get(self.rendezvous.bury.remote(list(places)), timeout=_TELLS_WITHIN_S))
        except ray.exceptions.RayError:
            return {place: place for place in places}


class _Member:
    """This process among those that train together."""

    def __init__(self, way: Rejoining, warm_up: Callable[[], None]) -> None:
        self._way = way
        self._warm_up = warm_up
        # where addresses are exchanged, if this is rank 0; of no use to the others once it is gone
        self._store = TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=_FORMS_WITHIN)
        self._card = {
            "name": uuid.uuid4().hex,
            "place": ray.train.get_context().get_world_rank(),
            "actor": ray.get_runtime_context().current_actor,
            "address": (ray.util.get_node_ip_address(), self._store.port),
        }
        self._is_warm = False
        self._rank = -1
        self._number = 0  # of the newest generation that is known here
        self._cards: dict[int, Card] = {}  # of its members
        self._connections: set[Connection] = set()
        self._left = threading.Event()
        self.memory = ProcessMemory(story={"is_new": True})

    def join(self) -> bytes | None:
        """Become part of the next generation, or wait until the run has ended, and return what it came to."""
        while True:
            told = self._wait_for_others()
            if told is not None:
                return told
            self.memory.story |= {"generation": self._number, "joined_at": time.time()}
            try:
                self._form()
            except RuntimeError as error:  # somebody has died meanwhile
                logger.warning("The workers could not connect: %s", error)
                self.leave()
            else:
                self.memory.story["formed_at"] = time.time()
                self.memory.may_grow = False
                self.memory.stop = max(card.get("stop", 0) for card in self._cards.values())
                self._left = threading.Event()
                threading.Thread(
                    target=self._listen, args=(self._left,), name="ray-trainer-rejoin", daemon=True
                ).start()
                return None

    def notice(self, error: Exception) -> None:
        """Another rank is lost, or waits to join."""
        at = "" if self.memory.kept is None else f" at step {self.memory.kept.part.key[1]}"
        logger.warning("Rank %d leaves its group%s, and goes on: %s", self._rank, at, str(error).splitlines()[0])
        self.memory.story.setdefault("noticed_at", time.time())

    def leave(self) -> None:
        """Leave the process group, and let go of everything that belonged to it."""
        self._left.set()
        hang_up(self._connections)
        self._connections = set()
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()

    def _listen(self, left: threading.Event) -> None:
        """Hang up once the others have gone on without a rank of this generation: nothing tells who waits for it.

        A process that dies closes its connections; a machine that is cut off, or loses its power, does not. And pass
        on that somebody waits to join.
        """
        number, connections = self._number, self._connections
        while not left.wait(_LISTENS_EVERY_S):
            outlook = self._ask("outlook", number)
            if left.is_set():
                return
            self.memory.may_grow = outlook.get("may_grow", False)
            if outlook.get("is_over") and not left.wait(_NOTICES_WITHIN_S):
                logger.warning("Rank %d waits for a rank that is lost, and hangs up.", self._rank)
                hang_up(connections)
                return

    def end(self, outcome: bytes) -> bytes | None:
        """Wait until all ranks are done; returns what the run came to, or None if one has died before."""
        deadline_s = time.monotonic() + _ENDS_WITHIN_S
        while time.monotonic() < deadline_s:
            answer = self._ask("end", self._rank, self._number, outcome)
            if answer.get("is_broken"):
                return None
            if "outcome" in answer:
                return cast(bytes, answer["outcome"])
            time.sleep(_ASK_EVERY_S)
        logger.warning("Rank %d is done and does not wait for the others any longer.", self._rank)
        return outcome

    def _wait_for_others(self) -> bytes | None:
        """Until this is a rank of a generation, or the run has ended; returns what it came to then.

        There is no limit: a worker that Ray has no room for comes once there is room, and to start all of them again
        would need no less.
        """
        late_s = self._way.patience_s / 2 if self._way.are_watched else _APPEARS_WITHIN_S
        ends_absent_at_s = time.monotonic() + late_s
        while True:
            answer = self._ask("join", self._card, self._number)
            if "outcome" in answer:
                return cast(bytes, answer["outcome"])
            if "members" in answer:
                self._number, self._cards = answer["number"], answer["members"]
                self._rank = next(
                    (rank for rank, card in self._cards.items() if card["name"] == self._card["name"]), -1
                )
                if self._rank >= 0:
                    return None
            gathers = answer.get("gathers", True)
            if is_to_go():
                if not gathers:
                    raise RuntimeError("This worker was told to end (SIGTERM), and is not needed at the moment.")
                self._way.stop(Stop.PREEMPTION)  # those who wait save what they have
            if not gathers:
                if not self._is_warm:
                    self._is_warm = True
                    self.memory.story["is_spare"] = self._way.num_spares > 0
                    self._warm_up()
                    gc.collect()
                    gc.freeze()
                ends_absent_at_s = time.monotonic() + late_s
                time.sleep(_SPARE_ASKS_EVERY_S)
                continue
            if time.monotonic() > ends_absent_at_s:
                self._end_absent()
                ends_absent_at_s = time.monotonic() + _APPEARS_WITHIN_S
            time.sleep(_ASK_EVERY_S)

    def _end_absent(self) -> None:
        """End the workers that do not come here: they hang, and Ray would not notice."""
        for actor in self._ask("absent") or []:
            logger.warning("A worker that does not answer any more is ended, because others wait for it.")
            with suppress(ray.exceptions.RayError):
                ray.kill(actor)

    def _ask(self, method: str, *arguments: Any) -> Any:
        """What the rendezvous answers; nothing while it starts anew and has to be told who is who."""
        try:
            answer = ray.get(getattr(self._way.rendezvous, method).remote(*arguments), timeout=_ANSWERS_WITHIN_S)
            if isinstance(answer, dict) and answer["number"] < self._number:
                ray.get(self._way.rendezvous.remember.remote(self._number, self._cards), timeout=_ANSWERS_WITHIN_S)
        except ray.exceptions.RayError as error:
            logger.debug("The rendezvous does not answer: %s", error)
            return {}
        return answer

    def _form(self) -> None:
        before = open_connections()
        store = self._store
        if self._rank > 0:
            host, port = self._cards[0]["address"]
            store = TCPStore(host, port, is_master=False, timeout=_FORMS_WITHIN)
        num_ranks = len(self._cards)
        os.environ.update(RANK=str(self._rank), WORLD_SIZE=str(num_ranks))
        shared = PrefixStore(f"generation-{self._number}", store)
        dist.init_process_group("gloo", store=shared, rank=self._rank, world_size=num_ranks, timeout=_FORMS_WITHIN)
        self._connections = connections_between_ranks(before)
        distributed.set_patience(self._way.patience_s)
