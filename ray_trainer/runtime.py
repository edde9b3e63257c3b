"""The one seam between training and the outside: device, place, interruption, and who is told."""

import enum
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import FrameType, TracebackType
from typing import Any, Protocol

import torch

from ray_trainer import distributed
from ray_trainer.storage import Fence, Storage
from ray_trainer.storage.lease import Terms, holding
from ray_trainer.storage.local import refuse_unwritable
from ray_trainer.storage.snapshots import ProcessMemory, SnapshotStore


class Stop(enum.IntEnum):
    """Why the outside wants a run to stop; the highest of all ranks counts."""

    NONE = 0
    PREEMPTION = 1
    SIGTERM = 2
    SIGINT = 3


def raise_interruption(stop: Stop) -> None:
    """End as an interrupted program does: KeyboardInterrupt, or exit with 143 after SIGTERM."""
    if stop is Stop.SIGINT:
        raise KeyboardInterrupt
    if stop is not Stop.NONE:
        raise SystemExit(128 + signal.SIGTERM)


class Runtime(Protocol):
    """What training asks of its surroundings. Rank and world size come from `distributed`.

    Used as a context manager around a run.
    """

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""

    @property
    def storage(self) -> Storage:
        """The run directory, the same on all ranks."""

    @property
    def snapshots(self) -> SnapshotStore | None:
        """Memory that outlives this process, where there is one."""

    @property
    def survivor(self) -> ProcessMemory | None:
        """Memory of this process for a run that breaks because of another rank, where that one is replaced."""

    def __enter__(self) -> "Runtime":
        """The run begins."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The run ended, however it did."""

    def hold(self) -> AbstractContextManager[None]:
        """The sole right to write to `storage`, which is fenced inside. Collective.

        Raises:
            LeaseHeldError: on all ranks; somebody else is at work there.
            LeaseLostError: on all ranks; somebody else has taken over.
        """

    def describe(self) -> Mapping[str, Any]:
        """The sections of ``run.yaml`` that training itself does not know."""

    def requested_stop(self) -> Stop:
        """What this rank knows of a wish to stop; cheap, asked at every step."""

    def requested_save(self) -> bool:
        """Whether a checkpoint is wanted at once, because what this runs on may soon be gone; true once for each time.

        Cheap, asked at every step.
        """

    def show(self, progress: Mapping[str, Any]) -> None:
        """Take the newest progress, for a display; cheap, called on rank 0 at every step that is logged."""

    def announce(self, event: str, details: Mapping[str, Any]) -> None:
        """Take an event of the run, for a display; called on rank 0."""

    def checkpoint_committed(self, uri: str, metrics: Mapping[str, float]) -> None:
        """Mirror a checkpoint that is whole on storage to whoever keeps a list. Collective."""

    def conclude(self, stop: Stop) -> None:
        """The run was interrupted, saved and closed: pass that on in this surrounding's way."""


class LocalRuntime:
    """One process, or ranks that somebody else launched with ``torch.distributed`` set up.

    While a run is on, the first Ctrl-C or SIGTERM asks it to stop after the step in progress; a second one
    ends it at once. Signals are left alone where the run is not on the main thread.

    Args:
        run_dir: path or URI.
        device: CUDA where there is one, by default.
        take_over: do not ask whether another process is at work on the run; it can't save any more then.
        terms: how long the lease on the run's directory lasts.
    """

    def __init__(
        self, run_dir: str, device: torch.device | None = None, *, take_over: bool = False, terms: Terms | None = None
    ) -> None:
        self._storage = Storage.open(run_dir)
        self._take_over = take_over
        self._terms = terms
        self._device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._stop = Stop.NONE
        self._handlers: dict[signal.Signals, Any] = {}

    @property
    def device(self) -> torch.device:
        """See `Runtime`."""
        return self._device

    @property
    def storage(self) -> Storage:
        """See `Runtime`."""
        return self._storage

    @property
    def snapshots(self) -> None:
        """See `Runtime`; nothing outlives this process but storage."""
        return None

    @property
    def survivor(self) -> None:
        """See `Runtime`; nobody replaces a rank here."""
        return None

    def __enter__(self) -> "LocalRuntime":
        """Listen to signals."""
        self._stop = Stop.NONE
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give signals back to whoever had them."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """See `Runtime`; the lease is renewed by a thread of rank 0."""
        storage = self._storage
        with ExitStack() as stack:

            def lead() -> Fence:
                if storage.is_local:
                    refuse_unwritable(storage.local_path(), "checkpoint_dir")
                return stack.enter_context(holding(storage, self._terms, take_over=self._take_over)).fence

            self._storage = storage.fenced(fence_on_all_ranks(lead))
            try:
                yield
            finally:
                self._storage = storage

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stop is not Stop.NONE:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        self._stop = Stop.SIGINT if number == signal.SIGINT else Stop.SIGTERM

    def describe(self) -> Mapping[str, Any]:
        """See `Runtime`."""
        return {}

    def requested_stop(self) -> Stop:
        """See `Runtime`."""
        return self._stop

    def requested_save(self) -> bool:
        """See `Runtime`; nothing tells."""
        return False

    def show(self, progress: Mapping[str, Any]) -> None:
        """See `Runtime`; a hook or the log shows progress here."""

    def announce(self, event: str, details: Mapping[str, Any]) -> None:
        """See `Runtime`."""

    def checkpoint_committed(self, uri: str, metrics: Mapping[str, float]) -> None:
        """See `Runtime`; the manifests on storage are all there is."""

    def conclude(self, stop: Stop) -> None:
        """See `raise_interruption`."""
        raise_interruption(stop)


def fence_on_all_ranks(claim: Callable[[], Fence]) -> Fence:
    """Let rank 0 claim the run, and give its fence to all ranks. Collective."""
    fence: Fence | None = None
    with distributed.same_error_everywhere():
        if distributed.rank() == 0:
            fence = claim()
    shared = distributed.broadcast_object(fence)
    assert shared is not None  # rank 0 has claimed it, or all have raised
    return shared
