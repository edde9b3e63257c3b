"""A model that is dealt out over processes learns as one that each of them has, and survives the same."""

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from experiments import assert_same, events, metric_rows, settings
from ranks import exit_codes, on_ranks
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset

from ray_trainer import TaskSpec, Trainer
from ray_trainer.checkpoint import CheckpointManager
from ray_trainer.checkpoint.weights import export_weights
from ray_trainer.errors import DivergenceError

LM = TaskSpec("sentences", "lm", input_fields=["input_ids", "attention_mask"], special_tokens={"pad_token_id": 0})
CLOSE = {"rtol": 1e-4, "atol": 2e-6}  # sums of float32 in another order, after some steps of Adam
WAYS: dict[str, dict[str, Any]] = {
    "adamw": {"dropout": 0.0},
    "dropout": {},
    "sgd": {"optimizer": "sgd", "learning_rate": 0.1},
    "own optimizer": {"own_optimizer": True},
    "running statistics": {"norm": True, "dropout": 0.0, "batch_size": 4},
    "bf16": {"precision": "bf16-mixed"},
    "fp16": {"precision": "fp16-mixed"},
}


class Sentences(Dataset):
    """Token sequences of 3 to 9 tokens, padded to 9."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(5)
        self.lengths = torch.randint(3, 10, (size,), generator=generator).tolist()
        self.tokens = torch.randint(1, 11, (size, 9), generator=generator)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        mask = (torch.arange(9) < self.lengths[index]).long()
        ids = self.tokens[index] * mask
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}


class Block(nn.Module):
    """Seven rows do not deal out evenly over two or four processes."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(7) if norm else nn.LayerNorm(7)
        self.linear = nn.Linear(7, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x.flatten(0, 1)).view_as(x)
        return x + torch.tanh(self.linear(normed))


class Speaker(nn.Module):
    """Scores the next token. Embedding and output share their weights; the scale has a row for the first rank only."""

    def __init__(self, dropout: float = 0.2, norm: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 7)
        self.blocks = nn.ModuleList(Block(norm) for _ in range(3))
        self.scale = nn.Parameter(torch.ones(1, 7))
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(7, 11)
        self.output.weight = self.embedding.weight
        self.register_buffer("temperature", torch.tensor(1.5))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.embedding(input_ids) * self.scale
        for block in self.blocks:
            x = self.dropout(block(x))
        return self.output(x) / self.temperature


class Watch:
    """Looks at the state after step 4 and after a resume; may end one process after a step."""

    def __init__(self, kill_rank_1_at: int | None = None) -> None:
        self.kill_rank_1_at = kill_rank_1_at
        self.after_step_4: dict[str, Any] | None = None
        self.resumed: dict[str, Any] | None = None
        self.trainer: Trainer

    def on_resume(self, record: Any) -> None:
        self.resumed = {"step": record.step, **state_of(self.trainer)}

    def on_step_end(self, record: Any) -> None:
        if record.step == 4:
            self.after_step_4 = {"step": 4, **state_of(self.trainer)}
        if record.step == self.kill_rank_1_at and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)


def whole(value: Any) -> Any:
    """Nested state with the full value of everything that is sharded."""
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if hasattr(value, "full_tensor"):
        return value.full_tensor().clone()
    return value.clone() if isinstance(value, torch.Tensor) else value


def state_of(trainer: Trainer) -> dict[str, Any]:
    return {"weights": whole(trainer.model.state_dict()), "optimizer": whole(trainer.optimizer.state_dict()["state"])}


