"""When a run is given up: by progress, and by the place of an error."""

import pickle
import traceback

import pytest

from ray_trainer.cluster.retries import Retries, note_place, places
from ray_trainer.errors import CheckpointError


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


def test_no_limit_is_no_limit():
    retries = Retries(-1)

    assert all(retries.allow(0) for _ in range(100))


def test_same_error_at_the_same_place_and_step_is_known_again_whatever_it_says():
    first, again = places({0: raised("7 apples", step=3)}), places({1: raised("8 apples", step=3)})

    assert first.keys() == again.keys()


@pytest.mark.parametrize(
    "other", [raised("x", step=4), raised("x", step=3, kind=KeyError), raised_elsewhere(step=3)], ids=str
)
def test_another_step_kind_or_line_is_another_error(other):
    assert places({0: raised("x", step=3)}).keys() != places({0: other}).keys()


@pytest.mark.parametrize("kind", [OSError, TimeoutError, ConnectionError, CheckpointError])
def test_error_that_may_pass_has_no_place(kind):
    assert places({0: raised("storage is away", step=3, kind=kind)}) == {}


def test_process_that_died_without_an_error_has_no_place():
    assert places({0: RuntimeError("The actor died")}) == {}
