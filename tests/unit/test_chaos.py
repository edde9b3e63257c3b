"""Faults are drawn alike from the same seed, and two runs are held against each other to the bit."""

import json
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from experiments import carry_out, checkpoints, prepare, run

from ray_trainer.chaos import KINDS, Comparison, Fault, Verdict, compare_runs
from ray_trainer.chaos.comparison import _same_bits
from ray_trainer.chaos.faults import Course, draw_faults
from ray_trainer.chaos.processes import end, identity, is_alive, is_stopped, kill
from ray_trainer.chaos.strikes import Strike
from ray_trainer.cli import main
from ray_trainer.errors import CheckpointCorruptError, ConfigError
from ray_trainer.storage import Storage

COURSE = Course(last_step=100, num_workers=2, step_s=0.1, two_checkpoints_at=40)
ALL = list(KINDS)


def test_same_seed_draws_the_same_faults_and_another_one_others():
    assert draw_faults(ALL, 9, 3, COURSE) == draw_faults(ALL, 9, 3, COURSE)
    assert draw_faults(ALL, 9, 3, COURSE) != draw_faults(ALL, 9, 4, COURSE)


@pytest.mark.parametrize("seed", range(20))
def test_faults_are_of_every_kind_before_one_comes_again_and_strike_while_the_run_lasts(seed):
    faults = draw_faults(ALL, 2 * len(KINDS), seed, COURSE)

    assert set(Counter(fault.kind for fault in faults).values()) == {2}
    assert [fault.step for fault in faults] == sorted(fault.step for fault in faults)
    assert all(1 <= fault.step <= 90 and fault.rank in (0, 1) and 0 <= fault.part < 1 for fault in faults)
    assert all(fault.step >= 40 for fault in faults if fault.kind == "checkpoint")


def test_more_faults_than_steps_are_refused():
    with pytest.raises(ConfigError, match="only 10 steps, too few for so many faults"):
        draw_faults(ALL, 10, 0, Course(last_step=10, num_workers=1, step_s=1.0, two_checkpoints_at=None))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    run(directory)
    return directory


def compared(one: Path, other: Path) -> Comparison:
    return compare_runs(Storage.open(one), Storage.open(other))


def test_run_that_was_interrupted_is_equal_to_a_whole_one(whole, tmp_path):
    prepared = prepare(tmp_path, save_every_n_steps=2)
    prepared.diary.act("on_step_end", 5, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        carry_out(prepared)
    run(tmp_path)

    comparison = compared(whole, tmp_path)

    assert comparison.differences == ()
    assert comparison.is_equal
    assert comparison.num_tensors > 8
    assert comparison.num_rows == len((whole / "metrics.jsonl").read_text().splitlines())


def test_experiment_that_is_not_deterministic_differs_and_the_first_step_is_named(whole, tmp_path):
    prepared = prepare(tmp_path)
    chance = random.SystemRandom()

    def disturb(training: bool) -> None:
        with torch.no_grad():
            prepared.model.layers[0].weight += chance.uniform(0.001, 0.002)

    prepared.model.on_forward = disturb
    carry_out(prepared)

    comparison = compared(whole, tmp_path)

    assert not comparison.is_equal
    assert comparison.first_step == 2  # the first one that is logged
    assert comparison.differences[0].startswith("train loss of step 2 is ")
    assert any("model.layers.0.weight of the state after step 10" in text for text in comparison.differences)


def copy(whole: Path, directory: Path) -> tuple[Path, Path]:
    """A run, and its newest checkpoint."""
    shutil.copytree(whole, directory / "copy")
    return directory / "copy", directory / "copy" / checkpoints(whole)[-1]


def test_row_that_stands_twice_is_a_difference(whole, tmp_path):
    other, _ = copy(whole, tmp_path)
    first = (other / "metrics.jsonl").read_text().splitlines()[0]
    with (other / "metrics.jsonl").open("a") as file:
        file.write(f"{first}\n")

    assert compared(whole, other).differences == ("train metrics of step 2 stand 1 and 2 times",)


def test_run_that_ended_earlier_differs_in_its_last_step(whole, tmp_path):
    other, newest = copy(whole, tmp_path)
    shutil.rmtree(newest)

    assert compared(whole, other).differences == ("the newest checkpoint is of step 10 and of step 5",)


def test_checkpoint_that_was_tampered_with_is_not_compared(whole, tmp_path):
    other, newest = copy(whole, tmp_path)
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "model.safetensors").write_bytes(content)

    with pytest.raises(CheckpointCorruptError):
        compared(whole, other)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (torch.tensor(0.0), torch.tensor(-0.0), False),
        (torch.tensor(float("nan")), torch.tensor(float("nan")), True),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64), False),
        (torch.tensor([1.0]), torch.tensor([[1.0]]), False),
        (torch.tensor([True]), torch.tensor([True]), True),
        (torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0], dtype=torch.bfloat16), True),
        (float("nan"), float("nan"), True),
        (1, True, False),
    ],
)
def test_values_are_compared_to_the_bit(one, other, same):
    assert _same_bits(one, other) is same


