"""Where a run may start from, and what it leaves of what was there."""

import shutil
import signal
from dataclasses import replace

import pytest
import torch
from experiments import assert_same, carry_out, checkpoints, events, everything_in, metric_rows, prepare, run

from ray_trainer import load_weights
from ray_trainer.checkpoint.manifest import Manifest, library_versions
from ray_trainer.metrics import EventLog
from ray_trainer.storage import Storage


class Counting:
    """Hooks that count starts and ends."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def on_training_start(self) -> None:
        self.calls.append("start")

    def on_resume(self, record) -> None:
        self.calls.append(f"resume {record.step}")

    def on_epoch_start(self, epoch) -> None:
        self.calls.append("epoch")

    def on_epoch_end(self, epoch, metrics) -> None:
        self.calls.append("epoch end")

    def on_training_end(self) -> None:
        self.calls.append("end")


def with_hooks(prepared, hooks):
    trainer = prepared.trainer
    prepared.trainer = type(trainer)(prepared.model, trainer.config, trainer.training_config, trainer.task_spec, hooks)
    return prepared


def stop_after(run_dir, step, **changes):
    prepared = prepare(run_dir, **changes)
    prepared.diary.act("on_step_end", step, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        carry_out(prepared)


def test_run_resumed_twice_equals_an_unbroken_one(tmp_path):
    stop_after(tmp_path / "broken", 2)
    stop_after(tmp_path / "broken", 7)

    assert_same(run(tmp_path / "broken"), run(tmp_path / "whole"))


def test_run_resumed_at_the_edge_of_an_epoch_equals_an_unbroken_one(tmp_path):
    whole = run(tmp_path)
    edge = checkpoints(tmp_path)[0]
    assert edge == "checkpoint_epoch0000_step00000005"

    assert_same(run(tmp_path, str(tmp_path / edge)), whole)


def test_finished_run_is_resumed_without_training_and_returns_its_results(tmp_path):
    whole = run(tmp_path)
    files = checkpoints(tmp_path)

    hooks = Counting()
    prepared = with_hooks(prepare(tmp_path), hooks)
    again = prepared.trainer.train(prepared.train_set, prepared.val_set, "auto")

    assert hooks.calls == ["start", "resume 10", "end"]
    assert again["metrics_summary"].equals(whole.results["metrics_summary"])
    assert {name: again[name] for name in ("best_epoch", "final_loss", "checkpoint_path", "training_time")} == {
        name: whole.results[name] for name in ("best_epoch", "final_loss", "checkpoint_path", "training_time")
    }
    assert prepared.model.seen == []
    assert checkpoints(tmp_path) == files
    assert metric_rows(tmp_path) == whole.rows


def test_run_directory_as_resume_from_continues_its_newest_checkpoint(tmp_path):
    stop_after(tmp_path / "broken", 3)

    assert_same(run(tmp_path / "broken", str(tmp_path / "broken")), run(tmp_path / "whole"))


def test_another_run_s_checkpoint_is_a_start_for_a_new_run(tmp_path):
    stop_after(tmp_path / "first", 3)

    second = run(tmp_path / "second", str(tmp_path / "first"))

    whole = run(tmp_path / "whole")
    assert_same(second.weights, whole.weights)
    assert_same(second.order, whole.order)
    assert len(checkpoints(tmp_path / "first")) == 1


def test_start_from_an_older_checkpoint_moves_the_later_ones_aside(tmp_path):
    whole = run(tmp_path, save_every_n_steps=2)
    later = [name for name in checkpoints(tmp_path) if int(name[-2:]) > 4]

    resumed = run(tmp_path, "checkpoint_epoch0000_step00000004", save_every_n_steps=2)

    assert_same(resumed, whole)
    assert checkpoints(tmp_path / "previous_01") == later
    steps = [(row["split"], row["step"]) for row in metric_rows(tmp_path)]
    assert len(steps) == len(set(steps))


def test_fresh_start_in_a_used_directory_moves_the_earlier_run_aside_and_loses_nothing(tmp_path):
    first = run(tmp_path)
    files = everything_in(tmp_path)

    second = run(tmp_path, None)

    moved = tmp_path / "previous_01"
    assert_same(second, first)
    assert everything_in(moved) == files
    assert metric_rows(moved) == first.rows
    assert_same(dict(load_weights(moved / checkpoints(moved)[-1])), first.weights)
    assert events(tmp_path, "run_started")


def test_two_fresh_starts_in_a_used_directory_keep_both_earlier_runs(tmp_path):
    for _ in range(3):
        run(tmp_path, None, epochs=1)

    assert checkpoints(tmp_path / "previous_01") == checkpoints(tmp_path / "previous_02") == checkpoints(tmp_path)


@pytest.mark.parametrize("max_steps", [3, 5])
def test_run_that_is_extended_equals_one_that_was_that_long_from_the_start(tmp_path, max_steps):
    constant = {"lr_scheduler_type": "constant", "warmup_steps": 2}
    run(tmp_path / "extended", max_steps=max_steps, **constant)

    extended = run(tmp_path / "extended", max_steps=8, **constant)

    whole = run(tmp_path / "whole", max_steps=8, **constant)
    assert_same(extended.weights, whole.weights)
    assert_same(extended.optimizer, whole.optimizer)
    assert_same(extended.order, whole.order)
    assert_same(extended.history, whole.history)


def test_run_with_a_falling_schedule_that_is_extended_takes_the_rates_of_the_longer_run_from_there(tmp_path):
    linear = {"lr_scheduler_type": "linear", "warmup_steps": 0, "log_every_n_steps": 1}
    run(tmp_path / "extended", max_steps=4, **linear)

    rows = run(tmp_path / "extended", max_steps=8, **linear).rows

    rates = {row["step"]: row["learning_rate"] for row in rows if row["split"] == "train"}
    assert [rates[step] for step in (5, 6, 7, 8)] == [0.02 * (1 - done / 8) for done in (4, 5, 6, 7)]


def test_run_that_was_given_more_epochs_goes_on(tmp_path):
    constant = {"lr_scheduler_type": "constant", "warmup_steps": 2}
    run(tmp_path / "extended", epochs=1, **constant)

    assert_same(run(tmp_path / "extended", epochs=2, **constant), run(tmp_path / "whole", epochs=2, **constant))


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_broken_newest_checkpoint_is_set_aside_and_the_one_before_used(tmp_path, damage):
    run(tmp_path, epochs=1, save_every_n_steps=2)
    newest = checkpoints(tmp_path)[-1]
    victim = next((tmp_path / newest).glob("*.safetensors"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "gone":
        victim.unlink()
    else:
        victim.write_bytes(content if damage == "flipped" else content[:-7])

    resumed = run(tmp_path, epochs=1, save_every_n_steps=2)

    assert_same(resumed, run(tmp_path / "whole", epochs=1, save_every_n_steps=2))
    rejected = events(tmp_path, "checkpoint_rejected")
    assert [event["checkpoint"] for event in rejected] == [newest]
    assert victim.name in rejected[0]["reason"]
    assert events(tmp_path, "resumed")[0]["from"] == "checkpoint_epoch0000_step00000004"


def test_run_with_nothing_but_broken_checkpoints_is_never_started_from_scratch(tmp_path):
    run(tmp_path, epochs=1)
    for manifest in tmp_path.glob("checkpoint_epoch*/manifest.json"):
        manifest.write_text("{")

    with pytest.raises(RuntimeError, match="checkpoint"):
        run(tmp_path, epochs=1)


def test_other_data_than_the_run_was_started_with_is_refused(tmp_path):
    stop_after(tmp_path, 3)
    other = prepare(tmp_path)
    other.train_set.labels[4] = (other.train_set.labels[4] + 1) % 3

    with pytest.raises(ValueError, match="data"):
        carry_out(other)


def test_other_order_than_the_run_was_started_with_is_refused(tmp_path):
    stop_after(tmp_path, 3)

    with pytest.raises(ValueError, match="random_seed was 42 and is 43"):
        run(tmp_path, random_seed=43)


def rewrite_manifests(run_dir, **changes):
    for path in run_dir.glob("checkpoint_*/manifest.json"):
        manifest = Manifest.from_bytes(path.read_bytes())
        path.write_bytes(replace(manifest, **changes).to_bytes())


def warnings_of(caplog, run_dir):
    caplog.clear()
    run(run_dir)
    return [line for line in caplog.messages if "bits may differ" in line]


def test_other_versions_and_threads_than_those_of_the_checkpoint_are_told_once_and_equal_ones_never(tmp_path, caplog):
    stop_after(tmp_path, 3)
    shutil.copytree(tmp_path, tmp_path / "other")
    before = {**library_versions(), "torch": "1.13.0", "numpy": "1.0.0", "of_a_later_version": "3"}
    rewrite_manifests(tmp_path / "other", versions=before, num_threads=99)

    (told,) = warnings_of(caplog, tmp_path / "other")

    now = library_versions()
    assert f"torch 1.13.0 (now {now['torch']}), numpy 1.0.0 (now {now['numpy']})" in told
    assert f"99 threads (now {torch.get_num_threads()})" in told
    assert now["ray_trainer"] not in told.replace(now["torch"], "").replace(now["numpy"], "")
    assert "of_a_later_version" not in told
    assert warnings_of(caplog, tmp_path / "other") == []  # what is saved since then is of these versions
    assert warnings_of(caplog, tmp_path) == []


def test_other_number_of_workers_is_told_where_there_was_no_checkpoint_yet(tmp_path):
    EventLog(Storage.open(tmp_path), 1).record("workers_started", num_workers=2)

    run(tmp_path, epochs=1)

    (resized,) = events(tmp_path, "resized")
    assert (resized["step"], resized["from"], resized["to"]) == (0, 2, 1)


def test_resume_tells_how_long_it_took_since_the_failure_was_noticed(tmp_path):
    run(tmp_path, epochs=1)
    failure = EventLog.of_controller(Storage.open(tmp_path)).record("failure", cause="a worker died")

    run(tmp_path, epochs=2)
    run(tmp_path, epochs=3)

    after_failure, after_end = events(tmp_path, "resumed")
    assert after_failure["noticed_at"] == failure["time"]
    assert failure["time"] + after_failure["waited_s"] + after_failure["state_s"] <= after_failure["time"]
    assert "noticed_at" not in after_end
