"""Every number that is reported is the real one."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from experiments import POINTS, Network, Points, events, metric_rows, prepare, settings
from torch import nn
from torch.utils.data import TensorDataset

from ray_trainer import DefaultHooks, Trainer, get_default_task_specs
from ray_trainer.errors import DivergenceError


class Frozen(DefaultHooks):
    """Keeps the weights as they were before each step."""

    def __init__(self, model):
        self.model = model
        self.before = []
        self.records = []
        self.keep()

    def keep(self):
        self.before.append({name: value.clone() for name, value in self.model.state_dict().items()})

    def on_step_end(self, record):
        self.records.append(record)
        self.keep()


class Oracle(nn.Module):
    """Scores the token after the present one highest: t -> t + 1; learns next to nothing at a tiny rate."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, input_ids):
        return self.scale * F.one_hot((input_ids + 1) % 10, 10).float()


def trainer_for(run_dir, model, hooks=None, task=POINTS, **changes):
    return Trainer(model, SimpleNamespace(), settings(run_dir, **changes), task, hooks)


def poisoned(batches, size=12):
    """Points of which the given batches of two hold a NaN; the first column stays whole."""
    data = Points(size)
    for batch in batches:
        data.features[2 * batch, 1] = math.nan
    return data


def test_logged_gradient_norm_is_that_of_the_mean_gradient_before_clipping(tmp_path):
    torch.manual_seed(0)
    model = Network(dropout=0.0)
    hooks = Frozen(model)
    data = Points(12)
    trainer = trainer_for(
        tmp_path, model, hooks, epochs=1, shuffle=False, max_grad_norm=1e-3, log_every_n_steps=1, warmup_steps=0
    )

    summary = trainer.train(data)["metrics_summary"]

    expected = []
    for step, weights in enumerate(hooks.before[:3]):
        model.load_state_dict(weights)
        model.zero_grad()
        batch = slice(4 * step, 4 * step + 4)
        F.cross_entropy(model(data.features[batch]), data.labels[batch]).backward()
        expected.append(math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters())))
    logged = [row["gradient_norm"] for row in metric_rows(tmp_path)]
    assert logged == pytest.approx(expected, rel=1e-5)  # sums of float32 in another order
    assert [record.gradient_norm for record in hooks.records] == logged
    assert summary["gradient_norm"].tolist() == [logged[-1]]


def test_train_loss_and_accuracy_are_means_over_the_samples_of_an_uneven_epoch(tmp_path):
    torch.manual_seed(0)
    model = Network(dropout=0.0)
    data = Points(7)
    with torch.no_grad():
        logits = model(data.features)

    trainer = trainer_for(tmp_path, model, epochs=1, learning_rate=1e-30)
    row = trainer.train(data)["metrics_summary"].iloc[0]

    assert row["train/loss"] == pytest.approx(F.cross_entropy(logits, data.labels).item(), rel=1e-6)
    assert row["train/accuracy"] == (logits.argmax(1) == data.labels).double().mean().item()


def test_accuracy_of_a_language_model_is_that_of_the_next_token(tmp_path):
    sequences = (torch.arange(8)[None] + torch.arange(6)[:, None]) % 10
    task = get_default_task_specs()["lm_tiny"]
    task.special_tokens = {}
    trainer = trainer_for(tmp_path, Oracle(), task=task, epochs=1, learning_rate=1e-30)

    row = trainer.train(TensorDataset(sequences, sequences))["metrics_summary"].iloc[0]

    assert row["train/accuracy"] == 1.0
    loss = math.log(math.exp(3) + 9) - 3
    assert row["train/loss"] == pytest.approx(loss, rel=1e-6)
    assert row["train/perplexity"] == pytest.approx(math.exp(loss), rel=1e-6)


def test_perplexity_is_the_exponential_of_the_mean_over_all_tokens_not_over_batches(tmp_path):
    ids = torch.randint(1, 10, (5, 8), generator=torch.Generator().manual_seed(1))
    ids[1:, 3:] = 0  # padding
    trainer = trainer_for(
        tmp_path, Oracle(), task=get_default_task_specs()["lm_tiny"], epochs=1, learning_rate=1e-30, batch_size=2
    )

    row = trainer.train(TensorDataset(ids, ids), TensorDataset(ids, ids))["metrics_summary"].iloc[0]

    real = ids[:, 1:] != 0
    hits = (ids[:, :-1] + 1) % 10 == ids[:, 1:]
    total = math.log(math.exp(3) + 9) * int(real.sum()) - 3.0 * int((hits & real).sum())
    for split in ("train", "val"):
        assert row[f"{split}/loss"] == pytest.approx(total / int(real.sum()), rel=1e-6)
        assert row[f"{split}/perplexity"] == pytest.approx(math.exp(total / int(real.sum())), rel=1e-6)
        assert row[f"{split}/accuracy"] == pytest.approx(int((hits & real).sum()) / int(real.sum()), rel=1e-12)


