import os
import struct

import pytest
from pyarrow import fs as pafs
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from ray_trainer.metrics import JsonlWriter, TensorBoardWriter, Writers, read_rows
from ray_trainer.storage import Storage


class StorageThatFills(Storage):
    """A real directory whose disk is full after ``room`` bytes."""

    room = 1 << 30

    def append(self, name, data):
        super().append(name, data[: self.room])
        is_full, self.room = len(data) > self.room, max(0, self.room - len(data))
        if is_full:
            raise OSError(28, os.strerror(28))

    def child(self, name):
        self.shared = super().child(name)
        return self.shared


@pytest.fixture(params=["local", "objects"])
def storage(request, tmp_path):
    if request.param == "local":
        return Storage.open(tmp_path)
    return Storage.of(pafs._MockFileSystem(), "run")


def events_of(storage):
    """All events of all files in the order TensorBoard reads them, each record's checksums compared."""
    events = []
    for name in storage.child("tensorboard").list():
        data = storage.read(f"tensorboard/{name}")
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            message = data[12 : 12 + length]
            assert struct.unpack("<I", data[8:12]) == (masked_crc32c(data[:8]),)
            assert struct.unpack("<I", data[12 + length : 16 + length]) == (masked_crc32c(message),)
            events.append(Event.FromString(message))
            data = data[16 + length :]
    return events


def scalars_of(events):
    """(tag, step, value) that TensorBoard shows: a session's start hides everything from its step on."""
    shown = []
    for event in events:
        if event.session_log.status == SessionLog.START:
            shown = [scalar for scalar in shown if scalar[1] < event.step]
        shown += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return shown


def row(step, split="train", **metrics):
    return {"step": step, "epoch": 0, "split": split, **metrics}


def test_metrics_become_scalars_under_the_name_of_their_split(storage):
    writer = TensorBoardWriter(storage, 1, clock=lambda: 1e9)
    writer.write(row(10, loss=0.5, learning_rate=0.25, note="text", nothing=None))
    writer.write(row(10, "val", loss=0.75))
    writer.close()

    events = events_of(storage)
    assert events[0].file_version == "brain.Event:2"
    assert events[1].wall_time == 1e9
    assert scalars_of(events) == [
        ("train/loss", 10, 0.5),
        ("train/learning_rate", 10, 0.25),
        ("val/loss", 10, 0.75),
    ]


def test_a_resumed_run_hides_the_points_that_are_written_again(storage):
    first = TensorBoardWriter(storage, 1, clock=lambda: 1.0)
    for step in (50, 100, 150):
        first.write(row(step, loss=1.0))
    first.close()
    second = TensorBoardWriter(storage, 2, clock=lambda: 2.0)
    second.rewind(100)
    second.write(row(150, loss=2.0))
    second.close()

    assert scalars_of(events_of(storage)) == [
        ("train/loss", 50, 1.0),
        ("train/loss", 100, 1.0),
        ("train/loss", 150, 2.0),
    ]


def test_a_full_disk_leaves_whole_records_and_nothing_is_lost(tmp_path):
    storage = StorageThatFills.open(tmp_path)
    writer = TensorBoardWriter(storage, 1)
    writer.write(row(1, loss=1.0))
    storage.shared.room = 7
    writer.write(row(2, loss=2.0))
    writer.write(row(3, loss=3.0))
    assert "No space left" in writer.degraded

    storage.shared.room = 1 << 30
    writer.flush()

    assert writer.degraded is None
    assert [step for _, step, _ in scalars_of(events_of(storage))] == [1, 2, 3]


def test_attempts_within_one_second_have_files_of_their_own(storage):
    for attempt in (1, 2):
        writer = TensorBoardWriter(storage, attempt, clock=lambda: 1.0)
        writer.write(row(attempt, loss=1.0))
        writer.close()

    assert len(storage.child("tensorboard").list()) == 2
    assert [step for _, step, _ in scalars_of(events_of(storage))] == [1, 2]


def test_several_writers_are_fed_as_one(storage):
    writers = Writers([JsonlWriter(storage, 1, clock=lambda: 3.0), TensorBoardWriter(storage, 1)])
    writers.write(row(1, loss=1.0))
    writers.write(row(2, loss=2.0))
    writers.flush()
    writers.rewind(1)
    writers.close()

    assert read_rows(storage, "metrics.jsonl") == [{**row(1, loss=1.0), "time": 3.0}]
    assert scalars_of(events_of(storage)) == [("train/loss", 1, 1.0)]
    assert writers.degraded is None


def test_no_writers_do_nothing(tmp_path):
    writers = Writers()
    writers.write(row(1, loss=1.0))
    writers.rewind(0)
    writers.close()

    assert writers.degraded is None
    assert list(tmp_path.iterdir()) == []


def test_what_is_wrong_with_any_writer_is_told(tmp_path):
    (tmp_path / "tensorboard").write_text("in the way")
    storage = Storage.open(tmp_path)
    writers = Writers([JsonlWriter(storage, 1), TensorBoardWriter(storage, 1)])

    writers.write(row(1, loss=1.0))

    assert "Not a directory" in writers.degraded
    assert len(read_rows(storage, "metrics.jsonl")) == 1
