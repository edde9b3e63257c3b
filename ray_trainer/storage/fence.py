"""What stands between a writer and a directory that may belong to somebody else by now."""

from typing import Protocol


class Fence(Protocol):
    """Asked before anything in a directory is changed. Pickled with the `Storage` that it guards.

    Attributes:
        epoch: grows with each new owner of the directory; 0 where nobody owns it.
    """

    @property
    def epoch(self) -> int:
        """See the class."""

    def check(self) -> None:
        """Ask storage whether this writer may still write.

        Raises:
            LeaseLostError: somebody else may, and this writer never again.
            OSError: storage does not answer.
        """

    def glance(self) -> None:
        """As `check`, but asks storage only once in a while: for what is written often."""


class NoFence:
    """For directories that nobody owns."""

    epoch = 0

    def check(self) -> None:
        """See `Fence`."""

    def glance(self) -> None:
        """See `Fence`."""


NO_FENCE = NoFence()
