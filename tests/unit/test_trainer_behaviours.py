"""The sixteen behaviours of the original's trainer tests, each true in substance.

Behaviours of a whole training go through ``way``, so that another file can run them through ``fit``: whatever
is passed is a function of a module, and hooks speak through a file.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from ray_trainer import DefaultHooks, Trainer, TrainingConfig, TrainingHooks, get_default_task_specs

RESULT_KEYS = {"metrics_summary", "best_epoch", "final_loss", "checkpoint_path", "training_time"}


class TokenModel(nn.Module):
    """The original's dummy: embeds tokens and scores the next ones."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 64)
        self.output = nn.Linear(64, 100)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **_: Any) -> dict[str, Any]:
        return {"logits": self.output(self.embedding(input_ids))}


def build_model(config: SimpleNamespace) -> nn.Module:
    return TokenModel()


def tokens(samples: int, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(*torch.randint(1, 100, (2, samples, 32), generator=generator))


def only_training(config: SimpleNamespace, training: TrainingConfig) -> dict[str, Any]:
    return {"train": tokens(16)}


def with_validation(config: SimpleNamespace, training: TrainingConfig) -> dict[str, Any]:
    return {"train": tokens(16), "val": tokens(6, seed=1)}


def nothing(config: SimpleNamespace, training: TrainingConfig) -> dict[str, Any]:
    return {"train": tokens(0)}


class FileHooks:
    """Writes each call as a line of JSON; reads nothing else than its own arguments."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def _write(self, *call: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(call) + "\n")

    def on_training_start(self) -> None:
        self._write("on_training_start")

    def on_epoch_start(self, epoch: int) -> None:
        self._write("on_epoch_start", epoch)

    def on_batch_end(self, batch_idx: int, loss: float) -> None:
        self._write("on_batch_end", batch_idx, loss)

    def on_validation_end(self, metrics: dict[str, float]) -> None:
        self._write("on_validation_end", metrics)

    def on_epoch_end(self, epoch: int, metrics: dict[str, float]) -> None:
        self._write("on_epoch_end", epoch, metrics)

    def on_training_end(self) -> None:
        self._write("on_training_end")


class InOneProcess:
    """Trains with a `Trainer` right here."""

    def __init__(self, directory: Path) -> None:
        self.run_dir = directory / "run"
        self._calls = directory / "calls.jsonl"

    def train(
        self, build_datasets: Any, task: str | None = None, resume_from: str | None = None, **changes: Any
    ) -> dict[str, Any]:
        model_config = SimpleNamespace(vocab_size=100, max_seq_len=32, pad_token_id=0)
        config = TrainingConfig(batch_size=2, tensorboard=False, checkpoint_dir=str(self.run_dir), **changes)
        spec = get_default_task_specs()[task] if task else None
        trainer = Trainer(build_model(model_config), model_config, config, spec, FileHooks(self._calls))
        datasets = build_datasets(model_config, config)
        return trainer.train(datasets["train"], datasets.get("val"), resume_from)

    def calls(self, name: str) -> list[list[Any]]:
        return [call for call in map(json.loads, self._calls.read_text().splitlines()) if call[0] == name]


@pytest.fixture
def way(tmp_path):
    return InOneProcess(tmp_path)


def new_trainer(run_dir: Path, hooks: Any = None, **changes: Any) -> Trainer:
    model_config = SimpleNamespace(
        vocab_size=100, max_seq_len=32, d_model=64, num_layers=2, num_heads=4, pad_token_id=0
    )
    config = TrainingConfig(checkpoint_dir=str(run_dir))
    for name, value in ({"batch_size": 2, "tensorboard": False} | changes).items():
        setattr(config, name, value)  # as the original's tests do
    return Trainer(build_model(model_config), model_config, config, get_default_task_specs()["lm_tiny"], hooks)


def checkpoints(run_dir: Path) -> list[Path]:
    return [path for path in run_dir.glob("checkpoint_epoch*") if path.is_dir()]


def test_new_trainer_has_all_its_parts_and_has_written_nothing(tmp_path):
    trainer = new_trainer(tmp_path / "run")

    for name in ("model", "optimizer", "checkpoint_manager", "metrics_tracker", "loss_strategy", "device"):
        assert getattr(trainer, name) is not None
    assert trainer.gradient_monitor is not None
    assert trainer.gradient_accumulator is not None
    assert isinstance(trainer.hooks, DefaultHooks)
    assert not (tmp_path / "run").exists()


def test_invalid_configuration_can_be_built_but_not_trained_with(tmp_path):
    with pytest.raises(ValueError, match="Configuration validation failed") as caught:
        new_trainer(tmp_path / "run", learning_rate=-0.001, batch_size=0)

    assert "learning_rate" in str(caught.value)
    assert "batch_size" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_hooks_are_kept_as_the_very_object_that_was_passed(tmp_path):
    hooks = FileHooks(tmp_path / "calls")

    assert new_trainer(tmp_path / "run", hooks).hooks is hooks


def test_training_runs_all_epochs_and_returns_all_results(way):
    results = way.train(only_training, task="lm_tiny", epochs=2)

    assert results.keys() >= RESULT_KEYS
    assert results["metrics_summary"]["epoch"].tolist() == [0, 1]
    assert results["final_loss"] == results["metrics_summary"]["train/loss"].iloc[-1]
    assert results["training_time"] > 0


def test_validation_fills_its_columns(way):
    summary = way.train(with_validation, task="lm_tiny", epochs=2)["metrics_summary"]

    assert {"val/loss", "val/accuracy", "val/perplexity"} <= set(summary.columns)
    assert summary["val/loss"].notna().all()


def test_checkpoints_are_saved_every_second_epoch(way):
    way.train(only_training, task="lm_tiny", epochs=6, save_every_n_epochs=2)

    assert sorted(path.name for path in checkpoints(way.run_dir)) == [
        "checkpoint_epoch0001_step00000016", "checkpoint_epoch0003_step00000032", "checkpoint_epoch0005_step00000048",
    ]  # fmt: skip


def test_run_resumed_from_its_best_checkpoint_has_the_whole_history(way):
    first = way.train(only_training, task="lm_tiny", epochs=4, save_every_n_epochs=2)

    second = way.train(
        only_training, task="lm_tiny", epochs=4, save_every_n_epochs=2, resume_from=first["checkpoint_path"]
    )

    assert second["metrics_summary"]["train/loss"].tolist() == first["metrics_summary"]["train/loss"].tolist()
    assert len(second["metrics_summary"]) == 4


def test_hooks_are_called_as_often_as_things_happen(way):
    way.train(only_training, task="lm_tiny", epochs=2)

    counts = {name: len(way.calls(name)) for name in ("on_training_start", "on_epoch_start", "on_batch_end")}
    assert counts == {"on_training_start": 1, "on_epoch_start": 2, "on_batch_end": 16}
    assert len(way.calls("on_epoch_end")) == 2
    assert len(way.calls("on_training_end")) == 1


def test_mock_of_the_protocol_serves_as_hooks(tmp_path):
    hooks = Mock(spec=TrainingHooks)

    new_trainer(tmp_path, hooks, epochs=2).train(tokens(16))

    hooks.on_training_start.assert_called_once_with()
    assert [call.args for call in hooks.on_epoch_start.call_args_list] == [(0,), (1,)]
    assert hooks.on_batch_end.call_count == 16
    assert hooks.on_epoch_end.call_count == 2
    hooks.on_training_end.assert_called_once_with()


def test_validation_hook_gets_the_metrics_with_their_prefix(way):
    way.train(with_validation, task="lm_tiny", epochs=2)

    calls = way.calls("on_validation_end")
    assert len(calls) == 2
    assert all({"val_loss", "val_accuracy"} <= set(metrics) for _, metrics in calls)


def test_model_configuration_may_lack_what_the_trainer_does_not_need(tmp_path):
    config = TrainingConfig(epochs=1, batch_size=2, tensorboard=False, checkpoint_dir=str(tmp_path))

    results = Trainer(TokenModel(), SimpleNamespace(), config).train(tokens(4))

    assert len(results["metrics_summary"]) == 1


def test_training_without_a_task_is_language_modelling(way):
    results = way.train(only_training, epochs=1)

    assert {"train/loss", "train/accuracy", "train/perplexity"} <= set(results["metrics_summary"].columns)


def test_empty_dataset_is_refused_before_anything_happens(way):
    with pytest.raises(ValueError, match="0 samples"):
        way.train(nothing, task="lm_tiny", epochs=1)

    assert not checkpoints(way.run_dir)


def test_training_without_validation_data_invents_no_validation(way):
    summary = way.train(only_training, task="lm_tiny", epochs=1)["metrics_summary"]

    assert "train/loss" in summary.columns
    assert not [name for name in summary.columns if name.startswith("val/")]


def test_whole_training_leaves_results_checkpoints_and_a_best_one(way):
    results = way.train(with_validation, task="lm_tiny", epochs=3, save_every_n_epochs=1)

    assert results.keys() >= RESULT_KEYS
    assert len(results["metrics_summary"]) == 3
    assert len(checkpoints(way.run_dir)) == 3
    assert Path(results["checkpoint_path"]) in checkpoints(way.run_dir)


def test_checkpoint_manager_of_a_trainer_finds_the_best_one(tmp_path):
    trainer = new_trainer(tmp_path, epochs=3, save_every_n_epochs=1)

    results = trainer.train(tokens(16), tokens(6, seed=1))

    best = trainer.checkpoint_manager.get_best()
    assert best.exists()
    assert str(best) == results["checkpoint_path"]
    assert f"epoch{int(results['metrics_summary']['val/loss'].idxmin()):04d}" in best.name


def test_accumulated_gradients_make_fewer_steps(way):
    results = way.train(only_training, task="lm_tiny", epochs=2, gradient_accumulation_steps=4)

    assert len(results["metrics_summary"]) == 2
    assert [path.name[-2:] for path in sorted(checkpoints(way.run_dir))] == ["02", "04"]


def test_settings_reach_the_parts_at_construction(tmp_path):
    trainer = new_trainer(
        tmp_path, learning_rate=1e-4, weight_decay=0.02, gradient_accumulation_steps=2, max_grad_norm=0.5
    )

    assert trainer.optimizer.param_groups[0]["lr"] == 1e-4
    assert trainer.optimizer.param_groups[0]["weight_decay"] == 0.02
    assert trainer.gradient_accumulator.accumulation_steps == 2
    assert trainer.gradient_accumulator.max_grad_norm == 0.5
