"""The gradient is that of the global batch, however it is dealt out over micro-batches and processes.

The reference is a hand-written loop in one process. Sums are taken in another order there, so values are compared
with rtol 1e-5 and atol 1e-6 (float32 has 1.2e-7); plain SGD keeps the differences from growing.
"""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from experiments import (
    Diary,
    Network,
    Points,
    assert_same,
    carry_out,
    events,
    metric_rows,
    prepare,
    settings,
)
from ranks import on_ranks
from torch import nn
from torch.utils.data import Dataset

from ray_trainer import Request, TaskSpec, Trainer, TrainingConfig

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
LM = TaskSpec("sentences", "lm", input_fields=["input_ids", "attention_mask"], special_tokens={"pad_token_id": 0})
LAYOUTS = {  # (processes, micro-batches of each, samples in each): always 8 samples a step
    "one process, four micro-batches": (1, 4, 2),
    "one process, one big batch": (1, 1, 8),
    "two processes, two micro-batches": (2, 2, 2),
}


class Sentences(Dataset):
    """Token sequences of 3 to 9 tokens, padded to 9, with what pads masked in or out of the way."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(5)
        self.lengths = torch.randint(3, 10, (size,), generator=generator).tolist()
        self.tokens = torch.randint(1, 12, (size, 9), generator=generator)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        mask = (torch.arange(9) < self.lengths[index]).long()
        ids = self.tokens[index] * mask
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}


class Speaker(nn.Module):
    """Scores the next token from the present one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 6)
        self.output = nn.Linear(6, 12)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.output(torch.tanh(self.embedding(input_ids)))


def plain(run_dir: Path, **changes: Any) -> TrainingConfig:
    chosen = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "learning_rate": 0.5, "warmup_steps": 0}
    chosen |= {"lr_scheduler_type": "constant", "max_grad_norm": 0.3, "log_every_n_steps": 1}
    return settings(run_dir, **(chosen | {"early_stopping_patience": None} | changes))


def train_speaker(run_dir: Path, micro_batches: int, batch_size: int) -> dict[str, Any]:
    torch.manual_seed(3)
    config = plain(run_dir, batch_size=batch_size, gradient_accumulation_steps=micro_batches, shuffle=False)
    trainer = Trainer(Speaker(), SimpleNamespace(pad_token_id=0), config, LM)
    results = trainer.train(Sentences(21), Sentences(13))
    return {"weights": trainer.model.state_dict(), "history": results["metrics_summary"].to_dict("records")}


def train_points(run_dir: Path, size: int, world_size: int, val_size: int = 7) -> dict[str, Any]:
    torch.manual_seed(3)
    config = plain(run_dir, batch_size=2, gradient_accumulation_steps=1, global_batch_size=2 * world_size)
    model = Network(dropout=0.0)
    task = TaskSpec("points", "tabular_classification", input_fields=["features"])
    trainer = Trainer(model, SimpleNamespace(), config, task)
    results = trainer.train(Points(size), Points(val_size, seed=1))
    return {"weights": model.state_dict(), "history": results["metrics_summary"].to_dict("records")}


def train_and_break_off(run_dir: Path, norm: bool, step: int | None) -> dict[str, Any]:
    """The full experiment; every rank is stopped by a signal to rank 0 after a step."""
    prepared = prepare(run_dir, norm, size=20 if norm else 19, gradient_accumulation_steps=1)
    if step is not None and int(os.environ["RANK"]) == 0:
        prepared.diary.act("on_step_end", step, lambda: os.kill(os.getpid(), 15))
    try:
        outcome = carry_out(prepared)
    except SystemExit as end:
        return {"code": end.code}
    return {name: getattr(outcome, name) for name in ("weights", "optimizer", "schedule", "order", "history")}


def poison_and_train(run_dir: Path, bad_rank_only: bool) -> str:
    """One sample in every global batch is not a number."""
    data = Points(12)
    data.features[:: 4 if bad_rank_only else 1, 1] = float("nan")
    config = settings(run_dir, batch_size=2, gradient_accumulation_steps=1, shuffle=False, max_consecutive_bad_steps=2)
    task = TaskSpec("points", "tabular_classification", input_fields=["features"])
    model = Network()
    try:
        Trainer(model, SimpleNamespace(), config, task, Diary(model)).train(data)
    except RuntimeError as error:
        return type(error).__name__
    return "nothing was raised"


def by_hand(model: nn.Module, batches: list[Any], loss_sum: Any, epochs: int = 2) -> dict[str, torch.Tensor]:
    """Plain SGD on the mean over each global batch, clipped by torch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for batch in batches * epochs:
        total, count = loss_sum(model, batch)
        optimizer.zero_grad()
        (total / count).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
    return model.state_dict()


def token_loss(model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Each token but the first of every sentence is predicted by the one before it; padding counts nothing."""
    picked = [(ids[:-1], ids[1:]) for ids in (row[row > 0] for row in batch)]
    inputs, targets = (torch.cat(part) for part in zip(*picked, strict=True))
    return F.cross_entropy(model(inputs[None])[0], targets, reduction="sum"), len(targets)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_language_model_with_padding_learns_as_in_a_hand_written_loop(tmp_path, layout):
    world_size, micro_batches, batch_size = LAYOUTS[layout]
    torch.manual_seed(3)
    sentences = torch.stack([Sentences(21)[index]["input_ids"] for index in range(21)])
    expected = by_hand(Speaker(), list(sentences.split(8)), token_loss)

    answers = on_ranks(world_size, train_speaker, tmp_path / "run", micro_batches, batch_size)

    for answer in answers:
        torch.testing.assert_close(answer["weights"], expected, **CLOSE)
        assert_same(answer["weights"], answers[0]["weights"])


