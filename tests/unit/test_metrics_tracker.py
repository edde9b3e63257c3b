import json
import math

import numpy as np
import pytest
import torch

from ray_trainer.metrics import MetricsTracker


def test_an_epoch_without_validation_has_no_invented_values():
    tracker = MetricsTracker()

    row = tracker.log_epoch(0, {"accuracy": 0.5, "loss": 2.0}, learning_rate=0.1, epoch_duration=3.0)

    assert row == {
        "epoch": 0,
        "train/loss": 2.0,
        "train/accuracy": 0.5,
        "learning_rate": 0.1,
        "epoch_duration": 3.0,
    }
    assert list(tracker.get_summary().columns) == list(row)


def test_columns_keep_their_order_when_later_epochs_bring_others():
    tracker = MetricsTracker()
    tracker.log_epoch(0, {"loss": 2.0, "zeta": 0.0}, learning_rate=0.1, gradient_norm=1.0)
    tracker.log_epoch(1, {"loss": 1.0, "perplexity": 2.7}, {"perplexity": 3.0, "loss": 1.1}, learning_rate=0.1)

    summary = tracker.get_summary()

    assert list(summary.columns) == [
        "epoch",
        "train/loss",
        "train/perplexity",
        "train/zeta",
        "val/loss",
        "val/perplexity",
        "learning_rate",
        "gradient_norm",
    ]
    assert math.isnan(summary.loc[0, "val/loss"])
    assert summary["epoch"].tolist() == [0, 1]


def test_an_epoch_that_is_repeated_after_a_resume_replaces_its_row():
    tracker = MetricsTracker()
    for epoch, loss in ((0, 3.0), (1, 2.0), (2, 1.0), (1, 2.5)):
        tracker.log_epoch(epoch, {"loss": loss})

    assert [(row["epoch"], row["train/loss"]) for row in tracker.metrics_history] == [(0, 3.0), (1, 2.5), (2, 1.0)]


@pytest.mark.parametrize(
    ("losses", "mode", "best"),
    [
        ([2.0, 1.0, 1.0, 3.0], "min", 1),
        ([2.0, 1.0, 3.0, 3.0], "max", 2),
        ([math.nan, 5.0, math.nan], "min", 1),
        ([math.nan, 5.0, math.nan], "max", 1),
        ([math.nan], "min", None),
        ([], "min", None),
    ],
)
def test_the_best_epoch_is_the_first_of_the_best_values_and_never_nan(losses, mode, best):
    tracker = MetricsTracker()
    for epoch, loss in enumerate(losses):
        tracker.log_epoch(epoch, {"loss": 0.0}, {"loss": loss})

    assert tracker.get_best_epoch("val/loss", mode) == best


def test_an_unknown_column_has_no_best_epoch_and_an_unknown_mode_is_refused():
    tracker = MetricsTracker()
    tracker.log_epoch(0, {"loss": 1.0})

    assert tracker.get_best_epoch("val/loss") is None
    with pytest.raises(ValueError, match="mode must be 'min' or 'max'"):
        tracker.get_best_epoch(mode="lowest")


def test_perplexity_is_the_exponential_of_the_loss_and_never_overflows():
    assert MetricsTracker.compute_perplexity(0.0) == 1.0
    assert MetricsTracker.compute_perplexity(math.log(7)) == pytest.approx(7)
    assert MetricsTracker.compute_perplexity(1e6) == MetricsTracker.compute_perplexity(math.inf) == math.exp(100)
    assert math.isnan(MetricsTracker.compute_perplexity(math.nan))


def test_accuracy_agrees_with_numpy_and_leaves_ignored_labels_out():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 5, generator=generator)
    labels = torch.randint(5, (3, 7), generator=generator)
    labels[0, :4] = -100

    accuracy = MetricsTracker.compute_accuracy(logits, labels)

    hits = logits.numpy().argmax(-1) == labels.numpy()
    assert accuracy == hits[labels.numpy() != -100].mean()
    assert math.isnan(MetricsTracker.compute_accuracy(logits, torch.full((3, 7), -100)))
    assert math.isnan(MetricsTracker.compute_accuracy(logits, torch.full((3, 7), 1), ignore_index=1))


def test_scalars_become_a_table_with_steps_of_their_own():
    tracker = MetricsTracker(clock=lambda: 5.0)
    tracker.log_scalar("a", 1, step=10)
    tracker.log_scalar("b", np.float32(0.5))
    tracker.log_scalar("a", math.nan)

    rows = tracker.get_step_metrics()

    assert list(rows.columns) == ["step", "metric", "value", "timestamp"]
    assert rows["step"].tolist() == [10, 0, 11]
    assert rows["metric"].tolist() == ["a", "b", "a"]
    assert rows["timestamp"].tolist() == [5.0] * 3


def test_memory_for_scalars_is_bounded_to_the_newest():
    tracker = MetricsTracker(max_step_rows=3)
    for value in range(10):
        tracker.log_scalar("a", value)

    assert tracker.get_step_metrics()["value"].tolist() == [7.0, 8.0, 9.0]


@pytest.mark.parametrize("name", ["", "  ", None])
def test_a_scalar_without_a_name_is_refused(name):
    with pytest.raises(ValueError, match="non-empty string"):
        MetricsTracker().log_scalar(name, 1.0)


@pytest.mark.parametrize("value", ["1", None, True, [1.0]])
def test_a_scalar_that_is_no_number_is_refused(value):
    with pytest.raises(ValueError, match="numeric"):
        MetricsTracker().log_scalar("a", value)


@pytest.mark.parametrize("is_empty", [True, False])
def test_a_history_survives_as_plain_data(is_empty):
    before, after = MetricsTracker(), MetricsTracker()
    if not is_empty:
        before.log_epoch(0, {"loss": 1.0}, {"loss": 2.0}, 0.1, 0.2, 0.3)
        before.log_scalar("a", 1.0)
    after.log_epoch(7, {"loss": 9.0})

    after.load_state_dict(json.loads(json.dumps(before.state_dict())))

    assert after.get_summary().equals(before.get_summary())
    assert after.get_step_metrics().equals(before.get_step_metrics())
    after.log_scalar("a", 2.0)
    assert after.get_step_metrics()["step"].tolist()[-1] == (0 if is_empty else 1)
