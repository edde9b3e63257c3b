import pytest
from pyarrow import fs as pafs

from ray_trainer.metrics import EventLog, next_attempt, read_events
from ray_trainer.storage import Storage


@pytest.fixture(params=["local", "objects"])
def storage(request, tmp_path):
    if request.param == "local":
        return Storage.open(tmp_path)
    return Storage.of(pafs._MockFileSystem(), "run")


def test_events_of_all_attempts_are_read_oldest_first(storage):
    ticks = iter(range(100))
    for attempt in (1, 2):
        log = EventLog(storage, attempt, clock=lambda: float(next(ticks)))
        log.record("run_started", step=0, epoch=0)
        log.record("failure", cause="killed")

    assert read_events(storage) == [
        {"time": 0.0, "event": "run_started", "attempt": 1, "step": 0, "epoch": 0},
        {"time": 1.0, "event": "failure", "attempt": 1, "cause": "killed"},
        {"time": 2.0, "event": "run_started", "attempt": 2, "step": 0, "epoch": 0},
        {"time": 3.0, "event": "failure", "attempt": 2, "cause": "killed"},
    ]


def test_attempts_are_counted_from_one_and_asking_changes_nothing(storage):
    assert next_attempt(storage) == next_attempt(storage) == 1
    EventLog(storage, 1).record("run_started")
    assert next_attempt(storage) == next_attempt(storage) == 2


def test_worker_and_controller_record_side_by_side(storage):
    ticks = iter(range(100))
    worker = EventLog(storage, next_attempt(storage), clock=lambda: float(next(ticks)))
    worker.record("run_started")
    controller = EventLog.of_controller(storage, clock=lambda: float(next(ticks)))
    controller.record("failure")
    worker.record("checkpoint_saved")
    controller.record("resized")

    events = read_events(storage)
    assert [event["event"] for event in events] == ["run_started", "failure", "checkpoint_saved", "resized"]
    assert {event["attempt"] for event in events} == {1}


def test_a_controller_without_any_event_yet_counts_to_the_first_attempt(storage):
    EventLog.of_controller(storage).record("failure")

    assert [event["attempt"] for event in read_events(storage)] == [1]


def test_recording_to_storage_that_is_away_never_fails(tmp_path):
    (tmp_path / "run").write_text("a file where the directory should be")
    log = EventLog(Storage.open(tmp_path / "run"), 1)

    log.record("run_started")
    assert log.degraded is not None
    (tmp_path / "run").unlink()
    log.record("resumed")

    assert log.degraded is None
    assert [event["event"] for event in read_events(Storage.open(tmp_path / "run"))] == ["run_started", "resumed"]
