"""Back to a state before the numbers went wrong, the same however often the run is killed."""

import math
from dataclasses import replace

import pytest
import torch
from experiments import assert_same, carry_out, checkpoints, events, prepare
from torch import nn

from ray_trainer.checkpoint.ring import StateRing
from ray_trainer.errors import ConfigError, DivergenceError
from ray_trainer.gradients import RollbackPoints

SETTINGS = {"size": 24, "shuffle": False, "save_every_n_epochs": None}  # six steps an epoch, four samples each
BACK = {"on_bad_gradients": "rollback", "rollback_points_every_n_steps": 2}


class Killed(BaseException):
    """Passes everything that is done after an error, as a kill would."""


def kill() -> None:
    raise Killed


def poisoned(run_dir, bad_steps, value=math.nan, **changes):
    """An experiment of which these steps of each epoch have a bad sample."""
    prepared = prepare(run_dir, **SETTINGS | changes)
    for step in bad_steps:
        prepared.train_set.features[4 * step - 3, 1] = value
    return prepared


def windows(run_dir, tier="memory"):
    return [
        (event["first_skipped"], event["step"]) for event in events(run_dir, "rolled_back") if event["tier"] == tier
    ]


def test_rolled_back_run_is_one_that_never_used_the_batches_that_led_there(tmp_path):
    outcome = carry_out(poisoned(tmp_path / "back", [4], **BACK))

    expected = carry_out(poisoned(tmp_path / "skips", [3, 4]))
    assert windows(tmp_path / "back") == [(3, 4), (9, 10)]
    assert outcome.results["metrics_summary"]["train/loss"].notna().all()
    for name in ("weights", "optimizer", "schedule", "history", "step"):
        assert_same(getattr(outcome, name), getattr(expected, name), name)
    assert [row.get("loss") for row in outcome.rows] == [row.get("loss") for row in expected.rows]


def test_rollback_counts_its_steps_as_skipped_and_says_why(tmp_path):
    prepared = poisoned(tmp_path, [4], epochs=1, **BACK)

    carry_out(prepared)

    assert prepared.trainer.progress.skipped_steps == 2
    assert prepared.trainer.gradient_accumulator.stats.skipped_steps == 2
    assert prepared.trainer.gradient_accumulator.stats.optimizer_steps == 4
    (event,) = events(tmp_path, "rolled_back")
    assert (event["to_step"], event["reason"], event["tier"]) == (2, "gradient norm nan", "memory")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return carry_out(poisoned(tmp_path_factory.mktemp("run"), [4], **BACK, save_every_n_steps=1))


@pytest.mark.parametrize("step", [0, 2, 3, 4, 6, 8, 9, 10, 12])
def test_run_killed_after_any_checkpoint_rolls_back_to_the_same(tmp_path, undisturbed, step):
    changes = BACK | {"save_every_n_steps": 1}
    killed = poisoned(tmp_path, [4], **changes)
    killed.diary.act("on_checkpoint_saved", step + 1, kill)
    with pytest.raises(Killed):
        carry_out(killed)

    resumed = carry_out(poisoned(tmp_path, [4], **changes))

    assert_same(resumed, undisturbed)
    assert windows(tmp_path, "storage") == {3: [(3, 4)], 9: [(9, 10)]}.get(step, [])


@pytest.mark.parametrize("step", [3, 5, 11])
def test_run_killed_between_checkpoints_rolls_back_to_the_same(tmp_path, undisturbed, step):
    changes = BACK | {"save_every_n_steps": 3, "keep_last_n": 1}
    killed = poisoned(tmp_path, [4], **changes)
    killed.diary.act("on_step_end", step, kill)
    with pytest.raises(Killed):
        carry_out(killed)

    resumed = carry_out(poisoned(tmp_path, [4], **changes))

    assert_same(replace(resumed, best=undisturbed.best), undisturbed)


def test_resume_from_inside_of_the_window_begins_before_it(tmp_path, undisturbed):
    changes = BACK | {"save_every_n_steps": 1}
    carry_out(poisoned(tmp_path, [4], **changes))

    again = carry_out(poisoned(tmp_path, [4], **changes), "checkpoint_epoch0000_step00000003")

    assert_same(again, undisturbed)


def test_checkpoint_before_all_states_to_go_back_to_is_kept(tmp_path):
    carry_out(poisoned(tmp_path, [], **BACK | {"save_every_n_steps": 5, "keep_last_n": 1, "keep_best_k": 0}))

    assert [int(name[-8:]) for name in checkpoints(tmp_path)] == [5, 12]  # when 12 was saved: states of 8 and 10


def test_run_resumed_between_two_points_keeps_the_checkpoint_that_it_may_have_to_go_back_to(tmp_path):
    few = {"rollback_points_every_n_steps": 4, "save_every_n_steps": 1, "keep_last_n": 1, "keep_best_k": 0}
    whole = carry_out(poisoned(tmp_path / "whole", [2], **BACK | few))
    killed = poisoned(tmp_path / "killed", [2], **BACK | few)
    killed.diary.act("on_checkpoint_saved", 6, kill)  # that of step 5, between the points 4 and 8
    with pytest.raises(Killed):
        carry_out(killed)

    resumed = carry_out(poisoned(tmp_path / "killed", [2], **BACK | few))

    assert windows(tmp_path / "killed", "storage") == windows(tmp_path / "whole")[-1:] == [(1, 8)]
    assert_same(resumed, whole)