def train(run_dir: Path, parallelism: str, kill_rank_1_at: int | None = None, **changes: Any) -> dict[str, Any]:
    torch.manual_seed(3 + int(os.environ["RANK"]))  # the weights to start with are those of rank 0
    model = Speaker(changes.pop("dropout", 0.2), changes.pop("norm", False))
    model.temperature.fill_(changes.pop("temperature", 1.5))
    own = torch.optim.Adagrad(model.parameters(), 0.05) if changes.pop("own_optimizer", False) else None
    chosen = {"parallelism": parallelism, "save_every_n_steps": 2, "log_every_n_steps": 1, "max_grad_norm": 0.3}
    watch = Watch(kill_rank_1_at)
    config = settings(run_dir, **(chosen | changes))
    trainer = watch.trainer = Trainer(model, SimpleNamespace(pad_token_id=0), config, LM, watch, optimizer=own)
    results = trainer.train(Sentences(21), Sentences(13), resume_from="auto")
    history = results["metrics_summary"].drop(columns="epoch_duration").to_dict("records")
    found = {"history": history, "after step 4": watch.after_step_4, "resumed": watch.resumed}
    return {
        **state_of(trainer),
        **found,
        "sharded": hasattr(next(iter(trainer.model.state_dict().values())), "placements"),
    }