def test_run_without_validation_data_has_no_validation_columns_rows_or_metrics(tmp_path):
    prepared = prepare(tmp_path)

    summary = prepared.trainer.train(prepared.train_set)["metrics_summary"]

    assert not [name for name in summary.columns if name.startswith("val/")]
    assert {row["split"] for row in metric_rows(tmp_path)} == {"train"}


def test_validation_uses_neither_dropout_nor_gradients_and_changes_no_random_number(tmp_path):
    modes = []
    with_val, without = prepare(tmp_path / "a"), prepare(tmp_path / "b")
    with_val.model.on_forward = lambda training: modes.append((training, torch.is_grad_enabled()))

    with_val.trainer.train(with_val.train_set, with_val.val_set)
    without.trainer.train(without.train_set)

    assert set(modes) == {(True, True), (False, False)}
    for one, other in zip(with_val.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_batch_with_nan_is_skipped_and_leaves_no_trace_in_the_model(tmp_path, accumulate):
    torch.manual_seed(0)
    model = Network(norm=True)
    hooks = Frozen(model)
    trainer = trainer_for(
        tmp_path, model, hooks, epochs=1, shuffle=False, gradient_accumulation_steps=accumulate, log_every_n_steps=1
    )

    trainer.train(poisoned([3]))

    bad = 3 // accumulate
    assert [record.skipped for record in hooks.records] == [step == bad for step in range(6 // accumulate)]
    for name, value in hooks.before[bad].items():
        assert torch.equal(value, hooks.before[bad + 1][name]), name
        assert torch.isfinite(hooks.before[-1][name]).all()
    assert [(event["step"], event["epoch"]) for event in events(tmp_path, "step_skipped")] == [(bad + 1, 0)]


def test_skipped_step_is_in_no_mean(tmp_path):
    model = Network(dropout=0.0)
    data = poisoned([0])
    with torch.no_grad():
        expected = F.cross_entropy(model(data.features[2:]), data.labels[2:]).item()

    summary = trainer_for(
        tmp_path, model, epochs=1, shuffle=False, gradient_accumulation_steps=1, learning_rate=1e-30
    ).train(data)["metrics_summary"]

    assert summary["train/loss"].iloc[0] == pytest.approx(expected, rel=1e-6)


def test_too_many_bad_steps_in_a_row_end_the_run_and_each_is_recorded(tmp_path):
    model = Network()
    hooks = Frozen(model)
    trainer = trainer_for(
        tmp_path, model, hooks, shuffle=False, gradient_accumulation_steps=1, max_consecutive_bad_steps=3
    )

    with pytest.raises(DivergenceError, match=r"layers\.0"):
        trainer.train(poisoned([1, 2, 3, 4]))

    assert [event["step"] for event in events(tmp_path, "step_skipped")] == [2, 3, 4]
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_bad_steps_that_are_not_in_a_row_do_not_end_the_run(tmp_path):
    trainer = trainer_for(
        tmp_path, Network(), epochs=1, shuffle=False, gradient_accumulation_steps=1, max_consecutive_bad_steps=2
    )

    trainer.train(poisoned([0, 2, 4]))

    assert len(events(tmp_path, "step_skipped")) == 3


def test_bad_steps_are_counted_across_a_restart(tmp_path):
    changes = {"shuffle": False, "gradient_accumulation_steps": 1, "max_consecutive_bad_steps": 3}
    trainer_for(tmp_path, Network(), max_steps=3, **changes).train(poisoned([1, 2, 3]))

    with pytest.raises(DivergenceError):
        trainer_for(tmp_path, Network(), max_steps=6, **changes).train(poisoned([1, 2, 3]), resume_from="auto")


def test_gradient_above_the_explosion_threshold_is_skipped(tmp_path):
    model = nn.Linear(6, 3)
    data = Points(12)
    data.features[4:6] *= 1e6
    data.labels[4:6] = model(data.features[4:6]).argmin(1)  # surely wrong, else there is no gradient at all
    trainer = trainer_for(
        tmp_path, model, epochs=1, shuffle=False, gradient_accumulation_steps=1, learning_rate=1e-30,
        gradient_explosion_threshold=1e3,
    )  # fmt: skip

    trainer.train(data)

    assert [event["step"] for event in events(tmp_path, "step_skipped")] == [3]
