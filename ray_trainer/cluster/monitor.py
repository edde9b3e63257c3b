"""A process beside each worker that finds a hang, names it and ends the worker, which is then replaced."""

import logging
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from ray_trainer import distributed
from ray_trainer.cluster.config import ClusterConfig
from ray_trainer.hang_report import pack, past_hangs
from ray_trainer.pulse.deadlines import Terms
from ray_trainer.pulse.orders import Orders
from ray_trainer.pulse.phases import Phase
from ray_trainer.pulse.watched import Watched
from ray_trainer.storage import Storage

logger = logging.getLogger(__name__)


def terms_of(cluster: ClusterConfig) -> Terms | None:
    """When a worker counts as hung; None for never. Where nothing is learned, as soon as others would give up."""
    floor_s = cluster.hang_floor_s
    return None if floor_s is None else Terms(floor_s, cluster.collective_timeout_s)


class Monitor:
    """Has this worker watched, as a member of its process group."""

    def __init__(self, terms: Terms | None, host: str) -> None:
        """Start nothing.

        Args:
            terms: None for no monitor at all; equal on all ranks.
            host: under which other nodes reach this one.
        """
        self._terms = terms
        self._host = host

    @contextmanager
    def watching(self, run: Storage) -> Iterator[None]:
        """Be watched in the block, whose thread is the one that trains. Collective at its start.

        Args:
            run: where hangs are recorded.
        """
        if self._terms is None:
            yield
            return
        watched = Watched()
        with watched.alive():
            self._be_watched(watched, self._terms, run)
            yield

    def _be_watched(self, watched: Watched, terms: Terms, run: Storage) -> None:
        leads = distributed.rank() == 0
        listener = _listen() if leads and distributed.world_size() > 1 else None
        desk = distributed.broadcast_object(self._desk(listener, run) if leads else None)
        assert desk is not None  # rank 0's
        address, token, past = desk
        orders = Orders(
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            floor_s=terms.floor_s,
            patience_s=terms.patience_s,
            past=past,
            desk=address,
            token=token,
            storage=pack(run),
        )
        try:
            watched.be_watched(orders, None if listener is None else listener.fileno())
        except OSError as error:
            logger.warning("Nobody watches rank %d: %s", distributed.rank(), error)
        if listener is not None:
            listener.close()

    def _desk(self, listener: socket.socket | None, run: Storage) -> "_Desk":
        """What rank 0 lets all know: where its desk is, and which hangs there have been."""
        address = None if listener is None else (self._host, int(listener.getsockname()[1]))
        try:
            hangs = past_hangs(run)
        except OSError as error:
            logger.warning("Earlier hangs of the run are not known: %s", error)
            hangs = []
        numbers = {phase.name.lower(): int(phase) for phase in Phase}
        return address, secrets.token_hex(), [(numbers[phase], step) for phase, step in hangs if phase in numbers]


def _listen() -> socket.socket | None:
    try:
        return socket.create_server(("", 0))
    except OSError as error:
        logger.warning("A skipped exchange will not be found out: there is no socket to be had (%s).", error)
        return None


_Desk = tuple[tuple[str, int] | None, str, list[tuple[int, int]]]
