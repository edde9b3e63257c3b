"""Sweeps on Ray: they end on a full machine, survive kills, and let trials take over each other."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import experiments
import pytest
import ray
import yaml
from cluster_runs import (
    OUTLIVING,
    newest_checkpoint,
    ray_of_two_cpus,
    step_of,
    tensors,
    training,
    whole_lines,
    write_run_file,
)
from experiments import POINTS, Network, Points, assert_same, events, metric_rows

from ray_trainer import Experiment, Trainer, TrainingConfig
from ray_trainer.cluster import ClusterConfig, SweepConfig, SweepResult, choice, grid, loguniform, sweep
from ray_trainer.cluster.link import open_link
from ray_trainer.cluster.sweep_job import SweepJob
from ray_trainer.cluster.trial import TrialRun
from ray_trainer.errors import ConfigError
from ray_trainer.seeding import set_random_seed

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]

for module in (sys.modules[__name__], experiments):
    ray.cloudpickle.register_pickle_by_value(module)  # processes of Ray cannot import a test

SIZE, STEPS_AN_EPOCH, KILLED_AT = 24, 6, 9
EXAMPLES = Path(__file__).parents[2] / "examples"
EVALUATE = """
import sys, numpy, torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import nn

state = load_file(sys.argv[1])
width = state["0.weight"].shape[0]
convolutions = nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()
model = nn.Sequential(*convolutions, nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(width * 16, 10)).eval()
model.load_state_dict(state)
images, labels = load_digits(return_X_y=True)
held_out = numpy.random.default_rng(0).permutation(len(labels))[:360]
guesses = model(torch.tensor(images[held_out].reshape(-1, 1, 8, 8) / 16, dtype=torch.float32)).argmax(1).numpy()
assert "ray_trainer" not in sys.modules
print((guesses == labels[held_out]).mean())
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with ray_of_two_cpus():
        yield


class KillOnce:
    """Hooks that kill their own process at a step, the first time that a run gets there."""

    def __init__(self, mark: str) -> None:
        self._mark = Path(mark)

    def on_step_end(self, record: Any) -> None:
        if record.step == KILLED_AT and not self._mark.exists():
            self._mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def build_datasets(config: SimpleNamespace, training_config: TrainingConfig) -> dict[str, Any]:
    return {"train": Points(SIZE), "val": Points(12, seed=1)}


def experiment(mark: Path | None = None) -> Experiment:
    """One that is killed once, in whichever of its runs is there first, if a mark is given."""
    return Experiment(
        build_model=lambda config: Network(dropout=config.dropout),
        build_datasets=build_datasets,
        task_spec=POINTS,
        build_hooks=None if mark is None else lambda: KillOnce(str(mark)),
    )


def settings(**changes: Any) -> TrainingConfig:
    return TrainingConfig(**({"epochs": 3, "batch_size": 4, "tensorboard": False, "keep_last_n": 50} | changes))


def search(directory: Path, name: str, config: SweepConfig, mark: Path | None = None, **changes: Any) -> SweepResult:
    cluster = ClusterConfig(name=name, storage_path=str(directory), max_failures=1)
    return sweep(experiment(mark), settings(**changes), cluster, config, {"dropout": 0.3, "copy": 0})


