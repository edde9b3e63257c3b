"""Where a run ends, when it validates, and how fast it learns on the way."""

import math
import time
from types import SimpleNamespace

import pytest
from experiments import POINTS, Diary, Network, Points, checkpoints, metric_rows, prepare, run, settings

from ray_trainer import Trainer

TOTAL = 10  # steps: two epochs of five


def closed_form(kind: str, step: int, warmup: int, floor: float, decay: int) -> float:
    """The factor of the ``step``-th update, from 1, as the documentation of the schedules words it."""
    done = step - 1
    if done < warmup:
        return (done + 1) / (warmup + 1)
    if kind == "constant":
        return 1.0
    if kind == "wsd":
        start = TOTAL - decay
        return 1.0 if done < start else floor + (1 - floor) * (1 - (done - start) / decay)
    part = (done - warmup) / (TOTAL - warmup)
    return floor + (1 - floor) * (0.5 * (1 + math.cos(math.pi * part)) if kind == "cosine" else 1 - part)


def rates(run_dir, **changes):
    rows = run(run_dir, log_every_n_steps=1, save_every_n_epochs=None, **changes).rows
    return [row["learning_rate"] for row in rows if row["split"] == "train"]


def validations(outcome):
    return [row["step"] for row in outcome.rows if row["split"] == "val"]


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "wsd"])
@pytest.mark.parametrize(
    ("warmup", "steps", "floor"),
    [
        ({"warmup_steps": 3}, 3, 0.1),
        ({"warmup_steps": None, "warmup_ratio": 0.3}, 3, 0.0),
        ({"warmup_steps": 0}, 0, 0.1),
    ],
)
def test_learning_rate_of_each_step_is_that_of_the_closed_form(tmp_path, kind, warmup, steps, floor):
    seen = rates(tmp_path, lr_scheduler_type=kind, min_lr_ratio=floor, decay_ratio=0.4, **warmup)

    assert seen == pytest.approx(
        [0.02 * closed_form(kind, step, steps, floor, 4) for step in range(1, TOTAL + 1)], rel=1e-12
    )


def test_learning_rate_never_exceeds_the_configured_one_and_never_is_zero_before_the_end(tmp_path):
    seen = rates(tmp_path, lr_scheduler_type="linear", warmup_steps=2)

    assert max(seen) == 0.02
    assert min(seen) > 0


def test_max_steps_ends_the_run_within_an_epoch_with_a_validation_and_a_checkpoint(tmp_path):
    outcome = run(tmp_path, max_steps=7)

    assert [entry[1] for entry in outcome.order] == [1, 2, 3, 4, 5, 6, 7]
    assert validations(outcome) == [5, 7]
    assert checkpoints(tmp_path)[-1] == "checkpoint_epoch0001_step00000007"
    assert len(outcome.history) == 2


def test_max_steps_beyond_the_epochs_changes_nothing(tmp_path):
    assert run(tmp_path, max_steps=1000).step == TOTAL


def test_max_time_ends_the_run_after_the_step_in_which_it_is_reached(tmp_path):
    prepared = prepare(tmp_path, epochs=1000, max_time=0.6)
    prepared.diary.on_call = lambda name, count: time.sleep(0.1) if name == "on_step_end" else None

    results = prepared.trainer.train(prepared.train_set)

    assert prepared.trainer.progress.step <= 8  # of 0.1 s or more
    assert results["training_time"] >= 0.6
    assert checkpoints(tmp_path)[-1].endswith(f"{prepared.trainer.progress.step:08d}")


def test_max_time_counts_the_time_of_all_starts(tmp_path):
    first = prepare(tmp_path, epochs=1000, max_steps=4, max_time=0.5, lr_scheduler_type="constant")
    first.diary.on_call = lambda name, count: time.sleep(0.1) if name == "on_step_end" else None
    first.trainer.train(first.train_set)
    second = prepare(tmp_path, epochs=1000, max_time=0.5, lr_scheduler_type="constant")
    second.diary.on_call = first.diary.on_call

    second.trainer.train(second.train_set, resume_from="auto")

    assert second.trainer.progress.step <= 7  # not 4 + 5


