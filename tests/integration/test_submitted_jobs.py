"""The digits example as a Ray job on a head of its own: stopped, continued, and watched through Prometheus."""

import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster_runs import assert_same_run, newest_checkpoint, step_of, whole_lines
from experiments import events
from job_clients import PATIENCE_S, Client, until
from ray_head import RayHead, ray_head

from ray_trainer.cluster.telemetry import METRICS

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

STEPS = 900  # 90 an epoch: 1,437 images, 16 a step


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with ray_head() as running:
        yield running


def overrides(directory: Path, name: str) -> list[str]:
    """The example on one worker, so that two runs fit on two CPUs; logged at each step."""
    return [
        *("cluster.num_workers=1", f"cluster.storage_path={directory}", f"cluster.name={name}"),
        *("training.epochs=10", "training.log_every_n_steps=1", "training.save_every_n_steps=40"),
    ]


def submit(*options: str) -> list[str]:
    return ["ray_trainer", "submit", "examples/digits.yaml", "--python", sys.executable, *options]


def steps_of(run_dir: Path) -> list[int]:
    return [row["step"] for row in whole_lines(run_dir / "metrics.jsonl")]


def reached(run_dir: Path, step: int) -> Callable[[], int | None]:
    return lambda: max(steps_of(run_dir), default=0) >= step or None


def exported(text: str, run: str) -> dict[str, float]:
    """Our metrics of one run, as Prometheus reads them."""
    found = re.findall(rf'^ray_(trainer_\w+){{[^}}]*run="{run}"[^}}]*}} (\S+)$', text, re.MULTILINE)
    return {name: float(value) for name, value in found}


def test_job_stopped_by_ray_and_submitted_again_ends_as_the_undisturbed_one(head, tmp_path):
    whole, run_dir = tmp_path / "whole", tmp_path / "stopped"
    undisturbed = Client(head, tmp_path / "whole.log", *submit("--no-wait", *overrides(tmp_path, "whole")))
    assert undisturbed.wait() == 0, undisturbed.output
    assert "Job whole is submitted" in undisturbed.output

    # as plain Ray does it: 3 s from SIGTERM to SIGKILL
    command = ["--", sys.executable, "-m", "ray_trainer", "train", "examples/digits.yaml"]
    job = ["job", "submit", "--submission-id", "stopped", "--working-dir", ".", *command]
    first = Client(head, tmp_path / "1.log", "ray.scripts.scripts", *job, *overrides(tmp_path, "stopped"))
    first.until(reached(run_dir, 50), "step 50")
    head.stop_job("stopped")
    assert first.wait() == 0, first.output  # Ray's own client takes a stopped job for a good end
    stopped_at = step_of(newest_checkpoint(run_dir))
    assert STEPS > stopped_at == max(steps_of(run_dir)) >= 50

    second = Client(head, tmp_path / "2.log", *submit("--name", "stopped", *overrides(tmp_path, "stopped")))
    assert second.wait() == 0, second.output
    assert "Job stopped-2 is submitted" in second.output  # Ray takes no id twice
    assert "\x1b" not in second.output
    assert [event["step"] for event in events(run_dir, "resumed")] == [stopped_at]
    until(lambda: events(whole, "run_finished") or None, "the undisturbed run")
    assert step_of(newest_checkpoint(run_dir)) == STEPS
    assert_same_run(whole, run_dir)


def test_same_command_while_a_job_runs_follows_it_and_operators_see_its_metrics(head, tmp_path):
    settings = [*overrides(tmp_path, "watched"), "training.epochs=200"]
    first = Client(head, tmp_path / "1.log", *submit(*settings))
    run_dir = tmp_path / "watched"
    first.until(reached(run_dir, 100), "step 100")

    def all_metrics() -> dict[str, float] | None:
        values = exported(head.metrics(), "watched")
        return values if values.keys() == METRICS.keys() else None

    values = first.until(all_metrics, "all metrics")
    saved = {event["step"]: event for event in events(run_dir, "checkpoint_saved")}
    rows = {row["step"]: row for row in whole_lines(run_dir / "metrics.jsonl") if row["split"] == "train"}
    assert values["trainer_loss"] in {row["loss"] for row in rows.values()}
    assert values["trainer_samples_per_second"] in {row["samples_per_s"] for row in rows.values()}
    assert values["trainer_checkpoint_stall_seconds"] in {event["stall_s"] for event in saved.values()}
    assert (values["trainer_num_workers"], values["trainer_restarts"], values["trainer_failures"]) == (1, 0, 0)
    assert 0 < values["trainer_goodput_ratio"] <= 1
    assert 0 <= values["trainer_checkpoint_age_seconds"] < PATIENCE_S

    other = Client(head, tmp_path / "2.log", *submit(*settings, "training.learning_rate=0.1"))
    assert other.wait() == 2, other.output
    assert "writes to the same run" in other.output

    second = Client(head, tmp_path / "3.log", *submit(*settings))
    second.until(lambda: "runs already" in second.output or None, "the same job")
    first.process.send_signal(signal.SIGINT)
    assert first.wait() == 130, first.output
    assert second.wait() == 143, second.output  # to this one the job was stopped by somebody else
    assert len(events(run_dir, "workers_started")) == 1
    assert step_of(newest_checkpoint(run_dir)) == max(steps_of(run_dir))