def test_validation_of_a_language_model_is_the_mean_over_all_tokens_for_any_layout(tmp_path):
    losses = []
    for number, (world_size, micro_batches, batch_size) in enumerate(LAYOUTS.values()):
        answer = on_ranks(world_size, train_speaker, tmp_path / str(number), micro_batches, batch_size)[0]
        model = Speaker()
        model.load_state_dict(answer["weights"])
        batch = torch.stack([Sentences(13)[index]["input_ids"] for index in range(13)])
        with torch.no_grad():
            total, count = token_loss(model, batch)
        assert answer["history"][-1]["val/loss"] == pytest.approx(float(total) / count, rel=1e-6)
        losses.append(answer["history"][-1]["val/loss"])

    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_loss_and_accuracy_are_means_over_all_samples_for_any_number_of_processes(tmp_path, world_size):
    for answer in on_ranks(world_size, train_points, tmp_path / "run", 12, world_size, 7):
        model = Network(dropout=0.0).eval()
        model.load_state_dict(answer["weights"])
        points = Points(7, seed=1)
        with torch.no_grad():
            logits = model(points.features)
        assert answer["history"][-1]["val/loss"] == pytest.approx(
            F.cross_entropy(logits, points.labels).item(), rel=1e-6
        )
        assert answer["history"][-1]["val/accuracy"] == (logits.argmax(1) == points.labels).double().mean().item()


@pytest.mark.parametrize(("size", "val_size"), [(2, 1), (1, 2), (7, 1)])
def test_three_processes_with_fewer_samples_than_processes_learn_as_one(tmp_path, size, val_size):
    torch.manual_seed(3)
    points = Points(size)
    model = Network(dropout=0.0)
    answers = on_ranks(3, train_points, tmp_path / "run", size, 3, val_size)

    if size < 6:  # the whole dataset is one step, so its order says nothing
        whole = (points.features, points.labels)
        by_hand(model, [whole], lambda net, batch: (F.cross_entropy(net(batch[0]), batch[1], reduction="sum"), size))
        torch.testing.assert_close(answers[0]["weights"], model.state_dict(), **CLOSE)
    for answer in answers:
        assert_same(answer["weights"], answers[0]["weights"])
        assert len(answer["history"]) == 2


@pytest.mark.parametrize(("world_size", "norm", "step"), [(3, False, 2), (3, False, 5), (2, True, 3)])
def test_processes_that_are_stopped_and_started_again_end_bit_equal(tmp_path, world_size, norm, step):
    whole = on_ranks(world_size, train_and_break_off, tmp_path / "whole", norm, None)

    stopped = on_ranks(world_size, train_and_break_off, tmp_path / "broken", norm, step)
    resumed = on_ranks(world_size, train_and_break_off, tmp_path / "broken", norm, None)

    assert [answer["code"] for answer in stopped] == [143] * world_size
    assert events(tmp_path / "broken", "resumed")[0]["step"] in (step, step + 1)  # ranks agree with the next step
    for one, other in zip(resumed, whole, strict=True):
        for name in ("weights", "optimizer", "schedule", "history"):
            assert_same(one[name], other[name], name)
    assert metric_rows(tmp_path / "broken") == metric_rows(tmp_path / "whole")


def test_state_of_the_hooks_of_each_process_comes_back_to_it(tmp_path):
    whole = on_ranks(2, train_and_break_off, tmp_path / "whole", False, None)

    on_ranks(2, train_and_break_off, tmp_path / "broken", False, 3)
    resumed = on_ranks(2, train_and_break_off, tmp_path / "broken", False, None)

    for one, other in zip(resumed, whole, strict=True):
        assert_same(one["order"], other["order"])


@pytest.mark.parametrize("bad_rank_only", [True, False])
def test_all_processes_raise_when_the_gradients_of_one_are_not_numbers(tmp_path, bad_rank_only):
    assert on_ranks(2, poison_and_train, tmp_path / "run", bad_rank_only) == ["DivergenceError"] * 2
    assert len(events(tmp_path / "run", "step_skipped")) == 2


def train_with_uneven_hooks(run_dir: Path) -> int:
    """Only rank 0 has a hook for steps, and asks to stop; the ranks have different numbers of micro-batches at last."""

    class Stopper:
        def on_batch_end(self, batch_idx: int, loss: float) -> None:
            """Called as often as this rank has micro-batches."""

    if int(os.environ["RANK"]) == 0:
        Stopper.on_step_end = lambda self, record: Request.STOP if record.step == 5 else None
    config = settings(run_dir, batch_size=2, gradient_accumulation_steps=2, shuffle=False, epochs=3)
    task = TaskSpec("points", "tabular_classification", input_fields=["features"])
    trainer = Trainer(Network(), SimpleNamespace(), config, task, Stopper())
    trainer.train(Points(21))  # 8 a step; of the last 5 samples of an epoch rank 0 takes 3 and rank 1 takes 2
    return trainer.progress.step


def test_what_a_hook_of_one_process_asks_for_is_done_by_all(tmp_path):
    assert on_ranks(2, train_with_uneven_hooks, tmp_path / "run") == [5, 5]
