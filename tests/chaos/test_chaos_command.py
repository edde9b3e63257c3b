"""`ray-trainer chaos`: on a real experiment it strikes as it says, finds the runs equal, and leaves nothing behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import slow_points
from cluster_runs import assert_same_run, short_directory, write_run_file
from experiments import events

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(900)]


def test_run_that_loses_more_than_it_may_fail_is_found_equal_to_a_clean_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_file = write_run_file(
        tmp_path / "run.yaml",
        experiment=f"{slow_points.__file__}:experiment",
        training={"max_steps": 150, "batch_size": 4, "save_every_n_steps": 20, "tensorboard": False},
        cluster={"num_workers": 2, "name": "points", "storage_path": str(tmp_path / "runs"), "max_failures": 1},
    )
    options = ["--json", "--kinds", "controller,checkpoint", "--faults", "3", "--seed", "4"]
    with short_directory() as temp_dir:
        monkeypatch.setenv("RAY_TMPDIR", temp_dir)
        done = subprocess.run(
            [sys.executable, "-m", "ray_trainer", "chaos", str(run_file), *options],
            capture_output=True,
            text=True,
            check=False,
        )

    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["equal"]
    assert report["proven"]
    assert sorted(fault["kind"] for fault in report["faults"]) == ["checkpoint", "controller", "controller"]
    assert all("is gone; event controller_lost" in f["proof"] for f in report["faults"] if f["kind"] == "controller")
    assert all("event checkpoint_rejected" in f["proof"] for f in report["faults"] if f["kind"] == "checkpoint")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["points-chaos"]  # the run itself is not touched
    clean, struck = (tmp_path / "runs" / "points-chaos" / name for name in ("clean", "faults"))
    assert events(clean, "resumed") == []
    assert len(events(struck, "controller_lost")) == 2
    (damage,) = [fault["proof"] for fault in report["faults"] if fault["kind"] == "checkpoint"]
    altered = [event for event in events(struck, "checkpoint_rejected") if "was altered" in event["reason"]]
    assert [f" of {event['checkpoint']} is damaged" in damage for event in altered] == [True]  # others may be late ones
    assert_same_run(clean, struck)  # by other means than the command's own
