import io
import json
import os
import pty
import struct
import threading
from fcntl import ioctl
from termios import TIOCSWINSZ

import pytest

from ray_trainer.metrics import LiveDisplay, ProgressRecord
from ray_trainer.metrics.terminal import render_line

RECORD = ProgressRecord(
    epoch=1,
    epochs=3,
    step=120,
    total_steps=375,
    loss=0.43127,
    val_metrics={"loss": 0.52, "accuracy": 0.9},
    samples_per_s=1234.4,
    remaining_s=3723,
    num_workers=2,
)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Terminal:
    """A real pseudo-terminal of a given width, read by a thread."""

    def __init__(self, width: int) -> None:
        master, slave = pty.openpty()
        ioctl(slave, TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
        self.stream = os.fdopen(slave, "w")
        self._output = b""
        self._reader = threading.Thread(target=self._read, args=(master,))
        self._reader.start()

    def _read(self, master):
        try:
            while data := os.read(master, 4096):
                self._output += data
        except OSError:
            pass  # the other end was closed
        os.close(master)

    def close(self) -> str:
        self.stream.close()
        self._reader.join(timeout=5)
        return self._output.decode()


@pytest.fixture
def terminal(monkeypatch):
    for name in ("TERM", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    return Terminal(width=160)


def test_a_record_is_one_line_that_says_all():
    assert render_line(RECORD) == (
        "epoch 2/3  step 120/375  loss 0.4313  val_loss 0.52 val_accuracy 0.9  1,234 samples/s  1:02:03 left  2 workers"
    )


def test_what_is_unknown_is_not_shown():
    assert render_line(ProgressRecord(step=5, state="restarting")) == "step 5  1 worker  restarting"


@pytest.mark.parametrize("width", [1, 10, 20, 40, 60, 80, 120, 200])
def test_a_narrow_terminal_gets_the_most_important_parts(width):
    line = render_line(RECORD, width, with_bar=True)

    assert len(line) <= width
    assert "step 120/375"[:width] in line


def test_a_pipe_gets_a_plain_line_now_and_then_and_messages_at_once():
    read_end, write_end = os.pipe()
    clock = Clock()
    with os.fdopen(write_end, "w") as stream, LiveDisplay(stream, every_s=10, clock=clock) as display:
        for step in range(25):
            clock.now = float(step)
            display.update(ProgressRecord(step=step))
            if step == 3:
                display.message("worker 1 died, restarting from step 2")

    with os.fdopen(read_end) as reader:
        lines = reader.read().splitlines()
    assert lines == [
        "step 0  1 worker",
        "worker 1 died, restarting from step 2",
        "step 10  1 worker",
        "step 20  1 worker",
        "step 24  1 worker",
    ]


def test_the_last_record_is_shown_at_the_end_but_not_twice():
    stream = io.StringIO()
    with LiveDisplay(stream) as display:
        display.update(ProgressRecord(step=1))
        display.update(ProgressRecord(step=1))

    assert stream.getvalue() == "step 1  1 worker\n"


def test_a_terminal_redraws_one_line_and_messages_stay_above_it(terminal):
    clock = Clock()
    with LiveDisplay(terminal.stream, clock=clock) as display:
        for step in (1, 2, 3):
            clock.now += 1.0
            display.update(ProgressRecord(step=step, total_steps=4))
        display.message("worker 1 died, restarting from [step 2]")
        display.update(ProgressRecord(step=4, total_steps=4))
    output = terminal.close()

    assert "\x1b[2K" in output
    assert "\x1b[?25h" in output
    assert "worker 1 died, restarting from [step 2]" in output
    assert screen(output) == [
        "worker 1 died, restarting from [step 2]",
        "━" * 20 + "  step 4/4  1 worker",
    ]


def test_a_terminal_is_not_redrawn_more_often_than_can_be_seen(terminal):
    clock = Clock()
    with LiveDisplay(terminal.stream, clock=clock) as display:
        for step in range(1000):
            display.update(ProgressRecord(step=step))
    output = terminal.close()

    assert output.count("\x1b[2K") < 10
    assert screen(output) == ["step 999  1 worker"]


def test_a_terminal_is_left_as_it_was_after_an_error(terminal):
    def train():
        with LiveDisplay(terminal.stream) as display:
            display.update(RECORD)
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        train()

    assert terminal.close().rstrip("\r\n").endswith("\x1b[?25h")


def test_a_dumb_terminal_gets_plain_lines(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with LiveDisplay(terminal.stream) as display:
        display.update(ProgressRecord(step=1))

    assert terminal.close() == "step 1  1 worker\r\n"


def test_a_reader_that_went_away_does_not_disturb_the_training():
    read_end, write_end = os.pipe()
    os.close(read_end)
    stream = os.fdopen(write_end, "w")
    with LiveDisplay(stream) as display:
        display.update(RECORD)
        display.message("still training")
    with pytest.raises(BrokenPipeError):
        stream.close()


def test_a_record_survives_the_way_to_the_driver_and_ignores_unknown_fields():
    sent = json.loads(json.dumps({**RECORD.to_dict(), "from_a_later_version": 1}))

    assert ProgressRecord.from_dict(sent) == RECORD


def screen(output: str) -> list[str]:
    """What is visible in the end: enough of a terminal for carriage return, erase line, up and colours."""
    lines, row, column, place = [""], 0, 0, 0
    while place < len(output):
        character = output[place]
        place += 1
        if character == "\x1b":
            end = next(i for i in range(place + 1, len(output)) if output[i].isalpha())
            code, place = output[place + 1 : end + 1], end + 1
            if code == "2K":
                lines[row] = ""
            elif code.endswith("A"):
                row -= int(code[:-1])
        elif character == "\r":
            column = 0
        elif character == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        else:
            lines[row] = lines[row][:column].ljust(column) + character + lines[row][column + 1 :]
            column += 1
    return [line for line in lines if line]
