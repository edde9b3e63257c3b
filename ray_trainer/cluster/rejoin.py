"""In-job recovery: when a worker dies, the others keep process and state, and go on with the one that replaces it.

A *generation* is the time in which the same processes train together. It ends when a collective fails because one
of them is gone. Then every survivor keeps the state of the last step that it has completed, and asks for the next
generation at the rendezvous; so does the newcomer whom Ray starts in place of the dead one. Once all are there they
form a process group, agree on who has completed the most steps, and all go on from that state. What no survivor has
is looked for where a restart looks: in memory outside of the workers, then on storage.
"""

import gc
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import ray
import ray.train
from ray.actor import ActorHandle
from torch import distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore  # as torch.distributed has them, and typed

from ray_trainer import distributed
from ray_trainer.cluster.config import ClusterConfig
from ray_trainer.cluster.connections import Connection, connections_between_ranks, hang_up, open_connections
from ray_trainer.cluster.link import beside_driver
from ray_trainer.cluster.replacement import missing_interface
from ray_trainer.config import TrainingConfig
from ray_trainer.errors import RunError
from ray_trainer.storage.snapshots import ProcessMemory

logger = logging.getLogger(__name__)

T = TypeVar("T")

_ASK_EVERY_S = 0.05
_ANSWERS_WITHIN_S = 30.0
_LISTENS_EVERY_S = 1.0
_NOTICES_WITHIN_S = 2.0  # where connections are closed a rank sees by itself, at the next collective, that one is gone
_FORMS_WITHIN_S = 30.0
_ENDS_WITHIN_S = 300.0
_APPEARS_WITHIN_S = 60.0  # a worker that has lost another one; what it does meanwhile may take a while


def open_rendezvous() -> ActorHandle:
    """Start the place where the workers of a run find each other; it lives as long as this driver.

    It forgets everything when it dies, and needs nothing of it: whoever waits there asks again and again.
    """

    class Rendezvous:  # in here it travels by value: its process starts without importing this package and torch
        def __init__(self) -> None:
            self._number = 0
            self._members: dict[int, dict[str, Any]] = {}
            self._known: dict[int, dict[str, Any]] = {}
            self._waiting: dict[int, tuple[float, dict[str, Any]]] = {}
            self._ended: set[int] = set()

        def join(self, rank: int, size: int, past: int, card: dict[str, Any]) -> tuple[int, Any] | None:
            """The number and the cards of the next generation, once all of its ranks have asked for it of late.

            Args:
                rank: of the caller.
                size: how many ranks there are.
                past: the number of the generation the caller was in; 0 for none.
                card: who the caller is; the same until it is answered.
            """
            if self._number > past and self._members.get(rank) == card:
                return self._number, self._members
            now = time.monotonic()
            self._waiting[rank] = (now, card)
            self._known[rank] = card
            present = {rank: card for rank, (asked, card) in self._waiting.items() if now - asked < 3}
            self._number = max(self._number, past)
            if len(present) < size:
                return None
            self._number += 1
            self._members, self._waiting, self._ended = present, {}, set()
            return self._number, self._members

        def is_over(self, number: int) -> bool:
            """Whether somebody asks for the generation after this one: a rank of it is lost, or has lost another."""
            return self._number == number and bool(self._waiting)

        def absent(self, have_ended: bool) -> list[Any]:
            """The actors that were here, in any generation, and do not ask for the next one.

            Args:
                have_ended: only those that are done and never will ask.
            """
            absent = self._known.keys() - self._waiting.keys()
            return [self._known[rank]["actor"] for rank in absent if rank in self._ended or not have_ended]

        def end(self, rank: int, size: int, number: int) -> bool | None:
            """Whether all ranks are done with a generation; False if one of them asks for the next instead."""
            if self._number > number or self._waiting:
                return False
            self._number = number
            self._ended.add(rank)
            return True if len(self._ended) == size else None

    return ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=beside_driver())(Rendezvous).remote()


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


@dataclass(frozen=True)
class Rejoining:
    """How the workers of a run find each other; travels from the driver by pickle.

    Attributes:
        rendezvous: where they meet.
        patience_s: how long they wait for each other there.
        are_watched: a monitor ends those that hang, so that one that does not come is at work.
    """

    rendezvous: ActorHandle
    patience_s: float
    are_watched: bool

    def run(self, train: Callable[[ProcessMemory], T]) -> T:
        """Train through all generations of this process.

        Args:
            train: one generation; from what is in the memory if there is something. Leaves there what it was at.

        Raises:
            RunError: the others did not come in time.
        """
        member = _Member(self)
        while True:
            member.join()
            try:
                outcome = train(member.memory)
            except Exception as error:
                if not distributed.has_lost_peer(error):
                    raise
                member.notice(error)
            else:
                if member.all_have_ended():
                    member.leave()
                    return outcome
                member.memory.kept = None  # what was trained is on storage
            member.leave()


