"""How a trial of a population takes over another one: its weights and optimizer, by way of a copy on storage.

The donor copies a checkpoint to where no retention rule reaches it; the taker notes what it is about to do, clears
its own directory of the lineage that ends, and starts from the copy. Killed at any point, it does the rest when it
starts again.
"""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from ray_trainer.checkpoint.catalog import checkpoint_names
from ray_trainer.checkpoint.layout import discard, read_manifest
from ray_trainer.checkpoint.manifest import MANIFEST
from ray_trainer.errors import LeaseHeldError
from ray_trainer.metrics.events import EventLog, next_attempt
from ray_trainer.metrics.jsonl import JsonlLog, read_rows
from ray_trainer.storage import Storage
from ray_trainer.storage.lease import holding

STOP_PATIENCE_S = 90.0  # for the step in progress and a checkpoint, before a trial's process is given up
NOTE = "takeover.json"
TOOK_OVER = "took_over"
_METRICS = "metrics.jsonl"
_ASKS_EVERY_S = 0.5
_KEPT_COPIES = 3  # of a donor: a taker may still have to wait for its turn


@dataclass(frozen=True)
class Offer:
    """A checkpoint that others may start from.

    Attributes:
        donor: the trial it is from.
        place: its copy, a path or URI.
        units: of the donor's report.
    """

    donor: str
    place: str
    step: int
    epoch: int
    units: int


@dataclass(frozen=True)
class Note:
    """What a taker has decided: to go on from an offer with these settings.

    Attributes:
        is_cleared: the lineage that ended is out of the way.
    """

    offer: Offer
    settings: dict[str, Any]
    is_cleared: bool = False

    @classmethod
    def read(cls, run: Storage) -> "Note | None":
        """That of a trial's directory, if it ever took over another one."""
        if not run.exists(NOTE):
            return None
        values = json.loads(run.read(NOTE))
        return cls(Offer(**values["offer"]), values["settings"], values["is_cleared"])

    def write(self, run: Storage) -> None:
        """Put it into a trial's directory."""
        run.write(NOTE, json.dumps(asdict(self), indent=1).encode())


def offer(run: Storage, donor: str, checkpoint: str, exchange: Storage, units: int) -> Offer:
    """Copy a checkpoint, and the metrics up to it, to the exchange; the donor's oldest copies go.

    Raises:
        FileNotFoundError: the retention rule was faster.
    """
    source = run.child(checkpoint)
    manifest = read_manifest(source)
    shelf = exchange.child(donor)
    # by attempt first: a donor that takes over another one itself comes to the same steps again, with other weights
    copy = shelf.child(f"attempt{manifest.attempt:06d}_step{manifest.step:08d}/{checkpoint}")
    if not copy.exists(MANIFEST):
        rows = [row for row in read_rows(run, _METRICS) if row.get("step", 0) <= manifest.step]
        copy.write(_METRICS, json.dumps(rows).encode())
        for name in [*manifest.files, MANIFEST]:
            copy.write_chunks(name, source.blocks(name))
    for old in shelf.list()[:-_KEPT_COPIES]:
        shelf.delete(old)
    return Offer(donor, copy.uri, manifest.step, manifest.epoch, units)


def take_over(run: Storage, note: Note) -> Note:
    """Make a trial's directory ready to start from an offer; safe to repeat until it is done.

    Waits for the process that served the trial before: what it saves while it ends belongs to the other lineage.

    Raises:
        LeaseHeldError: it does not end.
    """
    if note.is_cleared:
        return note
    with _held(run):
        note.write(run)
        for name in checkpoint_names(run):
            discard(run, name)
        run.delete(_METRICS)
        run.delete("tensorboard")
        log = JsonlLog(run, _METRICS, attempt=0)
        for row in json.loads(Storage.open(note.offer.place).read(_METRICS)):
            log.append(row)
        log.flush()
        details = {"donor": note.offer.donor, "checkpoint": note.offer.place, "settings": note.settings}
        EventLog(run, next_attempt(run)).record(TOOK_OVER, note.offer.step, note.offer.epoch, **details)
        done = Note(note.offer, note.settings, is_cleared=True)
        done.write(run)
    return done


@contextmanager
def _held(run: Storage) -> Iterator[None]:
    until_s = time.monotonic() + STOP_PATIENCE_S
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(holding(run))
                break
            except LeaseHeldError:
                if time.monotonic() > until_s:
                    raise
            time.sleep(_ASKS_EVERY_S)
        yield


def same_decision(note: Note | None, place: str, settings: Mapping[str, Any]) -> bool:
    """Whether a trial has taken over this very offer with these very settings already."""
    return note is not None and note.offer.place == place and note.settings == dict(settings)