def test_limit_train_batches_counts_micro_batches_and_makes_shorter_epochs(tmp_path):
    outcome = run(tmp_path, limit_train_batches=4)

    assert [entry[1] for entry in outcome.order] == [1, 2, 3, 4]
    assert sum(len(samples) for _, _, samples in outcome.order) == 2 * 4 * 2


def test_limit_val_batches_validates_on_the_first_samples_only(tmp_path):
    prepared = prepare(tmp_path, limit_val_batches=2, epochs=1)
    read = set()
    prepared.val_set.on_read = read.add

    prepared.trainer.train(prepared.train_set, prepared.val_set)

    assert read == {0, 1, 2, 3}


def test_fast_dev_run_tries_everything_once_and_leaves_no_files(tmp_path):
    model = Network()
    calls = []
    diary = Diary(model)
    diary.on_call = lambda name, count: calls.append(name)
    trainer = Trainer(model, SimpleNamespace(), settings(tmp_path / "run", fast_dev_run=True), POINTS, diary)

    results = trainer.train(Points(19), Points(7))

    assert calls == [
        "on_epoch_start",
        "on_batch_end",
        "on_batch_end",
        "on_step_end",
        "on_validation_end",
        "on_epoch_end",
    ]
    assert results["checkpoint_path"] is None
    assert len(results["metrics_summary"]) == 1
    assert not (tmp_path / "run").exists()


def test_fast_dev_run_in_a_used_directory_touches_nothing(tmp_path):
    run(tmp_path, epochs=1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    prepared = prepare(tmp_path, fast_dev_run=True)
    prepared.trainer.train(prepared.train_set, prepared.val_set)

    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_validation_happens_at_every_third_step_and_at_the_end(tmp_path):
    outcome = run(tmp_path, validate_every_n_steps=3, validate_every_n_epochs=None)

    assert validations(outcome) == [3, 6, 9, 10]


def test_validation_that_is_due_by_steps_and_by_epoch_happens_once(tmp_path):
    assert validations(run(tmp_path, validate_every_n_steps=5)) == [5, 10]


def test_early_stopping_ends_the_run_after_as_many_bad_validations_as_allowed(tmp_path):
    outcome = run(tmp_path, epochs=20, early_stopping_patience=2, early_stopping_min_delta=100.0, warmup_steps=0)

    assert [row["epoch"] for row in outcome.history] == [0, 1, 2]  # the first one is an improvement on nothing
    assert outcome.best[0] == min(outcome.history, key=lambda row: row["val/loss"])["epoch"]


def test_run_that_was_stopped_early_is_finished_when_it_is_resumed(tmp_path):
    stopping = {"epochs": 20, "early_stopping_patience": 1, "early_stopping_min_delta": 100.0, "warmup_steps": 0}
    first = run(tmp_path, **stopping)

    second = run(tmp_path, **stopping)

    assert first.step == second.step == 10
    assert metric_rows(tmp_path) == first.rows


def test_early_stopping_may_watch_a_metric_that_should_rise(tmp_path):
    outcome = run(
        tmp_path, epochs=20, early_stopping_patience=1, monitor="val_accuracy", mode="max", learning_rate=1e-30
    )

    assert len(outcome.history) == 2


def test_drop_last_leaves_the_incomplete_step_out(tmp_path):
    outcome = run(tmp_path, drop_last=True)

    assert {len(samples) for _, _, samples in outcome.order} == {4}
    assert outcome.step == 8


def test_validation_split_takes_samples_from_training_and_never_trains_on_them(tmp_path):
    prepared = prepare(tmp_path, validation_split=0.3)

    results = prepared.trainer.train(prepared.train_set)

    trained = {sample for _, _, samples in prepared.diary.order for sample in samples}
    assert len(trained) == 19 - round(0.3 * 19)
    assert results["metrics_summary"]["val/loss"].notna().all()
