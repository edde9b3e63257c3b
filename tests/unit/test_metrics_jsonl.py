import json
import math
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import fs as pafs

from ray_trainer.metrics import JsonlLog, JsonlWriter, read_rows
from ray_trainer.storage import Storage


class StorageThatFills(Storage):
    """A real directory whose disk is full after ``room`` bytes; the last write gets in as far as there is room."""

    room = 1 << 30

    def append(self, name, data):
        super().append(name, data[: self.room])
        self._fill(data)

    def write(self, name, data):
        if len(data) > self.room:
            raise OSError(28, os.strerror(28))
        super().write(name, data)
        self._fill(data)

    def _fill(self, data):
        is_full, self.room = len(data) > self.room, max(0, self.room - len(data))
        if is_full:
            raise OSError(28, os.strerror(28))


@pytest.fixture(params=["local", "objects"])
def storage(request, tmp_path):
    if request.param == "local":
        return StorageThatFills.open(tmp_path)
    return StorageThatFills.of(pafs._MockFileSystem(), "run")


def steps(rows):
    return [row["step"] for row in rows]


def test_rows_are_read_back_over_all_attempts(storage):
    for attempt in (1, 2):
        log = JsonlLog(storage, "metrics.jsonl", attempt)
        log.append({"step": 2 * attempt})
        log.append({"step": 2 * attempt + 1})
        log.flush()

    assert steps(read_rows(storage, "metrics.jsonl")) == [2, 3, 4, 5]
    assert log.degraded is None


def test_a_log_that_does_not_exist_has_no_rows(storage):
    assert read_rows(storage, "metrics.jsonl") == []
    JsonlLog(storage, "metrics.jsonl", 1).rewind(lambda row: False)
    assert not storage.exists("metrics.jsonl")


def test_local_rows_are_whole_lines_at_once(tmp_path):
    log = JsonlLog(Storage.open(tmp_path), "metrics.jsonl", 1)
    log.append({"step": 1, "loss": 0.1})

    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.1}\n'


def test_object_stores_get_one_object_an_attempt():
    storage = Storage.of(pafs._MockFileSystem(), "run")
    for attempt in (3, 4):
        log = JsonlLog(storage, "metrics.jsonl", attempt)
        log.append({"step": attempt})
        log.flush()

    assert storage.child("metrics.jsonl").list() == ["attempt_0003.jsonl", "attempt_0004.jsonl"]


def test_a_large_object_is_left_alone_and_another_begun():
    storage = Storage.of(pafs._MockFileSystem(), "run")
    for first in (0, 4):
        log = JsonlLog(storage, "metrics.jsonl", 1)
        log._file._max_object_bytes = 30
        for step in range(first, first + 4):
            log.append({"step": step})
            log.flush()

    names = storage.child("metrics.jsonl").list()
    assert names[:2] == ["attempt_0001.jsonl", "attempt_0001.part0001.jsonl"]
    assert steps(read_rows(storage, "metrics.jsonl")) == list(range(8))


def test_rewinding_drops_rows_of_earlier_attempts_and_goes_on(storage):
    first = JsonlLog(storage, "metrics.jsonl", 1)
    for step in range(6):
        first.append({"step": step})
    first.flush()

    second = JsonlLog(storage, "metrics.jsonl", 2)
    second.rewind(lambda row: row["step"] <= 3)
    second.append({"step": 4})
    second.flush()

    assert steps(read_rows(storage, "metrics.jsonl")) == [0, 1, 2, 3, 4]


def test_an_attempt_can_rewind_what_it_has_written_itself(storage):
    log = JsonlLog(storage, "metrics.jsonl", 1)
    for step in range(4):
        log.append({"step": step})
    log.flush()
    log.append({"step": 4})

    log.rewind(lambda row: row["step"] <= 1)
    log.append({"step": 2})
    log.flush()

    assert steps(read_rows(storage, "metrics.jsonl")) == [0, 1, 2]