class _Member:
    """This process among those that train together."""

    def __init__(self, way: Rejoining) -> None:
        context = ray.train.get_context()
        self._way = way
        self._rank, self._size = context.get_world_rank(), context.get_world_size()
        self._name = uuid.uuid4().hex
        self._generation = 0
        self._connections: set[Connection] = set()
        self._left = threading.Event()
        self.memory = ProcessMemory(story={"is_new": True})

    def join(self) -> None:
        """Become part of the next generation.

        Raises:
            RunError: the others did not come in time.
        """
        deadline_s = time.monotonic() + self._way.patience_s
        while True:
            store = _open_store() if self._rank == 0 else None
            number, cards = self._wait_for_others(store, deadline_s)
            self._generation = number
            self.memory.story |= {"generation": number, "joined_at": time.time()}
            try:
                self._form(store, cards)
            except RuntimeError as error:  # somebody has died meanwhile
                logger.warning("The workers could not connect: %s", error)
                self.leave()
            else:
                self.memory.story["formed_at"] = time.time()
                self._left = threading.Event()
                threading.Thread(
                    target=self._listen, args=(self._left,), name="ray-trainer-rejoin", daemon=True
                ).start()
                return

    def notice(self, error: Exception) -> None:
        """Another rank is lost."""
        at = "" if self.memory.kept is None else f" at step {self.memory.kept.part.key[1]}"
        logger.warning("Rank %d goes on%s, but has lost another one: %s", self._rank, at, str(error).splitlines()[0])
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

        A process that dies closes its connections; a machine that is cut off, or loses its power, does not.
        """
        number, connections = self._generation, self._connections
        while not left.wait(_LISTENS_EVERY_S):
            if self._ask("is_over", number) and not left.wait(_NOTICES_WITHIN_S):
                logger.warning("Rank %d waits for a rank that was replaced, and hangs up.", self._rank)
                hang_up(connections)
                return

    def all_have_ended(self) -> bool:
        """Wait until all ranks are done; False if one has died before, and was replaced."""
        deadline_s = time.monotonic() + _ENDS_WITHIN_S
        while time.monotonic() < deadline_s:
            answer = self._ask("end", self._rank, self._size, self._generation)
            if answer is not None:
                return bool(answer)
            time.sleep(_ASK_EVERY_S)
        logger.warning("Rank %d is done and does not wait for the others any longer.", self._rank)
        return True

    def _wait_for_others(self, store: TCPStore | None, deadline_s: float) -> tuple[int, dict[int, dict[str, Any]]]:
        address = (ray.util.get_node_ip_address(), store.port) if store is not None else None
        card = {"name": self._name, "address": address, "actor": ray.get_runtime_context().current_actor}
        began_s = time.monotonic()
        absent_at_s = began_s + _APPEARS_WITHIN_S
        late_s = began_s + (self._way.patience_s / 2 if self._way.are_watched else _APPEARS_WITHIN_S)
        while time.monotonic() < deadline_s:
            answer = self._ask("join", self._rank, self._size, self._generation, card)
            if answer is not None:
                number, cards = answer
                return int(number), cards
            if time.monotonic() > absent_at_s:
                self._end_absent(have_ended=time.monotonic() < late_s)
                absent_at_s = time.monotonic() + _APPEARS_WITHIN_S
            time.sleep(_ASK_EVERY_S)
        raise RunError(
            f"rank {self._rank} waited {self._way.patience_s:.0f} s for the other workers in vain. "
            "See the events of the run for what happened to them; cluster.collective_timeout_s is how long they wait."
        )

    def _end_absent(self, have_ended: bool) -> None:
        """End the workers that do not come here: they are done, or hang, and Ray would not notice."""
        for actor in self._ask("absent", have_ended) or []:
            logger.warning("Rank %d waits for a worker that does not answer any more: it is ended.", self._rank)
            with suppress(ray.exceptions.RayError):
                ray.kill(actor)

    def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            return ray.get(getattr(self._way.rendezvous, method).remote(*arguments), timeout=_ANSWERS_WITHIN_S)
        except ray.exceptions.RayError as error:  # it starts anew, and is asked again
            logger.debug("The rendezvous does not answer: %s", error)
            return None

    def _form(self, store: TCPStore | None, cards: dict[int, dict[str, Any]]) -> None:
        before = open_connections()
        soon = timedelta(seconds=_FORMS_WITHIN_S)
        if store is None:
            host, port = cards[0]["address"]
            store = TCPStore(host, port, is_master=False, timeout=soon)
        os.environ.update(RANK=str(self._rank), WORLD_SIZE=str(self._size))
        shared = PrefixStore(f"generation-{self._generation}", store)
        dist.init_process_group("gloo", store=shared, rank=self._rank, world_size=self._size, timeout=soon)
        self._connections = connections_between_ranks(before)
        distributed.set_patience(self._way.patience_s)


def _open_store() -> TCPStore:
    """The place where addresses are exchanged; hosted by a member, because it is of no use once that is gone."""
    return TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=_FORMS_WITHIN_S))