def test_command_given_again_after_ctrl_c_and_a_kill_repeats_no_trial_and_leaves_the_best_ready_for_use(tmp_path):
    run_file = write_run_file(
        tmp_path / "digits.yaml",
        experiment=f"{EXAMPLES / 'digits.py'}:experiment",
        model={"width": 8},
        training={"epochs": 20, "batch_size": 32, "monitor": "val_accuracy", "mode": "max", "log_every_n_steps": 1},
        cluster={"name": "digits", "storage_path": str(tmp_path)},
        sweep={"space": {"training.learning_rate": {"grid": [1e-5, 3e-3, 1e-4]}}, "scheduler": "asha"},
    )
    with training(run_file, "sweep") as stopped:
        trials = stopped.run_dir / "trials"
        stopped.until(lambda: any(map(steps_of, trials.glob("trial_*"))) or None, "the first step")
        stopped.send_to_group(signal.SIGINT)
        assert stopped.wait() == 130, stopped.output
        stopped.wait_until_nothing_is_left()
    begun = [run for run in trials.iterdir() if steps_of(run)]
    assert begun
    assert [step_of(newest_checkpoint(run)) for run in begun] == [max(steps_of(run)) for run in begun]
    assert [attempts(run) for run in begun] == [1] * len(begun)
    with training(run_file, "sweep") as killed:
        killed.until(
            lambda: (told(killed.run_dir, "sweep_resumed") and told(killed.run_dir, "trial_ended")) or None,
            "the end of a trial",
        )
        killed.send(signal.SIGKILL)
        killed.wait_until_nothing_is_left(but=OUTLIVING)
    before = told(killed.run_dir, "trial_ended")
    assert len(before) < 3
    starts = {event["trial"]: attempts(killed.run_dir / "trials" / event["trial"]) for event in before}

    with training(run_file, "sweep") as again:
        assert again.wait() == 0, again.output
        assert "Traceback" not in again.output
        assert "\x1b" not in again.output

    ended = [event["trial"] for event in told(again.run_dir, "trial_ended")]
    assert sorted(ended) == ["trial_0000", "trial_0001", "trial_0002"]
    assert ended[: len(before)] == [event["trial"] for event in before]
    assert {trial: attempts(again.run_dir / "trials" / trial) for trial in starts} == starts
    assert_best_is_ready(again.run_dir)


def assert_best_is_ready(sweep_dir: Path) -> None:
    """Its weights give the value that was told, its run file can be used, and the tables agree."""
    summary = json.loads((sweep_dir / "sweep.json").read_text())
    best = summary["trials"][0]
    weights = sweep_dir / "best.safetensors"
    run_python("-m", "ray_trainer", "export", best["checkpoint"], "--output", str(weights))
    assert summary["status"] == "finished"
    assert best["name"] == summary["best"] == "trial_0001"
    assert float(run_python("-c", EVALUATE, str(weights))) == pytest.approx(best["value"], abs=1e-6)
    checked = yaml.safe_load(run_python("-m", "ray_trainer", "config", "check", str(sweep_dir / "best_run.yaml")))
    assert checked["training"]["learning_rate"] == best["settings"]["training.learning_rate"] == 3e-3
    lines = (sweep_dir / "trials.csv").read_text().splitlines()
    assert [line.partition(",")[0] for line in lines] == ["trial", *(trial["name"] for trial in summary["trials"])]


def run_python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def told(sweep_dir: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in whole_lines(sweep_dir / "events.jsonl") if event["event"] == name]


def steps_of(run_dir: Path) -> list[int]:
    return [row["step"] for row in whole_lines(run_dir / "metrics.jsonl")]


def attempts(run_dir: Path) -> int:
    return len(events(run_dir, "workers_started"))


def test_worker_killed_inside_a_trial_leaves_the_trial_as_its_undisturbed_twin(tmp_path, cluster):
    twins = SweepConfig(space={"model.copy": grid([1, 2])})

    result = search(tmp_path, "twins", twins, mark=tmp_path / "killed", save_every_n_steps=2, learning_rate=0.02)

    runs = [Path(result.sweep_dir, "trials", f"trial_{number:04d}") for number in range(2)]
    failed = [run for run in runs if events(run, "failure")]
    assert [trial.status for trial in result.trials] == ["finished", "finished"]
    assert len(failed) == 1
    (resumed,) = events(failed[0], "resumed")
    assert 0 < resumed["step"] < KILLED_AT
    assert_same(tensors(newest_checkpoint(runs[0])), tensors(newest_checkpoint(runs[1])))
    assert_same(metric_rows(runs[0]), metric_rows(runs[1]))