def learn_in_all_ways(run_dir: Path) -> dict[str, Any]:
    answer: dict[str, Any] = {
        way: {name: train(run_dir / way / name, name, **changes) for name in ("ddp", "fsdp")}
        for way, changes in WAYS.items()
    }
    answer["again"] = train(run_dir / "again", "fsdp")
    try:
        train(run_dir / "diverging", "fsdp", temperature=float("nan"))
    except DivergenceError as error:
        answer["error"] = str(error)
    return answer


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The directory of the runs of two processes, and what each process saw."""
    run_dir = tmp_path_factory.mktemp("fsdp") / "run"
    return run_dir, on_ranks(2, learn_in_all_ways, run_dir)


@pytest.mark.parametrize("way", WAYS)
def test_sharded_model_learns_as_a_replicated_one(learned, way):
    low = way in ("bf16", "fp16")  # blocks hand on activations in the low precision here, and in fp32 there
    for answer in learned[1]:
        sharded, replicated = answer[way]["fsdp"], answer[way]["ddp"]

        assert (sharded["sharded"], replicated["sharded"]) == (True, False)
        for name in ("weights", "optimizer"):
            close = {"rtol": 0.1, "atol": 0.01} if low else CLOSE
            torch.testing.assert_close(sharded[name], replicated[name], **close)
        for one, other in zip(sharded["history"], replicated["history"], strict=True):
            for name in ("train/loss", "val/loss", "gradient_norm") if low else one:
                assert one[name] == pytest.approx(other[name], rel=0.05 if low else 1e-4), name


def test_sharded_run_comes_out_the_same_to_the_bit_each_time(learned):
    for answer in learned[1]:
        assert_same(answer["again"], answer["dropout"]["fsdp"])


def test_gradients_that_are_not_numbers_stop_all_processes_with_the_same_error(learned):
    _, (first, second) = learned

    assert first["error"] == second["error"]
    assert "embedding.weight (NaN)" in first["error"]


def test_each_process_has_written_its_part_and_nothing_that_would_be_unpickled(learned):
    files = {path.name: path for path in newest(learned[0] / "adamw" / "fsdp").iterdir()}

    assert {path.suffix for path in files.values()} == {".json", ".safetensors"}
    parts = [load_file(files[f"model.shard{rank:05d}.safetensors"]) for rank in (0, 1)]
    assert [len(part["blocks.0.linear.weight"]) for part in parts] == [4, 3]
    assert ["scale" in part for part in parts] == [True, False]
    assert list(load_file(files["model.safetensors"])) == ["temperature"]
    assert set(json.loads(files["manifest.json"].read_text())["files"]) == files.keys() - {"manifest.json"}


def test_exported_weights_of_a_sharded_run_load_into_the_plain_model(learned, tmp_path):
    run_dir, answers = learned
    export_weights(newest(run_dir / "adamw" / "fsdp"), tmp_path / "model.safetensors")
    model = Speaker()

    model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)

    assert_same(dict(model.state_dict()), dict(answers[0]["adamw"]["fsdp"]["weights"]))


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing", "of another checkpoint"])
@pytest.mark.parametrize(
    "file", ["model.shard00001.safetensors", "optimizer.shard00000.safetensors", "shard00001.json"]
)
def test_broken_part_of_any_process_is_found_and_the_checkpoint_before_used(learned, tmp_path, file, damage):
    run_dir = shutil.copytree(learned[0] / "adamw" / "fsdp", tmp_path / "run")
    path = newest(run_dir) / file
    content = path.read_bytes()
    damaged = {"truncated": content[:-1], "altered": content[:-1] + bytes([content[-1] ^ 1])}
    if damage == "missing":
        path.unlink()
    elif damage == "of another checkpoint":
        path.write_bytes((learned[0] / "sgd" / "fsdp" / path.parent.name / file).read_bytes())
    else:
        path.write_bytes(damaged[damage])

    loaded = CheckpointManager(run_dir).restore("auto")

    assert loaded is not None
    assert loaded.manifest.step < 6
    assert loaded.rejected[0].reason.startswith(file)


def test_run_of_which_a_process_was_killed_ends_bit_equal(learned, tmp_path):
    _, answers = learned
    run_dir = tmp_path / "run"

    codes = exit_codes(2, train, run_dir, "fsdp", 5)
    resumed = on_ranks(2, train, run_dir, "fsdp")

    assert codes[1] == -signal.SIGKILL
    assert [event["step"] for event in events(run_dir, "resumed")] == [4]
    for answer, found in zip(answers, resumed, strict=True):
        for name in ("weights", "optimizer", "history"):
            assert_same(found[name], answer["dropout"]["fsdp"][name], name)
    assert metric_rows(run_dir) == metric_rows(learned[0] / "dropout" / "fsdp")


def go_on_after_step_4(copies: Path, ways: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [train(copies / f"{before} to {after}", after, dropout=0.0) for before, after in ways]


@pytest.mark.parametrize(
    ("world_size", "ways"),
    [
        (1, [("fsdp", "fsdp")]),
        (2, [("fsdp", "ddp"), ("ddp", "fsdp"), ("fsdp", "fsdp")]),
        (4, [("fsdp", "fsdp"), ("ddp", "fsdp"), ("fsdp", "ddp")]),
    ],
)
def test_checkpoint_of_two_processes_is_continued_in_any_layout(learned, tmp_path, world_size, ways):
    """The checkpoint of the last step is broken in one part, so that each process has to turn to the one before."""
    run_dir, answers = learned
    for before, after in ways:
        copy = shutil.copytree(run_dir / "adamw" / before, tmp_path / f"{before} to {after}")
        name = "optimizer.shard00001.safetensors" if before == "fsdp" else "model.safetensors"
        (newest(copy) / name).write_bytes(b"")

    found = on_ranks(world_size, go_on_after_step_4, tmp_path, ways)

    for answer in found:
        for (before, after), outcome in zip(ways, answer, strict=True):
            saved = answers[0]["adamw"][before]
            assert_same(outcome["resumed"], saved["after step 4"], f"{before} to {after}")
            torch.testing.assert_close(outcome["weights"], saved["weights"], **CLOSE)
            next_losses = [
                losses(copies)[5] for copies in (tmp_path / f"{before} to {after}", run_dir / "adamw" / before)
            ]
            assert next_losses[0] == pytest.approx(next_losses[1], rel=1e-6)
            if (before, after, world_size) == ("fsdp", "fsdp", 2):
                assert_same([outcome["weights"], outcome["history"]], [saved["weights"], saved["history"]])


def newest(run_dir: Path) -> Path:
    return max(run_dir.glob("checkpoint_epoch*"), key=lambda path: path.name.split("_step")[-1])


def losses(run_dir: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in metric_rows(run_dir) if row["split"] == "train"}
