"""The files in ``.lease/`` of a run: who owns it, and who did.

==========================  ===========================================================================
``00000007.json``           claim 7, created once by whoever was first, never changed. On an object store
                            its name has a random part
``00000007.renewed.json``   when its owner was last alive, and until when it counts as that
``00000007.inherited.json`` the names of what was there when it took over and counts as part of the run
==========================  ===========================================================================

The owner is the claim with the highest number. A claim may have followers, which are claims too: a driver leads,
and each start of its workers follows it. Nobody but its owner writes the files of a claim, so there is no file
over which two could race; the numbers only grow. They are the fencing epochs.
"""

import errno
import json
import time
from dataclasses import asdict, dataclass
from typing import Any

from ray_trainer.errors import LeaseLostError
from ray_trainer.storage.directory import Storage
from ray_trainer.storage.exclusive import create_number, numbered_files
from ray_trainer.storage.holder import Holder
from ray_trainer.storage.local import overwrite

PLACE = ".lease"
_RENEWAL_BYTES = 200  # always, so that one can be written over another


@dataclass(frozen=True)
class Claim:
    """Somebody's right to write, until there is one with a higher number.

    Attributes:
        number: the fencing epoch.
        file: in which it is.
        leader: the number of the claim that it follows; its own if it leads.
        holder: the process.
        since: UNIX seconds, by the holder's clock.
    """

    number: int
    file: str
    leader: int
    holder: Holder
    since: float


@dataclass(frozen=True)
class Renewal:
    """A sign of life.

    Attributes:
        time: when, UNIX seconds by the holder's clock.
        expires: when to take the holder for dead without another one.
        count: how many there were; one that grows is a holder alive, whatever the clocks say.
        released: the holder has ended in good order.
    """

    time: float
    expires: float
    count: int
    released: bool = False


@dataclass(frozen=True)
class Inheritance:
    """What was part of the run when a claim began."""

    number: int
    names: frozenset[str]


class Claims:
    """The claims on a directory."""

    def __init__(self, run: Storage) -> None:
        """Touch nothing."""
        self.run = run
        self.place = run.child(PLACE)

    def files(self) -> dict[int, str]:
        """All claims by their numbers, from the least on."""
        return numbered_files(self.place)

    def read(self, number: int, file: str) -> Claim:
        """A claim; of a holder that nobody knows if its file is torn."""
        document = self._document(file) or {}
        since = document.get("since", self.place.modified_ns().get(file, 0) / 1e9)
        holder = Holder.from_dict(document.get("holder", {"host": "an unknown host", "user": "somebody"}))
        return Claim(number, file, int(document.get("leader", number)), holder, float(since))

    def leader(self, files: dict[int, str]) -> Claim | None:
        """Of these claims, the one that owns the directory, or was the last to own it."""
        if not files:
            return None
        number = max(files)
        newest = self.read(number, files[number])
        if newest.leader in files:
            return self.read(newest.leader, files[newest.leader])
        return newest

    def try_to_create(self, number: int, leader: int | None = None) -> Claim | None:
        """Create the claim of a number for this process, a leader by default; None if another one was faster."""
        leader = number if leader is None else leader
        holder, since = Holder.here(), time.time()
        document = {"number": number, "leader": leader, "holder": holder.to_dict(), "since": since}
        file = create_number(self.place, number, _encoded(document))
        if file is None:
            return None
        if max(self.files()) > number:  # so many others came in the meantime that this number was free again
            self.place.delete(file)
            return None
        return Claim(number, file, leader, holder, since)

    def renewal(self, claim: Claim) -> Renewal | None:
        """The last sign of life of a claim's holder, if it has given any."""
        document = self._document(f"{claim.number:08d}.renewed.json")
        return None if document is None else Renewal(**document)

    def renew(self, claim: Claim, renewal: Renewal) -> None:
        """Give a sign of life, also where the disk is full. Only the holder may."""
        name, data = f"{claim.number:08d}.renewed.json", _encoded(asdict(renewal)).ljust(_RENEWAL_BYTES)
        try:
            self.place.write(name, data)
        except OSError as error:
            if not self.place.is_local or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            overwrite(self.place.local_path(name), data)

    def inherit(self, number: int, names: list[str]) -> None:
        """Note what is part of the run as a claim begins, and forget the claims before it. Only its holder may."""
        self.place.write(f"{number:08d}.inherited.json", _encoded({"names": sorted(names)}))
        files = self.files()
        kept = {number}
        if number in files:
            kept.add(self.read(number, files[number]).leader)
        for name in self.place.list():
            stem = name.partition(".")[0]
            if stem.isdigit() and int(stem) < number and int(stem) not in kept:
                self.place.delete(name)

    def newest_inheritance(self) -> Inheritance | None:
        """What the newest claim that says so has found; None if there is none."""
        names = [name for name in self.place.list() if name.endswith(".inherited.json")]
        if not names:
            return None
        document = self._document(max(names)) or {"names": []}
        return Inheritance(int(max(names).partition(".")[0]), frozenset(document["names"]))

    def _document(self, name: str) -> dict[str, Any] | None:
        try:
            document = json.loads(self.place.read(name))
        except (FileNotFoundError, ValueError):
            return None
        return document if isinstance(document, dict) else None


def lost(claims: Claims, leader: int, to: Claim) -> LeaseLostError:
    """The error of a claim, led by another or itself, that is not the newest any more."""
    if to.leader == leader:
        return LeaseLostError(
            f"The workers of {claims.run.uri} were started again at {moment(to.since)} ({to.holder}), so this one, of "
            "an earlier start, may not write there any more."
        )
    return LeaseLostError(
        f"{claims.run.uri} was taken over by {to.holder} at {moment(to.since)}, so this process may not write to it "
        "any more. What it has computed since its last checkpoint is lost; everything in the directory is as the new "
        "owner left it. Nothing needs to be done, unless that one should end and this one go on: then end it and give "
        "the command again."
    )


def moment(seconds: float) -> str:
    """UNIX seconds for people."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _encoded(document: dict[str, Any]) -> bytes:
    return json.dumps(document).encode()
