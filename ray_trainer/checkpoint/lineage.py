"""Which checkpoints belong to a run that has changed hands.

A process that was paused may write a checkpoint after another one has taken over and gone on from an earlier
step. No check before the write can exclude that for good. So each new owner notes which checkpoints it found
(`inherit`), and one of an older epoch that is not among them does not count.
"""

import logging
from dataclasses import dataclass

from ray_trainer.checkpoint.layout import read_manifest
from ray_trainer.checkpoint.manifest import MANIFEST, Manifest
from ray_trainer.errors import CheckpointCorruptError, NewerFormatError
from ray_trainer.storage import Storage
from ray_trainer.storage.claims import Claims, Inheritance

logger = logging.getLogger(__name__)

STRAY = "it was written by a process that had lost the run to another one before"


@dataclass(frozen=True)
class Lineage:
    """What the newest owner has inherited; None where the run never had one."""

    inheritance: Inheritance | None

    @classmethod
    def of(cls, run: Storage) -> "Lineage":
        """That of a run. Reads only."""
        return cls(Claims(run).newest_inheritance())

    def is_stray(self, name: str, manifest: Manifest) -> bool:
        """Whether a checkpoint does not belong to the run: an earlier owner wrote it too late."""
        if self.inheritance is None or name in self.inheritance.names:
            return False
        return 0 < manifest.fencing_epoch < self.inheritance.number  # 0: somebody wrote it who needed no lease

    def is_stray_on(self, run: Storage, name: str) -> bool:
        """As `is_stray`, reading the manifest only where it matters; one that can't be read says nothing."""
        if self.inheritance is None or name in self.inheritance.names:
            return False
        try:
            return self.is_stray(name, read_manifest(run.child(name)))
        except (OSError, CheckpointCorruptError, NewerFormatError):
            return False


def inherit(run: Storage, names: list[str]) -> None:
    """Let the owner of a run, whom its fence tells, take over what counts now. Before anything is restored.

    Args:
        run: fenced by the owner's claim.
        names: of all checkpoints in it. One that is not finished is not taken over: it may be finished too late.
    """
    lineage = Lineage.of(run)
    finished = [name for name in names if run.child(name).exists(MANIFEST)]
    Claims(run).inherit(run.fence.epoch, [name for name in finished if not lineage.is_stray_on(run, name)])