def test_trial_of_a_population_goes_on_from_the_weights_of_a_better_one(tmp_path, cluster):
    """The seed draws learning rates that rank the trials: the first two learn little, those that start last much.

    So whoever of the first two is next to report takes over one of the others, whatever the machine does meanwhile.
    """
    config = SweepConfig(
        space={"training.learning_rate": loguniform(1e-5, 0.1), "model.dropout": choice([0.0, 0.3])},
        num_samples=4,
        scheduler="pbt",
        quantile_fraction=0.5,
        seed=7086,
    )

    result = search(tmp_path, "population", config, weight_decay=0.0, warmup_steps=0)

    sweep_dir = Path(result.sweep_dir)
    takeovers = told(sweep_dir, "trial_took_over")
    assert takeovers, "nobody took over anybody"
    assert all(event["settings"] != event["before"] for event in takeovers)
    assert all(event["step"] < 3 * STEPS_AN_EPOCH for event in takeovers)  # else nothing would be left to train
    assert {trial.status for trial in result.trials} == {"finished"}
    for trial in result.trials:
        assert_as_if_trained_alone(sweep_dir, trial.name)
    assert not (sweep_dir / "exchange").exists()


def assert_as_if_trained_alone(sweep_dir: Path, trial: str) -> None:
    """The same lineage again, here and without Ray: bit by bit the same end."""
    run = sweep_dir / "trials" / trial
    alone = lineage(sweep_dir, trial, attempt=10**6)
    assert not events(run, "preemption")  # told to end, it does not begin again
    assert_same(tensors(newest_checkpoint(run)), tensors(newest_checkpoint(alone)))
    assert_same(validations(run), validations(alone))


def validations(run: Path) -> list[dict[str, Any]]:
    return [row for row in metric_rows(run) if row["split"] == "val"]


def lineage(sweep_dir: Path, trial: str, attempt: int) -> Path:
    """A run that learns what a trial learned up to an attempt: by itself, or from where it took over another one."""
    taken = [event for event in events(sweep_dir / "trials" / trial, "took_over") if event["attempt"] <= attempt][-1:]
    directory = sweep_dir / "alone" / f"{trial}_{len(taken) and taken[0]['attempt']}"
    if directory.exists():
        return directory
    started = next(event for event in told(sweep_dir, "trial_started") if event["trial"] == trial)
    values, origin = started["settings"], None
    for event in taken:
        values = event["settings"]
        donor = lineage(sweep_dir, event["donor"], int(re.findall(r"/attempt(\d+)_step", event["checkpoint"])[0]))
        origin = donor / Path(event["checkpoint"]).name
        shutil.copytree(
            donor, directory, ignore=lambda place, names: {name for name in names if name != "metrics.jsonl"}
        )
    chosen = yaml.safe_load((sweep_dir / "trials" / trial / "run.yaml").read_text())["training"]
    chosen |= {"learning_rate": values["training.learning_rate"], "checkpoint_dir": str(directory)}
    set_random_seed(chosen["random_seed"])
    trainer = Trainer(
        Network(dropout=values["model.dropout"]), SimpleNamespace(), TrainingConfig.from_dict(chosen), POINTS
    )
    trainer.train(Points(SIZE), Points(12, seed=1), resume_from=origin and str(origin))
    return directory


def test_last_report_of_a_trial_comes_with_its_end_so_that_nobody_decides_about_it_any_more(tmp_path, cluster):
    job = SweepJob(
        *(experiment(), settings(), {"dropout": 0.3}, ClusterConfig(), str(tmp_path)), "val_loss", False, open_link()
    )
    training_config = settings(checkpoint_dir=str(tmp_path / "trials" / "trial_0000"))
    Trainer(Network(), SimpleNamespace(), training_config, POINTS).train(Points(SIZE), Points(12, seed=1))

    trial = TrialRun(job, "trial_0000", {"settings": {}, "history": [], "reported_step": 0})
    reports = [trial.next_report() for _ in range(3)]

    assert [(report["step"], report.get("done", False)) for report in reports] == [(6, False), (12, False), (18, True)]
    assert reports[-1]["ended"] == "finished"


def test_sweep_without_the_metric_is_refused_before_anything_is_written(tmp_path):
    config = SweepConfig(space={"model.copy": grid([1, 2])}, metric="val_f1")

    with pytest.raises(ConfigError, match=r"'val_f1'.*val_loss, val_accuracy"):
        search(tmp_path / "runs", "none", config)

    assert not (tmp_path / "runs").exists()
