"""`fit` with one and with two workers does what the original's trainer tests asked for, and continues a run."""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import experiments
import numpy as np
import pytest
import ray
import ray.data
import ray.train
import torch
import yaml
from cluster_runs import (
    assert_each_row_once,
    assert_same_run,
    newest_checkpoint,
    ray_of_two_cpus,
    tensors,
    whole_lines,
)
from experiments import POINTS, Network, Points, assert_same, checkpoints, events, metric_rows
from ray.util import placement_group, remove_placement_group
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from ray_trainer import Experiment, TrainingConfig, load_weights
from ray_trainer.chaos.processes import command_line, descendants
from ray_trainer.cluster import ClusterConfig, fit, supervisor
from ray_trainer.cluster.launch import fit_watched
from ray_trainer.cluster.storage import SNAPSHOT
from ray_trainer.errors import ConfigError
from ray_trainer.runtime import Stop

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

for module in (sys.modules[__name__], experiments):
    ray.cloudpickle.register_pickle_by_value(module)  # workers cannot import a test

SIZE, STEPS_AN_EPOCH, EPOCHS = 19, 3, 3  # of eight, eight and three samples
RESULT_KEYS = {"metrics_summary", "best_epoch", "final_loss", "checkpoint_path", "training_time"}
OF_A_RUN = ("ray::TrainController", "ray::RayTrainWorker")  # processes
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # float32 sums in another order, through nine steps of AdamW


class CallLog:
    """Hooks that write each call of each rank down."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        self._path = directory / f"rank{torch.distributed.get_rank() if torch.distributed.is_initialized() else 0}"

    def _write(self, *call: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(call) + "\n")

    def on_training_start(self) -> None:
        self._write("on_training_start")

    def on_epoch_start(self, epoch: int) -> None:
        self._write("on_epoch_start", epoch)

    def on_batch_end(self, batch_idx: int, loss: float) -> None:
        self._write("on_batch_end", batch_idx, loss)

    def on_step_end(self, record: Any) -> None:
        self._write("on_step_end", record.step, record.num_samples)

    def on_validation_end(self, metrics: dict[str, float]) -> None:
        self._write("on_validation_end", metrics)

    def on_epoch_end(self, epoch: int, metrics: dict[str, float]) -> None:
        self._write("on_epoch_end", epoch, metrics)

    def on_training_end(self) -> None:
        self._write("on_training_end")


@dataclass
class Fitted:
    """What a call of `fit` gave and left."""

    results: dict[str, Any]
    run_dir: Path
    checkpoint: ray.train.Checkpoint | None
    calls: list[list[list[Any]]]  # of each rank
    events: list[str]
    num_workers: int


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with ray_of_two_cpus():
        yield


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fit")


@pytest.fixture(scope="module")
def one(directory: Path) -> Fitted:
    return train(directory, "one", num_workers=1)


@pytest.fixture(scope="module")
def two(directory: Path) -> Fitted:
    return train(directory, "two", num_workers=2)


@pytest.fixture(params=["one", "two"])
def whole(request: pytest.FixtureRequest) -> Fitted:
    """Three epochs, on one worker with four micro-batches a step or on two with two each."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def grown(directory: Path) -> Fitted:
    """The first two of the three epochs, on two workers, with a checkpoint after each."""
    return train(directory, "grown", num_workers=2, epochs=2, save_every_n_epochs=1)


@pytest.fixture(scope="module")
def bare(directory: Path) -> Fitted:
    """A language model without task, validation and learning worth mentioning."""
    experiment = Experiment(lambda config: Tokens(), lambda config, training: {"train": sentences()})
    return train(directory, "bare", num_workers=2, experiment=experiment, epochs=1, learning_rate=1e-12)


def build_model(config: SimpleNamespace) -> nn.Module:
    return Network(dropout=config.dropout)


def map_style(config: SimpleNamespace, training: TrainingConfig) -> dict[str, Any]:
    return {"train": Points(SIZE), "val": Points(7, seed=1)}


