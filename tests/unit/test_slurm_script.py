"""The script for Slurm, with the commands of Slurm and the training replaced by scripts that do what they would do."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "cluster/slurm/train.sbatch"
SRUN = """
while [[ $1 == --* ]]; do shift; done
if [[ $1 == hostname ]]; then echo "10.0.0.1 10.0.0.2"; exit; fi
echo "$@" >"$RECORD/step"
[[ -z ${RAY_FAILS:-} ]] || exit 0
while [[ $1 != -- ]]; do shift; done
shift
"$@" # as `ray symmetric-run` on the first node: a child, whose exit code becomes its own
"""
SCONTROL = """
if [[ $1 == show ]]; then printf 'node1\\nnode2\\n'; else echo "$@" >"$RECORD/scontrol"; fi
"""
TRAINING = """
trap 'touch "$RECORD/saved"; exit 143' TERM
echo "$@" >"$RECORD/training"
[[ -n ${ENDS_WITH:-} ]] && exit "$ENDS_WITH"
for ((i = 0; i < 300; i++)); do sleep 0.1; done
"""
COMMANDS = {"srun": SRUN, "scontrol": SCONTROL, "ray-trainer": TRAINING}


@pytest.fixture
def record(tmp_path):
    (tmp_path / "bin").mkdir()
    for name, text in COMMANDS.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{text}")
        path.chmod(0o755)
    return tmp_path


def start(record: Path, *arguments: str, **variables: str) -> subprocess.Popen[bytes]:
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    environment = os.environ | slurm | {"SLURM_CPUS_PER_TASK": "4", "VENV": str(record), "RECORD": str(record)}
    return subprocess.Popen(["bash", str(SCRIPT), *arguments], env=environment | variables, stderr=subprocess.PIPE)


def told(record: Path, name: str) -> str:
    path = record / name
    return path.read_text().strip() if path.exists() else ""


def test_shellcheck_finds_nothing():
    checked = subprocess.run(
        [Path(sys.executable).with_name("shellcheck"), SCRIPT], capture_output=True, text=True, check=False
    )

    assert checked.returncode == 0, checked.stdout


def test_run_starts_on_all_nodes_and_hands_on_its_exit_code(record):
    script = start(record, "a run.yaml", "training.epochs=2", ENDS_WITH="1")

    assert script.wait(20) == 1
    assert told(record, "training") == "train a run.yaml training.epochs=2 cluster.address=10.0.0.1:24711"
    assert told(record, "step").startswith("ray symmetric-run --address=10.0.0.1:24711 --min-nodes=2 --num-cpus=4 -- ")
    assert told(record, "scontrol") == ""


def test_run_that_is_done_is_done(record):
    assert start(record, "run.yaml", ENDS_WITH="0").wait(20) == 0
    assert told(record, "scontrol") == ""


def test_job_near_its_time_limit_saves_and_goes_back_to_the_queue(record):
    script = start(record, "run.yaml")
    deadline = time.monotonic() + 20
    while not told(record, "training"):
        assert time.monotonic() < deadline
        time.sleep(0.01)

    script.send_signal(signal.SIGUSR1)

    assert script.wait(20) == 143
    assert (record / "saved").exists()
    assert told(record, "scontrol") == "requeue 4711"


def test_ray_that_did_not_start_is_a_failure_although_its_command_says_zero(record):
    script = start(record, "run.yaml", RAY_FAILS="1")

    assert script.wait(20) == 1
    assert script.stderr is not None
    assert b"Ray did not start" in script.stderr.read()


def test_script_without_a_run_file_says_how_it_is_used(record):
    assert start(record).wait(20) == 2
