"""Reading a file to its end although storage fails on the way."""

from collections.abc import Callable
from typing import Any

from ray_trainer.storage.patience import Patience


class PatientReader:
    """Opens a file again, where it was left, after a failure that may pass."""

    def __init__(self, open_at: Callable[[int], Any], patience: Patience, what: str) -> None:
        """Open nothing yet.

        Args:
            open_at: the file at a position, as an object with ``read`` and ``close``.
            patience: how long to try.
            what: is read, for the log.
        """
        self._open_at = open_at
        self._patience = patience
        self._what = what
        self._file: Any = None
        self._position = 0

    def read(self, num_bytes: int | None) -> bytes:
        """The next bytes, at most so many; empty at the end."""
        return self._patience.attempt(lambda: self._read(num_bytes), self._what)

    def close(self) -> None:
        """Close what is open; a failure of that has no meaning for what was read."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _read(self, num_bytes: int | None) -> bytes:
        if self._file is None:
            self._file = self._open_at(self._position)
        try:
            block: bytes = self._file.read(num_bytes)
        except OSError:
            self.close()
            raise
        self._position += len(block)
        return block