def verdict(first_step: int | None, missed: bool = False) -> Verdict:
    fault = Fault("worker", 5, 0.0, 1)
    differences = () if first_step is None else ("a difference",)
    return Verdict(
        clean_steps=10,
        clean_s=1.0,
        strikes=(Strike(fault, 5, "gone", "came back", 2, 1.0),),
        missed=(fault,) if missed else (),
        comparison=Comparison(8, 10, differences, first_step),
    )


def test_verdict_holds_only_if_all_is_equal_and_every_fault_happened():
    assert verdict(None).is_proven
    assert not verdict(None, missed=True).is_proven
    assert not verdict(7).is_proven


def test_difference_in_steps_that_no_fault_touched_is_put_down_to_the_experiment():
    assert verdict(first_step=3).differs_before_faults  # the run went back to step 3
    assert not verdict(first_step=4).differs_before_faults
    assert not verdict(None).differs_before_faults


def test_process_is_seen_to_run_to_stop_and_to_end():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = identity(child.pid)
    assert is_alive(process)
    assert not is_stopped(process)

    child.send_signal(signal.SIGSTOP)
    child.send_signal(0)
    while not is_stopped(process):
        pass
    kill(child.pid)
    end({process})

    assert not is_alive(process)
    assert child.wait() == -signal.SIGKILL


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    (tmp_path / "points.py").write_text(
        "from ray_trainer import Experiment\n"
        "experiment = Experiment(build_model=lambda config: None, build_datasets=lambda config, training: {})\n"
    )
    path = tmp_path / "points.yaml"
    path.write_text(f"experiment: points.py:experiment\ncluster: {{storage_path: {tmp_path}/runs}}\n")
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cluster.address=auto"], "Add cluster.address=null"),
        (["training.max_time=10"], "never the same twice"),
        (["training.fast_dev_run=true"], "saves nothing"),
        (["--faults", "0"], "--faults = 0: at least 1"),
        (["--kinds", "worker,flood"], "there is no kind 'flood'; there are worker, workers, stop"),
        (["--kinds", "stop", "cluster.hang_floor_s=null"], "cluster.hang_floor_s is null"),
    ],
)
def test_trial_that_cannot_be_fair_is_refused_and_writes_nothing(run_file, capsys, arguments, message):
    assert main(["chaos", str(run_file), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (run_file.parent / "runs").exists()


def test_directory_of_something_else_is_left_alone(run_file, capsys):
    treasure = run_file.parent / "runs" / "points-chaos" / "treasure"
    treasure.mkdir(parents=True)

    assert main(["chaos", str(run_file)]) == 2
    assert "holds 'treasure', so it is not from this command" in capsys.readouterr().err
    assert [path.name for path in treasure.parent.iterdir()] == ["treasure"]


def test_dry_run_shows_the_run_and_the_kinds_and_starts_nothing(run_file, capsys):
    assert main(["chaos", str(run_file), "--dry-run", "--faults", "3", "cluster.hang_floor_s=null"]) == 0
    out = capsys.readouterr().out
    assert "name: points-chaos" in out
    assert out.rstrip().endswith(
        "# 3 faults of the kinds worker, workers, controller, driver, terminate, checkpoint, drawn with the seed 0"
    )
    assert not (run_file.parent / "runs").exists()


def test_strike_travels_to_scripts_as_plain_values():
    (strike,) = verdict(None).strikes
    assert json.loads(json.dumps(strike.to_dict()))["steps_repeated"] == 2
