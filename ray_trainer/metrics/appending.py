"""A file that only grows, on any storage, whose failures never reach the training."""

import logging
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path

from ray_trainer.storage import Storage

logger = logging.getLogger(__name__)


class AppendingFile:
    """Records of bytes at the end of a local file; where storage can't append, in numbered objects.

    Local: each record is one write. Elsewhere `flush` writes the open object anew with all its records; once
    it is large it is left alone and the next one begun.

    An ``OSError`` (disk full, storage away) is logged once, told in `degraded` and retried at the next
    `flush`; until then records wait in memory.

    Attributes:
        lost_records: those dropped because too many waited.
    """

    def __init__(
        self,
        storage: Storage,
        name_part: Callable[[int], str],
        separator: bytes = b"",
        max_waiting: int = 10_000,
        max_object_bytes: int = 1 << 20,
    ) -> None:
        """Open nothing: the file comes into being with its first record.

        Args:
            storage: the directory.
            name_part: the name of an object, given its number from 0; a local file always is number 0.
            separator: what ends every record. It is written where half a record may have been left, so that
                others may write to the file as well. If empty, such a half is cut off, and nobody else may.
            max_waiting: records kept in memory while storage fails, the newest ones.
            max_object_bytes: size from which an object is not written anew any more.
        """
        self._storage = storage
        self._name_part = name_part
        self._separator = separator
        self._max_object_bytes = max_object_bytes
        self._waiting: deque[bytes] = deque(maxlen=max_waiting)
        self._part = 0
        self._whole: bytes | None = None
        self._whole_bytes = 0
        self._may_be_torn = bool(separator)
        self._failure = ""
        self.lost_records = 0

    @property
    def degraded(self) -> str | None:
        """Why records are waiting or lost, for the user; None if all is well."""
        return self._failure or (f"{self.lost_records} records were lost" if self.lost_records else None)

    def append(self, record: bytes) -> None:
        """Add one record; on storage that can't append it is written at the next `flush`."""
        if len(self._waiting) == self._waiting.maxlen and not self._failure:
            self.flush()
        if len(self._waiting) == self._waiting.maxlen:
            self.lost_records += 1
        self._waiting.append(record)
        if self._storage.is_local and not self._failure:
            self.flush()

    def flush(self) -> None:
        """Write what waits; what failed before is tried again."""
        if not self._waiting:
            return
        try:
            if self._storage.is_local:
                self._append_waiting()
            else:
                self._write_object()
        except OSError as error:
            self._note_failure(error)
        else:
            if self._failure:
                logger.info("%s/%s is written again.", self._storage.uri, self._name_part(self._part))
            self._failure = ""

    def drop_waiting(self, keep: Callable[[bytes], bool]) -> None:
        """Forget records that were not written yet; the file itself may have been changed by others."""
        kept = [record for record in self._waiting if keep(record)]
        self._waiting.clear()
        self._waiting.extend(kept)
        self._part, self._whole, self._may_be_torn = 0, None, bool(self._separator)

    def _append_waiting(self) -> None:
        name = self._name_part(0)
        if self._may_be_torn:
            self._mend(name)
            self._may_be_torn = False
        while self._waiting:
            record = self._waiting[0]
            self._may_be_torn = True
            self._storage.append(name, record)
            self._may_be_torn = False
            self._whole_bytes += len(record)
            self._waiting.popleft()

    def _mend(self, name: str) -> None:
        """Make the end of the file the end of a record."""
        path = self._storage.local_path(name)
        if not path.exists():
            return
        if not self._separator:
            os.truncate(path, self._whole_bytes)
            return
        tail = _tail(path, len(self._waiting[0]))
        if tail and not tail.endswith(self._separator):
            self._storage.append(name, self._separator)
            if tail.removeprefix(self._separator) + self._separator == self._waiting[0]:
                self._waiting.popleft()  # only its end was missing

    def _write_object(self) -> None:
        if self._whole is None:
            self._open_last_object()
        whole = (self._whole or b"") + b"".join(self._waiting)
        self._storage.write(self._name_part(self._part), whole)
        self._waiting.clear()
        self._whole = whole
        if len(whole) >= self._max_object_bytes:
            self._part += 1
            self._whole = b""

    def _open_last_object(self) -> None:
        """Go on after what an earlier process has written under the same names."""
        while self._storage.exists(self._name_part(self._part + 1)):
            self._part += 1
        name = self._name_part(self._part)
        self._whole = self._storage.read(name) if self._storage.exists(name) else b""

    def _note_failure(self, error: OSError) -> None:
        if not self._failure:
            logger.warning(
                "%s/%s can't be written (%s). Training goes on; up to %d records are kept and written later.",
                self._storage.uri,
                self._name_part(self._part),
                error,
                self._waiting.maxlen,
            )
        self._failure = f"{self._name_part(self._part)}: {error}"


def _tail(path: Path, num_bytes: int) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - num_bytes))
        return file.read()