def ray_data(config: SimpleNamespace, training: TrainingConfig) -> dict[str, Any]:
    def rows(points: Points) -> list[dict[str, Any]]:
        return [{name: np.asarray(value) for name, value in points[i].items()} for i in range(len(points))]

    sources = map_style(config, training)
    return {name: ray.data.from_items(rows(points), override_num_blocks=3) for name, points in sources.items()}


class Tokens(nn.Module):
    """Scores the next token by the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 20))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.layers(input_ids)


def sentences() -> TensorDataset:
    ids = torch.randint(0, 20, (7, 12), generator=torch.Generator().manual_seed(0))
    return TensorDataset(ids, ids)


def train(
    directory: Path,
    name: str,
    num_workers: int,
    build_datasets: Any = map_style,
    experiment: Experiment | None = None,
    **changes: Any,
) -> Fitted:
    """Call `fit`; steps of eight samples, whatever the number of workers."""
    calls = directory / f"{name} calls"
    shutil.rmtree(calls, ignore_errors=True)
    settings = {
        "epochs": EPOCHS,
        "batch_size": 2,
        "gradient_accumulation_steps": 4 // num_workers,
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0,
        "save_every_n_epochs": 2,
        "log_every_n_steps": 1,
    }
    result = fit(
        experiment or Experiment(build_model, build_datasets, POINTS, build_hooks=partial(CallLog, calls)),
        TrainingConfig(**(settings | changes)),
        ClusterConfig(num_workers=num_workers, name=name, storage_path=str(directory)),
        model_config={"dropout": 0.0},
    )
    run_dir = directory / name
    assert result.run_dir == str(run_dir)
    return Fitted(
        results=result.results,
        run_dir=run_dir,
        checkpoint=result.checkpoint,
        calls=[whole_lines(path) for path in sorted(calls.glob("rank*"))],
        events=[event["event"] for event in whole_lines(run_dir / "events.jsonl")],
        num_workers=num_workers,
    )


def loss_and_accuracy(weights: Path, points: Points) -> tuple[float, float]:
    """Computed by hand."""
    model = Network(dropout=0.0)
    model.load_state_dict(load_file(weights))  # strict: the model's own names
    with torch.no_grad():
        logits = model.eval()(points.features)
    hits = logits.argmax(-1) == points.labels
    return float(F.cross_entropy(logits, points.labels)), float(hits.double().mean())


def names(calls: list[list[Any]]) -> list[str]:
    return [call[0] for call in calls]


def without_times(fitted: Fitted) -> dict[str, Any]:
    results = {name: fitted.results[name] for name in ("best_epoch", "final_loss")}
    return results | {"history": fitted.results["metrics_summary"].drop(columns="epoch_duration").to_dict("records")}


def test_run_has_all_epochs_and_all_results(whole):
    results = whole.results

    assert results.keys() >= RESULT_KEYS
    assert results["metrics_summary"]["epoch"].tolist() == [0, 1, 2]
    assert results["final_loss"] == results["metrics_summary"]["train/loss"].iloc[-1]
    assert results["training_time"] > 0


def test_validation_fills_its_columns(whole):
    summary = whole.results["metrics_summary"]

    assert summary[["val/loss", "val/accuracy"]].notna().all(axis=None)
    assert summary[["learning_rate"]].eq(0.02).all(axis=None)


def test_checkpoints_are_saved_every_second_epoch_and_at_the_end(whole):
    assert checkpoints(whole.run_dir) == ["checkpoint_epoch0001_step00000006", "checkpoint_epoch0002_step00000009"]


def test_run_leaves_what_it_promises(whole):
    left = {path.name for path in whole.run_dir.iterdir()}
    described = yaml.safe_load((whole.run_dir / "run.yaml").read_text())

    assert left >= {"run.yaml", "environment.json", "events.jsonl", "metrics.jsonl", "tensorboard"}
    assert described["model"] == {"dropout": 0.0}
    assert described["cluster"]["num_workers"] == whole.num_workers
    assert described["training"]["learning_rate"] == 0.02


def test_events_stand_in_the_order_in_which_they_happened(whole):
    assert whole.events == [
        "run_started", "workers_started", "checkpoint_saved", "checkpoint_saved", "run_finished",
    ]  # fmt: skip


def test_each_step_and_validation_has_one_row_of_metrics(whole):
    rows = metric_rows(whole.run_dir)

    assert [row["step"] for row in rows if row["split"] == "train"] == list(range(1, 10))
    assert [row["step"] for row in rows if row["split"] == "val"] == [3, 6, 9]
    assert_each_row_once(whole.run_dir)


def test_checkpoint_of_the_result_is_the_best_and_loads_into_the_model(whole):
    assert isinstance(whole.checkpoint, ray.train.Checkpoint)
    losses = whole.results["metrics_summary"]["val/loss"]
    best_saved = losses.iloc[[1, 2]].idxmin()  # the first epoch was not saved

    with whole.checkpoint.as_directory() as path:
        loss, accuracy = loss_and_accuracy(Path(path) / "model.safetensors", Points(7, seed=1))

    assert whole.checkpoint.path == whole.results["checkpoint_path"]
    assert loss == pytest.approx(losses[best_saved], rel=1e-5)  # float32, another order of samples
    assert accuracy == whole.results["metrics_summary"]["val/accuracy"][best_saved]


def test_best_epoch_is_that_of_the_lowest_validation_loss(whole):
    assert whole.results["best_epoch"] == whole.results["metrics_summary"]["val/loss"].idxmin()


def test_validation_is_the_mean_over_the_samples_of_all_workers(whole):
    loss, accuracy = loss_and_accuracy(newest_checkpoint(whole.run_dir) / "model.safetensors", Points(7, seed=1))
    last = metric_rows(whole.run_dir)[-1]

    assert last["split"] == "val"
    assert last["loss"] == pytest.approx(loss, rel=1e-5)  # float32, another order of samples
    assert last["accuracy"] == accuracy


def test_hooks_are_called_in_order_on_every_worker(whole):
    assert len(whole.calls) == whole.num_workers
    for calls in whole.calls:
        called = [name for name in names(calls) if name not in ("on_batch_end", "on_step_end")]
        epoch = ["on_epoch_start", "on_validation_end", "on_epoch_end"]
        assert called == ["on_training_start", *epoch * EPOCHS, "on_training_end"]
        assert [call[1] for call in calls if call[0] == "on_epoch_start"] == [0, 1, 2]
        assert [call[1] for call in calls if call[0] == "on_step_end"] == list(range(1, 10))


def test_batches_are_counted_anew_in_each_epoch(whole):
    for calls in whole.calls:
        first_epoch = calls[: names(calls).index("on_validation_end")]
        batches = [call[1] for call in first_epoch if call[0] == "on_batch_end"]
        assert batches[0] == 0
        assert batches == sorted(set(batches))
        assert [call[1] for call in calls if call[0] == "on_batch_end"] == batches * EPOCHS


def test_every_sample_is_used_once_an_epoch(whole):
    sizes = [call[2] for call in whole.calls[0] if call[0] == "on_step_end"]

    assert sizes == [8, 8, 3] * EPOCHS


def test_metrics_of_hooks_carry_prefixes_and_are_equal_on_all_workers(whole):
    of_ranks = [
        [call[1:] for call in calls if call[0] in ("on_validation_end", "on_epoch_end")] for calls in whole.calls
    ]
    validation, epoch_end = of_ranks[0][:2]

    assert {"val_loss", "val_accuracy"} <= set(validation[0])
    assert {"train_loss", "train_accuracy", "val_loss", "loss", "accuracy"} <= set(epoch_end[1])
    assert epoch_end[1]["loss"] == epoch_end[1]["train_loss"]
    assert all(of_rank == of_ranks[0] for of_rank in of_ranks)


def test_one_worker_with_four_micro_batches_equals_two_workers_with_two(one, two):
    assert_close(newest_checkpoint(one.run_dir), newest_checkpoint(two.run_dir))
    for row, other in zip(metric_rows(one.run_dir), metric_rows(two.run_dir), strict=True):
        assert (row.pop("split"), row.pop("accuracy")) == (other.pop("split"), other.pop("accuracy"))
        assert row == pytest.approx(other, rel=1e-5)


def assert_close(checkpoint: Path, other: Path) -> None:
    weights, others = (load_file(path / "model.safetensors") for path in (checkpoint, other))
    assert weights.keys() == others.keys()
    for name in weights:
        torch.testing.assert_close(weights[name], others[name], **CLOSE)


def test_finished_run_started_again_does_nothing_and_returns_its_results(whole, directory):
    rows, left = metric_rows(whole.run_dir), checkpoints(whole.run_dir)

    again = train(directory, whole.run_dir.name, whole.num_workers)

    assert without_times(again) == without_times(whole)
    assert again.results["checkpoint_path"] == whole.results["checkpoint_path"]
    assert again.results["training_time"] == whole.results["training_time"]
    assert all(names(calls) == ["on_training_start", "on_training_end"] for calls in again.calls)
    assert metric_rows(whole.run_dir) == rows
    assert checkpoints(whole.run_dir) == left


def test_run_of_the_same_name_with_more_epochs_goes_on_as_if_it_had_had_them_from_the_start(grown, two, directory):
    shutil.copytree(grown.run_dir, directory / "continued")

    continued = train(directory, "continued", num_workers=2)

    assert [event["step"] for event in events(continued.run_dir, "resumed")] == [6]
    assert [call[1] for call in continued.calls[0] if call[0] == "on_epoch_start"] == [2]
    assert without_times(continued) == without_times(two)
    assert_same_run(two.run_dir, continued.run_dir)


def test_run_continues_over_a_torn_list_of_rays_and_without_an_old_checkpoint(grown, two, directory):
    run_dir = directory / "damaged"
    shutil.copytree(grown.run_dir, run_dir)
    old, newest = checkpoints(run_dir)
    listed = (run_dir / SNAPSHOT).read_text()
    assert old in listed  # Ray would not start without it, nor with a list that is torn
    torn = listed[: listed.index(newest)]
    (run_dir / SNAPSHOT).write_text(torn)
    shutil.rmtree(run_dir / old)

    damaged = train(directory, "damaged", num_workers=2)

    assert [event["step"] for event in events(run_dir, "resumed")] == [6]
    assert events(run_dir, "failure") == []
    assert len(events(run_dir, "workers_started")) == 2  # one of them before the damage
    assert without_times(damaged) == without_times(two)
    assert_same_run(two.run_dir, run_dir)
    assert (run_dir / f"{SNAPSHOT}.broken").read_text() == torn


def test_run_continued_by_fewer_workers_keeps_its_global_batch(grown, two, directory):
    shutil.copytree(grown.run_dir, directory / "shrunk")

    shrunk = train(directory, "shrunk", num_workers=1, gradient_accumulation_steps=1)

    assert [event["num_workers"] for event in events(shrunk.run_dir, "workers_started")] == [2, 1]
    assert [call[1:] for call in shrunk.calls[0] if call[0] == "on_step_end"] == [[7, 8], [8, 8], [9, 3]]
    assert shrunk.results["metrics_summary"]["epoch"].tolist() == [0, 1, 2]
    assert_close(newest_checkpoint(shrunk.run_dir), newest_checkpoint(two.run_dir))


def test_run_continued_with_a_sharded_model_learns_the_same(grown, two, directory):
    shutil.copytree(grown.run_dir, directory / "sharded")

    sharded = train(directory, "sharded", num_workers=2, parallelism="fsdp")

    written = newest_checkpoint(sharded.run_dir)
    assert [event["step"] for event in events(sharded.run_dir, "resumed")] == [6]
    assert {"model.shard00000.safetensors", "model.shard00001.safetensors"} <= {path.name for path in written.iterdir()}
    torch.testing.assert_close(load_weights(written), load_weights(newest_checkpoint(two.run_dir)), **CLOSE)
    assert metric_rows(sharded.run_dir)[-1]["loss"] == pytest.approx(metric_rows(two.run_dir)[-1]["loss"], rel=1e-5)


def test_ray_dataset_is_trained_on_as_the_same_samples_from_a_list(grown, directory):
    streamed = train(directory, "ray data", num_workers=2, build_datasets=ray_data, epochs=2)

    assert_same(tensors(newest_checkpoint(streamed.run_dir)), tensors(newest_checkpoint(grown.run_dir)))
    assert_same(metric_rows(streamed.run_dir), metric_rows(grown.run_dir))


def test_training_without_a_task_is_language_modelling(bare):
    model = Tokens()
    model.load_state_dict(load_file(newest_checkpoint(bare.run_dir) / "model.safetensors"))
    ids, labels = sentences().tensors
    with torch.no_grad():
        logits = model(ids)[:, :-1].flatten(0, 1)
    summary = bare.results["metrics_summary"].iloc[0]

    loss = float(F.cross_entropy(logits, labels[:, 1:].flatten()))
    assert summary["train/loss"] == pytest.approx(loss, rel=1e-5)  # weights move by 1e-12 a step
    assert summary["train/perplexity"] == pytest.approx(np.exp(loss), rel=1e-4)
    assert summary["train/accuracy"] == float((logits.argmax(-1) == labels[:, 1:].flatten()).double().mean())


def test_training_without_validation_invents_none(bare):
    assert not [name for name in bare.results["metrics_summary"].columns if name.startswith("val/")]
    assert {row["split"] for row in metric_rows(bare.run_dir)} == {"train"}


def test_wrong_configuration_is_refused_with_all_errors_before_anything_is_written(tmp_path):
    experiment = Experiment(build_model, map_style, POINTS)
    training = TrainingConfig(learning_rate=-0.001, batch_size=0)

    with pytest.raises(ConfigError, match="Configuration validation failed") as caught:
        fit(experiment, training, ClusterConfig(num_workers=0, storage_path=str(tmp_path)))

    assert all(name in str(caught.value) for name in ("learning_rate", "batch_size", "num_workers"))
    assert list(tmp_path.iterdir()) == []


class Impatient:
    """Watches a run, and wants it to end as soon as it is told that it waits."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def wish(self) -> Stop:
        return Stop.SIGTERM if self.told else Stop.NONE

    def see(self, progress: Mapping[str, Any], events: list[dict[str, Any]]) -> None:
        self.told += [event["reason"] for event in events if event["event"] == "waiting_for_room"]


@pytest.mark.parametrize("num_workers", [2, (1, 2)])
def test_run_that_waits_for_room_says_so_and_can_be_stopped_and_leaves_nothing(num_workers, tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "_STARTS_WITHIN_S", 5.0)
    experiment = Experiment(build_model, map_style, POINTS)
    cluster = ClusterConfig(num_workers=num_workers, name="run", storage_path=str(tmp_path))
    taken = placement_group([{"CPU": 2}])
    ray.get(taken.ready(), timeout=60)
    watch = Impatient()

    with pytest.raises(SystemExit) as ended:
        fit_watched(experiment, TrainingConfig(), cluster, {"dropout": 0.0}, nullcontext(watch))

    remove_placement_group(taken)
    assert ended.value.code == 143
    assert len(watch.told) == 1
    assert "no room for all workers" in watch.told[0]
    assert not (tmp_path / "run").exists()
    free = placement_group([{"CPU": 2}])
    ray.get(free.ready(), timeout=60)  # nothing of the run has come into the place of what was taken
    remove_placement_group(free)
    while any(command_line(pid).startswith(OF_A_RUN) for pid in descendants(os.getpid())):
        time.sleep(0.1)  # until the limit of the test, where they stay
