"""`checkpoints` and `status` on what real runs have left."""

import json
import shutil
import time
from pathlib import Path

import experiments
import pytest

from ray_trainer.checkpoint.catalog import open_storage
from ray_trainer.cli import main
from ray_trainer.cli.status import run_status
from ray_trainer.metrics import EventLog, next_attempt
from ray_trainer.storage import Storage


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "a"
    experiments.run(run_dir)
    return run_dir


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "a")
    return tmp_path / "a"


def content(directory: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(arguments)
    return code, capsys.readouterr().out


def test_list_marks_the_best_and_the_newest(run_dir, capsys):
    code, text = call(capsys, "checkpoints", "list", str(run_dir), "--json")
    rows = json.loads(text)

    assert code == 0
    assert [row["name"] for row in rows] == experiments.checkpoints(run_dir)
    assert [row["is_newest"] for row in rows] == [False] * (len(rows) - 1) + [True]
    losses = [row["metrics"]["val_loss"] for row in rows]
    assert [row["is_best"] for row in rows] == [loss == min(losses) for loss in losses]
    assert all(row["size_bytes"] == sum_of_files(run_dir / row["name"]) for row in rows)


def sum_of_files(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in checkpoint.iterdir() if path.name != "manifest.json")


def test_list_in_a_pipe_is_plain_aligned_text(run_dir, capsys):
    code, text = call(capsys, "checkpoints", "list", str(run_dir))

    lines = text.splitlines()
    assert code == 0
    assert len(lines) == 1 + len(experiments.checkpoints(run_dir))
    assert "\x1b" not in text
    assert lines[-1].endswith("newest")
    assert len({line.index("val_loss") + len("val_loss") for line in lines[1:]}) == 1


def test_verify_of_a_whole_run_touches_nothing(run_dir, capsys):
    before = content(run_dir)

    code, text = call(capsys, "checkpoints", "verify", str(run_dir))

    assert code == 0
    assert text.count("whole") == len(experiments.checkpoints(run_dir))
    assert content(run_dir) == before


@pytest.mark.parametrize("file", ["model.safetensors", "trainer.json", "manifest.json"])
def test_verify_finds_one_altered_byte_and_names_the_file(run_dir, capsys, file):
    name = experiments.checkpoints(run_dir)[0]
    path = run_dir / name / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    before = content(run_dir)

    code, text = call(capsys, "checkpoints", "verify", str(run_dir), "--json")

    rows = {row["name"]: row for row in json.loads(text)}
    assert code == 1
    assert file in rows[name]["problems"][0]
    assert [row["name"] for row in rows.values() if not row["is_whole"]] == [name]
    assert content(run_dir) == before


def test_verify_takes_a_single_checkpoint_and_a_uri(run_dir, capsys):
    first, last = experiments.checkpoints(run_dir)[0], experiments.checkpoints(run_dir)[-1]
    (run_dir / first / "optimizer.safetensors").unlink()

    assert call(capsys, "checkpoints", "verify", str(run_dir / last))[0] == 0
    code, text = call(capsys, "checkpoints", "verify", f"file://{run_dir / first}/")
    assert code == 1
    assert "optimizer.safetensors is missing" in text


def test_list_shows_a_checkpoint_that_is_not_whole_with_the_reason(run_dir, capsys):
    name = experiments.checkpoints(run_dir)[0]
    (run_dir / name / "manifest.json").unlink()

    code, text = call(capsys, "checkpoints", "list", str(run_dir))

    assert code == 0
    assert "broken: manifest.json is missing" in next(line for line in text.splitlines() if line.startswith(name))


@pytest.mark.parametrize("command", [("checkpoints", "list"), ("checkpoints", "verify"), ("status",)])
def test_place_without_a_run_is_wrong_usage(tmp_path, capsys, command):
    assert call(capsys, *command, str(tmp_path / "absent"))[0] == 2
    assert call(capsys, *command, str(tmp_path))[0] == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command", [("checkpoints", "list"), ("checkpoints", "verify"), ("status",), ("report",), ("export", "--output=x")]
)
def test_directory_of_a_sweep_is_no_run_and_its_best_trial_is_named(tmp_path, capsys, command):
    (tmp_path / "sweep.json").write_text('{"best": "trial_0007"}')

    assert main([*command, str(tmp_path)]) == 2
    assert f"{tmp_path}/trials/trial_0007" in capsys.readouterr().err


def test_status_of_a_finished_run_agrees_with_its_files(run_dir, capsys):
    code, text = call(capsys, "status", str(run_dir), "--json")
    status = json.loads(text)

    assert code == 0
    assert (status["state"], status["step"], status["epochs"], status["attempts"]) == ("finished", 10, 2, 1)
    assert status["newest_checkpoint"] == experiments.checkpoints(run_dir)[-1]
    rows = [row for row in experiments.metric_rows(run_dir) if row["split"] == "val"]
    assert status["val"]["loss"] == rows[-1]["loss"]
    assert 0 < status["goodput"]["ratio"] <= 1


def test_status_tells_a_run_that_trains_from_one_that_is_silent_and_from_one_that_fails(run_dir):
    lines = (run_dir / "events.jsonl").read_text().splitlines()
    (run_dir / "events.jsonl").write_text("\n".join(line for line in lines if "run_finished" not in line) + "\n")
    seen_at = run_status(open_storage(run_dir), time.time())["last_seen"]

    assert run_status(open_storage(run_dir), seen_at + 5)["state"] == "training"
    assert run_status(open_storage(run_dir), seen_at + 5)["silent_s"] == pytest.approx(5)
    assert run_status(open_storage(run_dir), seen_at + 3600)["state"] == "silent"

    EventLog.of_controller(Storage.open(run_dir)).record("failure", cause="rank 1: killed")
    status = run_status(open_storage(run_dir), time.time())
    assert (status["state"], status["failures"], status["last_failure"]) == ("failing", 1, "rank 1: killed")


@pytest.mark.parametrize(
    "line",
    [
        b"garbage",
        b"\xff\x00",
        b"[" * 100_000,
        b"{}",
        b'{"time": "x", "event": "run_started", "attempt": 1}',
        b'{"time": null, "event": "run_started"}',
        b'{"time": 1e999, "event": "run_started"}',
        b'{"event": "run_started", "split": "train", "step": 10, "samples_per_s": "x"}',
        b'{"time": 1.0, "event": ["a"], "step": {}}',
        b'{"time": 1.0, "event": "workers_started", "attempt": "x", "step": "y"}',
        b'{"time": 1.0, "event": "checkpoint_saved", "attempt": 1, "step": "q", "stall_s": "w"}',
    ],
    ids=lambda line: line[:60].decode(errors="replace"),
)
def test_status_of_a_run_with_lines_that_are_no_events_tells_what_the_others_say(run_dir, capsys, line):
    for name in ("events.jsonl", "metrics.jsonl"):
        with (run_dir / name).open("ab") as file:
            file.write(line + b"\n")
    (run_dir / "run.yaml").write_text("training: [")

    assert call(capsys, "status", str(run_dir))[0] == 0
    code, text = call(capsys, "status", str(run_dir), "--json")

    assert (code, json.loads(text)["step"], json.loads(text)["state"]) == (0, 10, "finished")
    assert next_attempt(Storage.open(run_dir)) == 2


def test_status_takes_a_uri_and_writes_nothing(run_dir, capsys):
    before = content(run_dir)

    code, text = call(capsys, "status", f"file://{run_dir}")

    assert code == 0
    assert "goodput" in text
    assert "\x1b" not in text
    assert content(run_dir) == before
