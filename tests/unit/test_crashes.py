"""Batches at which training fails twice are left out from then on."""

import struct

import numpy as np
import pytest
from experiments import assert_same, carry_out, events, prepare

from ray_trainer.data.crashing import CrashingSamples, without
from ray_trainer.data.deal import Share
from ray_trainer.errors import DataError
from ray_trainer.marks import BACKWARD, BEREFT, FORWARD, NOWHERE, Mark, to_blame

BAD = 11  # a sample
CHANGES = {"size": 24, "on_bad_data": "quarantine", "max_bad_ratio": 0.1, "save_every_n_steps": 3, "random_seed": 3}


class Killed(BaseException):
    """Passes everything that is done after an error, as a kill would."""


def start(run_dir, bad=BAD, **changes):
    """An experiment whose model can't take one of the samples."""
    prepared = prepare(run_dir, **CHANGES | changes)
    layers, forward = prepared.model.layers, prepared.model.forward

    def strict(features):
        if prepared.model.training and bad in features[:, 0].int().tolist():
            raise ZeroDivisionError(f"sample {bad}")
        return forward(features)

    prepared.model.forward = strict
    assert layers is prepared.model.layers
    return prepared


def fail(run_dir, **changes):
    with pytest.raises(ZeroDivisionError):
        carry_out(start(run_dir, **changes))


def seen_of(outcome, epoch):
    return sorted(sample for at, _, samples in outcome.order if at == epoch for sample in samples)


def test_batch_that_fails_twice_is_left_out_from_then_on_and_nothing_else_is(tmp_path):
    fail(tmp_path)
    fail(tmp_path)

    outcome = carry_out(start(tmp_path))

    first, second = events(tmp_path, "batch_failed")
    (left_out,) = events(tmp_path, "batch_quarantined")
    assert first["samples"] == second["samples"]
    assert BAD in first["samples"]
    assert first["error"] == "ZeroDivisionError: sample 11"
    assert left_out["samples"] == sorted(first["samples"])
    assert len(left_out["samples"]) == 2  # a micro-batch
    for epoch in (0, 1):
        assert seen_of(outcome, epoch) == [sample for sample in range(24) if sample not in left_out["samples"]]
    assert outcome.step == 12


def test_it_is_left_out_on_every_later_start_in_the_same_way(tmp_path):
    for name in ("whole", "killed"):
        fail(tmp_path / name)
        fail(tmp_path / name)
    whole = carry_out(start(tmp_path / "whole"))
    for step in (5, 8, 11):
        killed = start(tmp_path / "killed")
        killed.diary.act("on_step_end", step, lambda: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            carry_out(killed)

    assert_same(carry_out(start(tmp_path / "killed")), whole)
    assert len(events(tmp_path / "killed", "batch_quarantined")) == 1


def test_batch_that_fails_once_is_tried_again(tmp_path):
    fail(tmp_path)

    outcome = carry_out(start(tmp_path, bad=-1))

    assert seen_of(outcome, 0) == list(range(24))
    assert events(tmp_path, "batch_quarantined") == []


def test_without_the_policy_it_fails_again_and_again(tmp_path):
    for _ in range(3):
        fail(tmp_path, on_bad_data="refuse")

    assert events(tmp_path, "batch_failed") == []


def test_more_than_the_configuration_allows_is_refused(tmp_path):
    fail(tmp_path, max_bad_ratio=0.05)
    fail(tmp_path, max_bad_ratio=0.05)

    with pytest.raises(DataError, match=r"twice at each of 2 of 24 samples .*max_bad_ratio \(0.05\)"):
        carry_out(start(tmp_path, max_bad_ratio=0.05))


def test_rank_whose_samples_are_all_gone_takes_part_with_another_one_that_counts_nothing():
    shares = [Share([np.array([4, 5]), np.array([6])], 3), Share([np.array([0, 1])], 2), Share([np.array([7])], 0)]
    crashing = [CrashingSamples(0, 1, np.array([0, 1])), CrashingSamples(0, 0, np.array([5, 6, 7]))]

    first, second, third = without(iter(shares), crashing, epoch=0, start=0, num_rows=8)

    assert ([part.tolist() for part in first.micro_batches], first.num_samples) == ([[4]], 1)
    assert ([part.tolist() for part in second.micro_batches], second.num_samples) == ([[2]], 0)
    assert ([part.tolist() for part in third.micro_batches], third.num_samples) == ([[2]], 0)


def test_micro_batches_keep_their_places_where_one_is_gone():
    shares = [Share([np.array([4, 5]), np.array([6]), np.array([7])], 4, (3, 4, 5))]

    (share,) = without(iter(shares), [CrashingSamples(0, 0, np.array([5, 6]))], epoch=0, start=0, num_rows=8)

    assert ([part.tolist() for part in share.micro_batches], share.places) == ([[4], [7]], (3, 5))


def test_samples_are_left_out_from_their_step_on_only():
    shares = [Share([np.array([4, 5])], 2), Share([np.array([5, 4])], 2)]

    before, after = without(iter(shares), [CrashingSamples(2, 7, np.array([5]))], epoch=2, start=6, num_rows=8)

    assert [before.micro_batches[0].tolist(), after.micro_batches[0].tolist()] == [[4, 5], [4]]


def test_mark_of_an_earlier_run_in_the_same_directory_says_nothing_of_a_fresh_one(tmp_path):
    mark = Mark(attempt=4, epoch=0, step_in_epoch=1, step=1, world_size=1, rank=0, micro_batch=0, phase=1)
    (tmp_path / ".steps").mkdir()
    (tmp_path / ".steps" / "4-0").write_bytes(struct.pack("<10q", *mark))

    carry_out(start(tmp_path, bad=-1, epochs=1), resume_from=None)

    assert events(tmp_path, "batch_failed") == []


def marks(*phases):
    """One of each rank, all in the same step."""
    return [Mark(1, 0, 4, 4, len(phases), rank, 0, phase) for rank, phase in enumerate(phases)]


@pytest.mark.parametrize(
    ("phases", "blamed"),
    [
        ((FORWARD, BACKWARD), [0]),
        ((BACKWARD, BACKWARD), [0, 1]),
        ((NOWHERE, BACKWARD), []),
        ((NOWHERE, NOWHERE), []),
        ((BACKWARD,), [0]),
        ((BACKWARD, BEREFT), [0]),
        ((NOWHERE, BEREFT), []),
        ((NOWHERE, BACKWARD, BEREFT), []),
    ],
)
def test_rank_that_waited_for_one_that_died_elsewhere_is_not_to_blame(phases, blamed):
    assert [mark.rank for mark in to_blame(marks(*phases))] == blamed


def test_rank_in_the_backward_pass_is_not_blamed_where_nothing_is_known_of_the_others():
    assert to_blame(marks(BACKWARD, BACKWARD)[:1]) == []
