"""One writer a directory: a lease that expires, with an epoch that fences off whoever held it before.

After Gray and Cheriton 1989 (leases) and the fencing tokens of Chubby (Burrows 2006, section 2.4). A lease alone
cannot stop a holder that was paused beyond its end; the epoch can: it is asked for before anything becomes visible,
it stands in each manifest, and a checkpoint of an old epoch that was not there at the take-over does not count.
"""

import errno
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_trainer.errors import LeaseHeldError, LeaseLostError
from ray_trainer.storage.claims import PLACE, Claim, Claims, Renewal, lost, moment
from ray_trainer.storage.directory import Storage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Terms:
    """How long a lease lasts.

    Attributes:
        lease_s: without a sign of life for so long, a holder elsewhere is taken for dead.
        renew_s: how often the holder gives one; a small fraction of `lease_s`.
    """

    lease_s: float = 60.0
    renew_s: float = 10.0

    @property
    def watch_s(self) -> float:
        """How long somebody else watches for a sign of life before he believes that a lease has expired."""
        return 2.5 * self.renew_s


class ClaimFence:
    """The `Fence` of a claim."""

    GLANCE_LOCAL_S = 1.0
    GLANCE_REMOTE_S = 10.0

    def __init__(self, claims: Claims, claim: Claim) -> None:
        self._claims = claims
        self._claim = claim
        self._followers: set[int] = set()
        self._checked_at_s = float("-inf")

    @property
    def epoch(self) -> int:
        """See `Fence`."""
        return self._claim.number

    def check(self) -> None:
        """See `Fence`."""
        own = self._claim
        files = self._claims.files()
        for number in reversed(files):
            if number <= own.number or number in self._followers:
                continue
            other = self._claims.read(number, files[number])
            if other.leader != own.number:
                raise lost(self._claims, own.leader, other)
            self._followers.add(number)
        if not files:
            raise FileNotFoundError(
                errno.ENOENT,
                "the run's directory, or the lease in it, has vanished; mount it again or bring it back",
                self._claims.place.path,
            )
        if files.get(own.number) != own.file:
            raise LeaseLostError(
                f"The lease of this process on {self._claims.run.uri} was deleted, so it may not write there any more. "
                "Give the command again to go on from the newest checkpoint."
            )
        self._checked_at_s = time.monotonic()

    def glance(self) -> None:
        """See `Fence`."""
        every_s = self.GLANCE_LOCAL_S if self._claims.run.is_local else self.GLANCE_REMOTE_S
        if time.monotonic() > self._checked_at_s + every_s:
            self.check()

    def __getstate__(self) -> dict[str, Any]:
        """Without what has a meaning on this machine only."""
        return {**self.__dict__, "_checked_at_s": float("-inf")}


class Lease:
    """The right of this process to write to a directory; renewed by a thread until it is released.

    Attributes:
        fence: for what this process writes.
        lost: why it is lost, if it is.
    """

    def __init__(self, claims: Claims, claim: Claim, terms: Terms) -> None:
        self._claims = claims
        self._claim = claim
        self._terms = terms
        self._renewals = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="ray-trainer-lease", daemon=True)
        self.fence = ClaimFence(claims, claim)
        self.lost: LeaseLostError | None = None

    @property
    def number(self) -> int:
        """Of its claim, which those follow that work for this process."""
        return self._claim.number

    def begin(self) -> None:
        """Give the first sign of life, and go on doing so."""
        self._renew()
        self._thread.start()

    def release(self) -> None:
        """Let others have it at once."""
        self._ended.set()
        self._thread.join()
        if self.lost is None:
            self._renew(released=True)

    def _keep(self) -> None:
        failure = ""
        while not self._ended.wait(self._terms.renew_s):
            try:
                self.fence.check()
                self._renew()
                failure = ""
            except LeaseLostError as error:
                self.lost = error
                logger.error("%s", error)
                return
            except OSError as error:
                if not failure:
                    logger.warning("The lease on %s can't be renewed at the moment: %s", self._claims.run.uri, error)
                failure = str(error)

    def _renew(self, released: bool = False) -> None:
        now = time.time()
        self._renewals += 1
        self._claims.renew(self._claim, Renewal(now, now + self._terms.lease_s, self._renewals, released))