def test_a_torn_last_line_is_left_out_when_reading_and_removed_by_rewinding(tmp_path, caplog):
    storage = Storage.open(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"ste')

    assert steps(read_rows(storage, "metrics.jsonl")) == [1, 2]
    assert "1 unfinished lines" in caplog.text
    JsonlLog(storage, "metrics.jsonl", 2).rewind(lambda row: True)

    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_a_row_after_a_torn_line_stays_readable_without_rewinding(tmp_path):
    storage = Storage.open(tmp_path)
    (tmp_path / "events.jsonl").write_bytes(b'{"step": 1}\n{"ste')

    JsonlLog(storage, "events.jsonl", 2).append({"step": 2})

    assert steps(read_rows(storage, "events.jsonl")) == [1, 2]


def test_a_full_disk_is_told_once_and_rows_are_written_when_there_is_room(storage, caplog):
    log = JsonlLog(storage, "metrics.jsonl", 1)
    log.append({"step": 0})
    log.flush()
    storage.room = 5
    for step in (1, 2, 3):
        log.append({"step": step})
        log.flush()
    assert "No space left" in log.degraded
    assert caplog.text.count("can't be written") == 1

    storage.room = 1 << 30
    log.flush()
    log.append({"step": 4})
    log.flush()

    assert log.degraded is None
    assert steps(read_rows(storage, "metrics.jsonl")) == [0, 1, 2, 3, 4]


def test_a_line_that_lacks_only_its_end_is_completed_not_repeated(tmp_path):
    storage = StorageThatFills.open(tmp_path)
    log = JsonlLog(storage, "metrics.jsonl", 1)
    log.append({"step": 0})
    storage.room = len('{"step": 1}')
    log.append({"step": 1})
    storage.room = 1 << 30
    log.flush()

    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0}\n{"step": 1}\n'


def test_memory_is_bounded_while_storage_is_away_and_losses_are_told(storage):
    log = JsonlLog(storage, "metrics.jsonl", 1)
    log._file._waiting = type(log._file._waiting)(maxlen=3)
    storage.room = 0
    for step in range(5):
        log.append({"step": step})
        log.flush()
    storage.room = 1 << 30
    log.flush()
    log.append({"step": 5})
    log.flush()

    assert steps(read_rows(storage, "metrics.jsonl")) == [2, 3, 4, 5]
    assert log.degraded == "2 records were lost"


def test_lines_are_strict_json_whatever_the_values(tmp_path):
    log = JsonlLog(Storage.open(tmp_path), "metrics.jsonl", 1)
    log.append(
        {
            "loss": math.nan,
            "bound": -math.inf,
            "nested": {"a": [1.0, np.float64("inf")]},
            "tensor": torch.tensor(2.5),
            "numpy": np.float32(0.5),
            "path": Path("a/b"),
            "text": "ü\udc80\n",
        }
    )

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    row = json.loads((tmp_path / "metrics.jsonl").read_text(encoding="utf-8"), parse_constant=refuse)
    assert row == {
        "loss": None,
        "bound": None,
        "nested": {"a": [1.0, None]},
        "tensor": 2.5,
        "numpy": 0.5,
        "path": "a/b",
        "text": "ü\udc80\n",
        "non_finite": {"loss": "nan", "bound": "-inf", "nested.a.1": "inf"},
    }


def test_lines_of_threads_that_write_at_the_same_time_stay_whole(tmp_path):
    def write(writer):
        log = JsonlLog(Storage.open(tmp_path), "events.jsonl", 1)
        for place in range(50):
            log.append({"writer": writer, "place": place, "filler": "x" * 500})

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)

    rows = read_rows(Storage.open(tmp_path), "events.jsonl")
    assert sorted((row["writer"], row["place"]) for row in rows) == [(w, p) for w in range(4) for p in range(50)]


def test_a_folder_copied_from_an_object_store_is_read_and_continued_locally(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    (tmp_path / "metrics.jsonl" / "attempt_0001.jsonl").write_text('{"step": 1}\n')
    storage = Storage.open(tmp_path)

    log = JsonlLog(storage, "metrics.jsonl", 2)
    log.append({"step": 2})
    log.flush()

    assert steps(read_rows(storage, "metrics.jsonl")) == [1, 2]


def test_a_file_copied_to_an_object_store_is_read_and_continued_there(s3_server):
    storage = Storage.open(f"s3://{s3_server.new_bucket()}/run")
    storage.write("metrics.jsonl", b'{"step": 1}\n{"step": 2}\n')

    assert steps(read_rows(storage, "metrics.jsonl")) == [1, 2]
    log = JsonlLog(storage, "metrics.jsonl", 2)
    log.rewind(lambda row: row["step"] < 2)
    log.append({"step": 2})
    log.append({"step": 3})
    log.flush()

    assert steps(read_rows(storage, "metrics.jsonl")) == [1, 2, 3]


def test_metrics_rows_stand_once_after_a_resume(storage):
    first = JsonlWriter(storage, 1, clock=lambda: 1.0)
    for step in (50, 100, 150):
        first.write({"step": step, "epoch": 0, "split": "train", "loss": 1.0})
    first.close()

    second = JsonlWriter(storage, 2, clock=lambda: 2.0)
    second.rewind(120)
    second.write({"step": 150, "epoch": 0, "split": "train", "loss": 1.0})
    second.close()

    rows = read_rows(storage, "metrics.jsonl")
    assert [(row["step"], row["time"]) for row in rows] == [(50, 1.0), (100, 1.0), (150, 2.0)]
