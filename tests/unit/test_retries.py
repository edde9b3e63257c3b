"""When a run is given up: by progress, and by the place of an error."""

import pickle
import traceback
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorUnavailableError, OutOfMemoryError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from ray_trainer.cluster.events import FailureRecorder, describe_failures, furthest_on_storage
from ray_trainer.cluster.retries import Episodes, Pauses, Repetitions, Retries, note_place
from ray_trainer.errors import CheckpointError, MemoryShortageError
from ray_trainer.metrics import EventLog, read_events
from ray_trainer.storage import Storage

SHORTAGES = [("4 samples", "this"), ("2 samples", "this"), ("2 samples", "that")]


def raised(message: str, step: int, kind: type[Exception] = ValueError) -> Exception:
    try:
        raise kind(message)
    except kind as error:
        note_place(error, traceback.format_exc(), step)
        return pickle.loads(pickle.dumps(error))  # as Ray passes it on


def raised_elsewhere(step: int) -> Exception:
    try:
        raise ValueError
    except ValueError as error:
        note_place(error, traceback.format_exc(), step)
        return error


def test_run_with_progress_is_tried_again_without_end():
    retries = Retries(1)

    assert all(retries.allow(step) for step in range(0, 3000, 3))


@pytest.mark.parametrize(("limit", "allowed"), [(0, 0), (1, 1), (3, 3)])
def test_run_without_progress_is_given_up_after_so_many_failures(limit, allowed):
    retries = Retries(limit)

    answers = [retries.allow(7) for _ in range(6)]

    assert answers == [True] * allowed + [False] * (6 - allowed)


def test_getting_less_far_than_before_is_no_progress():
    retries = Retries(2)

    assert [retries.allow(step) for step in (50, 40, 49)] == [True, True, False]
    assert [Retries(2).allow(step) for step in (50, 40, 51)] == [True, True, True]


def test_run_that_is_killed_every_few_steps_counts_as_one_that_gets_further(tmp_path):
    run, retries = Storage.open(tmp_path), Retries(1)

    for attempt in range(1, 9):  # between two checkpoints, and before anybody was told of a step
        EventLog(run, attempt).record("resumed", step=20 * attempt, epoch=0, tier="survivor")
        assert retries.allow(furthest_on_storage(run))
    EventLog(run, 9).record("resumed", step=20 * 8, epoch=0, tier="survivor")
    assert not retries.allow(furthest_on_storage(run))


def test_no_limit_is_no_limit():
    retries = Retries(-1)

    assert all(retries.allow(0) for _ in range(100))


def test_failure_that_is_seen_on_one_rank_after_the_other_is_one():
    episodes = Episodes()

    seen = [episodes.is_new(attempt, ranks) for attempt, ranks in [(1, [0]), (1, [1]), (1, [1]), (2, [1]), (2, [0])]]

    assert seen == [True, False, True, True, False]


def test_workers_nobody_waits_for_are_replaced_at_once_unless_they_keep_dying():
    now = 0.0
    pauses = Pauses(clock=lambda: now)

    answers = [pauses.after_loss() for _ in range(10)]
    now += 301
    answers.append(pauses.after_loss())

    assert answers == [0, 0, 0, 1, 2, 4, 8, 16, 30, 30, 0]


def test_pause_before_a_spare_is_replaced_ends_once_a_worker_is_missed(tmp_path):
    looks: list[int] = []

    def ranks_of(places):
        looks[-1] += 1
        return {place: None if looks[-1] == 1 else -1 - place for place in places}

    link = SimpleNamespace(announce=SimpleNamespace(remote=lambda event: None))
    recorder = FailureRecorder(Storage.open(tmp_path), link, max_failures=0, ranks_of=ranks_of)
    for _ in range(9):  # of which the last six would wait for a minute
        looks.append(0)
        recorder.after_exception(None, {2: RuntimeError("it died")})

    assert looks == [1] * 3 + [2] * 6
    assert [row["event"] for row in read_events(Storage.open(tmp_path))] == ["spare_lost"] * 9


def test_same_error_at_the_same_place_and_step_is_known_again_whatever_it_says():
    repetitions = Repetitions()

    assert repetitions.find({1: raised("7 apples", step=3)}) is None
    assert repetitions.find({0: RuntimeError("The actor died"), 1: raised("8 apples", step=3)}) == 1


def test_error_that_all_ranks_have_is_no_repetition_when_it_is_seen_on_one_after_the_other():
    repetitions = Repetitions()

    assert [repetitions.find({rank: raised("x", step=3)}) for rank in (0, 1, 0)] == [None, None, 0]


def test_death_in_between_does_not_make_a_repetition_forgotten():
    repetitions = Repetitions()
    errors = (raised("x", step=3), RuntimeError("The actor died"), raised("x", step=3))

    assert [repetitions.find({0: error}) for error in errors] == [None, None, 0]


@pytest.mark.parametrize(
    "other", [raised("x", step=4), raised("x", step=3, kind=KeyError), raised_elsewhere(step=3)], ids=str
)
def test_another_step_kind_or_line_is_another_error(other):
    repetitions = Repetitions()

    assert [repetitions.find({0: error}) for error in (raised("x", step=3), other)] == [None, None]


def test_memory_that_does_not_suffice_twice_for_as_many_samples_of_the_same_step_is_a_repetition():
    shortages = [f"Out of memory in step 4, with {count} at once: because of {why}" for count, why in SHORTAGES]

    repetitions = Repetitions()
    found = [repetitions.find({0: raised(text, step=3, kind=MemoryShortageError)}) for text in shortages]

    assert found == [None, None, 0]  # it was tried with fewer samples first


def test_worker_that_ray_ends_for_want_of_memory_is_told_from_others_with_what_to_do():
    error = OutOfMemoryError(
        "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 192.0.2.2, ID: "
        "4c891b49) was 5.11GB used / 23.54GB limit (0.216872)\nOOM kill reason: Memory usage 5437370368B exceeded "
        "threshold of 5225816576B (20.7% of 25276502016B limit)\nObject store memory usage: [- objects spillable: 0"
    )  # as Ray 2.60 words it

    cause = describe_failures({1: WorkerHealthCheckFailedError("A worker health check failed.", error)})

    assert cause.startswith(
        "rank 1: Ray ended the worker process because its node ran out of memory (192.0.2.2: 5.11GB used / 23.54GB "
    )
    assert "lower batch_size" in cause
    assert "\n" not in cause


def test_worker_that_could_not_be_reached_is_told_as_that_and_not_by_what_ray_knows_of_it():
    error = ActorUnavailableError("RpcError: Unavailable\nrpc_code: 14.", bytes(16))
    about = "A worker health check failed.\nWorker info:\nWorker(\n  actor=Actor(RayTrainWorker, 3450)\n)"

    cause = describe_failures({1: WorkerHealthCheckFailedError(about, error)})

    assert cause.startswith("rank 1: Ray's controller could not reach the worker: The actor 0000")
    assert "RpcError: Unavailable rpc_code: 14." in cause
    assert "Worker info" not in cause


@pytest.mark.parametrize("kind", [OSError, TimeoutError, ConnectionError, CheckpointError])
def test_error_that_may_pass_is_never_a_repetition(kind):
    repetitions = Repetitions()

    assert [repetitions.find({0: raised("storage is away", step=3, kind=kind)}) for _ in range(3)] == [None] * 3