def test_rollback_that_does_not_help_goes_back_further_and_ends_the_run_at_last(tmp_path):
    prepared = poisoned(tmp_path, [4, 5, 6, 7], size=28, max_rollbacks=3, **BACK)

    with pytest.raises(DivergenceError, match=r"step 7.*3 times did not help(.|\n)*learning_rate") as caught:
        carry_out(prepared)

    assert windows(tmp_path) == [(3, 4), (1, 5), (1, 6)]
    assert caught.value.on_all_ranks


def test_policy_raise_ends_the_run_at_the_first_bad_step(tmp_path):
    with pytest.raises(DivergenceError, match="1 consecutive gradient failure"):
        carry_out(poisoned(tmp_path, [4], on_bad_gradients="raise"))

    assert [event["step"] for event in events(tmp_path, "step_skipped")] == [4]


def test_without_a_state_to_go_back_to_the_error_says_so(tmp_path):
    killed = poisoned(tmp_path, [4], **BACK | {"save_every_n_steps": 1})
    killed.diary.act("on_checkpoint_saved", 4, kill)
    with pytest.raises(Killed):
        carry_out(killed)
    for name in checkpoints(tmp_path)[:-1]:
        (tmp_path / name).rename(tmp_path / f"elsewhere_{name}")

    with pytest.raises(DivergenceError, match="step 2 to go back to is neither in memory nor in a checkpoint"):
        carry_out(poisoned(tmp_path, [4], **BACK))


def test_rollback_may_be_switched_on_when_a_run_goes_on(tmp_path):
    killed = poisoned(tmp_path, [4], save_every_n_steps=1)
    killed.diary.act("on_checkpoint_saved", 3, kill)
    with pytest.raises(Killed):
        carry_out(killed)

    carry_out(poisoned(tmp_path, [4], **BACK | {"save_every_n_steps": 1}))

    assert windows(tmp_path) == [(4, 4), (9, 10)]


def test_spike_rolls_back_the_same_before_and_after_a_kill(tmp_path):
    changes = {"on_spike": "rollback", "spike_window": 8, "spike_threshold": 1.0, "epochs": 3}  # noise is enough
    changes |= {"rollback_points_every_n_steps": 2, "save_every_n_steps": 3}
    whole = carry_out(poisoned(tmp_path / "whole", [], **changes))
    found = windows(tmp_path / "whole")
    assert found
    killed = poisoned(tmp_path / "killed", [], **changes)
    killed.diary.act("on_step_end", found[0][1] - 1, kill)
    with pytest.raises(Killed):
        carry_out(killed)

    assert_same(carry_out(poisoned(tmp_path / "killed", [], **changes)), whole)
    assert windows(tmp_path / "killed") == found


def test_points_are_a_function_of_the_steps(tmp_path):
    points = RollbackPoints(every_n_steps=10, capacity=2, max_in_a_row=2)
    for step in range(36):
        if points.is_due(step):
            points.add(step)
    assert points.steps == [20, 30]

    points.go_back(points.target(36, "nan"), 36)
    assert (points.steps, points.windows) == ([20, 30], [(31, 36)])
    assert [step for step in range(37, 60) if points.is_due(step)] == [50]  # not before ten steps have gone well

    points.go_back(points.target(38, "nan"), 38)
    assert (points.steps, points.windows) == ([20], [(21, 38)])
    with pytest.raises(DivergenceError, match="2 times"):
        points.target(39, "nan")
    points.add(50)
    assert points.target(51, "nan") == 50


def test_kept_state_shares_no_memory_and_comes_back_as_it_was(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    ring = StateRing()
    ring.keep(7, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "plain": [1, (2.5, None)]})
    expected = ring.state(7)

    optimizer.step()
    ring.state(7)["model"]["0.weight"].zero_()
    again = ring.state(7)

    assert_same(again, expected)
    assert again["model"]._metadata == model.state_dict()._metadata
    assert not torch.equal(again["model"]["0.weight"], model[0].weight)
    model.load_state_dict(again["model"])
    assert torch.equal(again["model"]["0.weight"], model[0].weight)


def test_memory_of_a_dropped_state_is_used_again():
    ring = StateRing()
    ring.keep(1, {"weights": torch.zeros(3)})
    place = ring._states[1]["weights"].data_ptr()

    ring.only([])
    ring.keep(2, {"weights": torch.ones(3)})

    assert 1 not in ring
    assert ring._states[2]["weights"].data_ptr() == place
    assert torch.equal(ring.state(2)["weights"], torch.ones(3))


def test_settings_that_are_wrong_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"on_spike(.|\n)*num_rollback_points"):
        prepare(tmp_path, on_spike="ignore", num_rollback_points=0)
