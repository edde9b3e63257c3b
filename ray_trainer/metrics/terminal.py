"""What the driver shows of a run: one live line on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

if TYPE_CHECKING:
    from rich.live import Live

_BAR_WIDTH = 20
_SEPARATOR = "  "
_MIN_REFRESH_S = 0.1


@dataclass(frozen=True)
class ProgressRecord:
    """Where a run is: plain data, sent from a worker to the driver.

    Attributes:
        epoch: the one in progress, from 0.
        epochs: how many there will be.
        step: completed steps of the run.
        total_steps: how many there will be; None if nobody knows.
        loss: mean since the last record.
        val_metrics: of the last validation, by plain name.
        samples_per_s: over all workers.
        remaining_s: estimated; None if nobody knows.
        num_workers: that train together.
        state: what the run is doing, as ``training``, ``validating``, ``restarting``.
        last_event: the last thing worth telling that happened.
    """

    epoch: int = 0
    epochs: int = 0
    step: int = 0
    total_steps: int | None = None
    loss: float | None = None
    val_metrics: dict[str, float] = field(default_factory=dict)
    samples_per_s: float | None = None
    remaining_s: float | None = None
    num_workers: int = 1
    state: str = "training"
    last_event: str = ""

    def to_dict(self) -> dict[str, Any]:
        """All fields, by name."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Take the fields that are known; those of another version are left out."""
        known = {known.name for known in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


class LiveDisplay:
    """Shows records and messages on a stream, and needs no thread.

    On a terminal the last line is redrawn in place and messages scroll above it. Elsewhere (a pipe, a job's
    log) a line is printed at most every ``every_s`` seconds, and each message at once. A stream that breaks
    is not written to any more: the training matters more::

        with LiveDisplay() as display:
            display.update(record)
            display.message("worker 1 died, restarting from step 120")
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        every_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Show nothing yet.

        Args:
            stream: standard output by default.
            every_s: between two plain lines.
            clock: any that goes forward, in seconds.
        """
        self._stream = sys.stdout if stream is None else stream
        self._every_s = every_s
        self._clock = clock
        self._live: Live | None = None
        self._record: ProgressRecord | None = None
        self._shown: ProgressRecord | None = None
        self._shown_at = -float("inf")
        self._is_broken = False

    def __enter__(self) -> Self:
        if self._stream.isatty():
            self._live = _live_on(self._stream)
            if self._live is not None:
                self._guarded(self._live.start)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Show the newest record once more and leave the terminal as it was."""
        self._show(force=True)
        if self._live is not None:
            self._guarded(self._live.stop)
            self._live = None

    def update(self, record: ProgressRecord) -> None:
        """Show where the run is now; may be called as often as one likes."""
        self._record = record
        self._show(force=self._shown is None)

    def message(self, text: str) -> None:
        """Show something that happened; it stays."""
        if self._live is not None:
            from rich.text import Text

            self._guarded(self._live.console.print, Text(text))
        else:
            self._guarded(self._print_line, text)

    def _show(self, force: bool) -> None:
        record = self._record
        if record is None or record == self._shown:
            return
        pause_s = self._every_s if self._live is None else _MIN_REFRESH_S
        now = self._clock()
        if not force and now - self._shown_at < pause_s:
            return
        self._shown, self._shown_at = record, now
        if self._live is None:
            self._guarded(self._print_line, render_line(record))
        else:
            width = self._live.console.width
            self._guarded(self._live.update, render_line(record, width, with_bar=True), refresh=True)

    def _print_line(self, text: str) -> None:
        self._stream.write(f"{text}\n")
        self._stream.flush()

    def _guarded(self, write: Callable[..., object], *arguments: object, **options: object) -> None:
        if self._is_broken:
            return
        try:
            write(*arguments, **options)
        except OSError:
            self._is_broken = True  # the reader of the pipe or the terminal is gone


def render_line(record: ProgressRecord, width: int | None = None, with_bar: bool = False) -> str:
    """A record as one line; where ``width`` is too small, the least important parts are left out."""
    parts = _parts(record, with_bar)
    while width is not None and len(parts) > 1 and _length(parts) > width:
        parts.remove(max(parts))
    line = _SEPARATOR.join(text for _, _, text in sorted(parts, key=lambda part: part[1]))
    return line if width is None else line[:width]


def _parts(record: ProgressRecord, with_bar: bool) -> list[tuple[int, int, str]]:
    """Pieces of the line as (how dispensable, place, text), empty ones left out."""
    total = record.total_steps
    step = f"step {record.step}" if total is None else f"step {record.step}/{total}"
    validation = " ".join(f"val_{name} {_number(value)}" for name, value in record.val_metrics.items())
    texts = (
        (4, f"epoch {min(record.epoch + 1, record.epochs)}/{record.epochs}" if record.epochs else ""),
        (6, _bar(record.step / total) if with_bar and total else ""),
        (0, step),
        (1, "" if record.loss is None else f"loss {_number(record.loss)}"),
        (5, validation),
        (7, "" if record.samples_per_s is None else f"{record.samples_per_s:,.0f} samples/s"),
        (3, "" if record.remaining_s is None else f"{_duration(record.remaining_s)} left"),
        (8, f"{record.num_workers} worker{'s' * (record.num_workers != 1)}"),
        (2, "" if record.state == "training" else record.state),
        (9, record.last_event),
    )
    return [(importance, place, text) for place, (importance, text) in enumerate(texts) if text]


def _length(parts: list[tuple[int, int, str]]) -> int:
    return sum(len(text) for _, _, text in parts) + len(_SEPARATOR) * (len(parts) - 1)


def _bar(done: float) -> str:
    filled = round(_BAR_WIDTH * min(1.0, done))
    return "━" * filled + "─" * (_BAR_WIDTH - filled)


def _number(value: float) -> str:
    return f"{value:.4g}"


def _duration(seconds: float) -> str:
    minutes, seconds_left = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    days, hours_left = divmod(hours, 24)
    clock = f"{hours_left}:{minutes_left:02d}:{seconds_left:02d}"
    return f"{days}d {clock}" if days else clock


def _live_on(stream: TextIO) -> "Live | None":
    """A line that is redrawn in place; None on a terminal that can't."""
    from rich.console import Console
    from rich.live import Live

    console = Console(file=stream, highlight=False, markup=False, emoji=False)
    if not console.is_terminal or console.is_dumb_terminal:
        return None
    shares_terminal = stream is sys.stdout  # what others print must scroll above the line, not through it
    return Live(
        console=console,
        auto_refresh=False,
        redirect_stdout=shares_terminal,
        redirect_stderr=shares_terminal,
    )