@contextmanager
def holding(run: Storage, terms: Terms | None = None, *, take_over: bool = False) -> Iterator[Lease]:
    """Hold the lease on a directory while the block lasts.

    What was created for the lease alone disappears with it.

    Args:
        run: the directory; comes into being if it is not there.
        terms: how long a lease lasts.
        take_over: do not ask whether somebody holds it.

    Raises:
        LeaseHeldError: somebody does. Nothing was written.
        OSError: storage cannot be read or written.
    """
    terms = terms or Terms()
    missing = _missing_directories(run)
    lease = Lease(Claims(run.impatient()), _acquire(Claims(run), terms, take_over), terms)
    try:
        lease.begin()
        yield lease
    finally:
        _let_go(lease, run)
        if lease.number == 1:
            _remove_what_is_empty(run, missing)


def follow(run: Storage, leader: int) -> ClaimFence:
    """Claim a directory on behalf of a leader: fences off all that followed it before.

    Raises:
        LeaseLostError: the leader has lost it.
    """
    claims = Claims(run)
    while True:
        files = claims.files()
        newest = claims.read(max(files), files[max(files)]) if files else None
        if newest is None or leader not in files:
            raise LeaseLostError(f"The lease {leader} on {run.uri} was deleted. Give the command again to go on.")
        if newest.leader != leader:
            raise lost(claims, leader, newest)
        claim = claims.try_to_create(newest.number + 1, leader)
        if claim is not None:
            return ClaimFence(claims, claim)


def _acquire(claims: Claims, terms: Terms, take_over: bool) -> Claim:
    while True:
        files = claims.files()
        last = claims.leader(files)
        if last is not None and not take_over:
            _require_free(claims, last, terms)
        claim = claims.try_to_create(1 + max(files, default=0))
        if claim is not None:
            return claim
        take_over = False  # somebody else was faster, and is not the one who was meant


def _require_free(claims: Claims, claim: Claim, terms: Terms) -> None:
    """Refuse a directory whose holder may be alive."""
    renewal = claims.renewal(claim) or Renewal(claim.since, claim.since + terms.lease_s, 0)
    if renewal.released:
        return
    if claim.holder.is_known_to_be_dead():
        logger.warning("%s was held by %s, which is dead. Going on.", claims.run.uri, claim.holder)
        return
    if time.time() <= renewal.expires:
        raise _held(claims, claim, renewal)
    logger.warning(
        "The lease of %s on %s expired at %s. Watching for %g s whether it is really gone.",
        claim.holder,
        claims.run.uri,
        moment(renewal.expires),
        terms.watch_s,
    )
    watched_until_s = time.monotonic() + terms.watch_s
    while time.monotonic() < watched_until_s:
        time.sleep(min(0.5, terms.watch_s / 10))
        seen = claims.renewal(claim) or renewal
        if seen.count != renewal.count and not seen.released:
            raise _held(claims, claim, seen)


def _held(claims: Claims, claim: Claim, renewal: Renewal) -> LeaseHeldError:
    left_s = renewal.expires - time.time()
    return LeaseHeldError(
        f"{claims.run.uri} is in use by {claim.holder}, since {moment(claim.since)}; its last sign of life is from "
        f"{moment(renewal.time)}. Two that write to one run would destroy each other's checkpoints, so nothing was "
        "done. Wait for its end, end it, or give this run another name. If it died with its machine, the run is free "
        f"{left_s:.0f} s from now; to take it over at once: --take-over, fit(take_over=True) or "
        "LocalRuntime(take_over=True). The other one then cannot save any more."
    )


def _let_go(lease: Lease, run: Storage) -> None:
    try:
        lease.release()
    except OSError as error:
        logger.warning("The lease on %s can't be given back, and has to expire: %s", run.uri, error)


def _missing_directories(run: Storage) -> list[Path]:
    """Those that the first file in the run's directory will bring, the deepest first."""
    if not run.is_local:
        return []
    return [place for place in (run.local_path(), *run.local_path().parents) if not place.exists()]


def _remove_what_is_empty(run: Storage, missing: list[Path]) -> None:
    """Leave no trace where nothing but the lease was written."""
    with suppress(OSError):
        if run.list() != [PLACE]:
            return
        run.delete(PLACE if run.is_local else "")  # pyarrow leaves a mark of the directory around what it deletes
        for place in missing:
            place.rmdir()
