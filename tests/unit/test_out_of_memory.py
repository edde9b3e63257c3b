"""Memory that does not suffice."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from experiments import Network, assert_same, carry_out, events, prepare

from ray_trainer.data.cutting import cut
from ray_trainer.errors import MemoryShortageError
from ray_trainer.shortage import is_shortage


class Killed(BaseException):
    """Passes everything that is done after an error, as a kill would."""


def kill() -> None:
    raise Killed


class Hungry(Network):
    """Needs more memory than there is, for more than some samples at once, from a pass of training on."""

    def __init__(self, most: int, first_pass: int = 0, dropout: float = 0.3, is_always: bool = False) -> None:
        super().__init__(dropout=dropout)
        self.most = most
        self.first_pass = first_pass
        self.is_always = is_always

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        self.first_pass -= int(self.training)
        if len(features) > self.most and (self.is_always or (self.training and self.first_pass < 0)):
            torch.empty(2**60, dtype=torch.uint8)
        return super().forward(features)


def hungry(run_dir, monkeypatch, model, **changes):
    monkeypatch.setattr("experiments.Network", lambda norm: model())
    chosen = {"size": 24, "batch_size": 4, "gradient_accumulation_steps": 1} | changes
    return prepare(run_dir, **chosen)


def test_first_batch_that_needs_too_much_is_explained_before_anything_is_written(tmp_path, monkeypatch):
    with pytest.raises(MemoryShortageError) as caught:
        carry_out(hungry(tmp_path / "run", monkeypatch, lambda: Hungry(2, is_always=True)))

    for words in (
        "the first batch, with 4 samples",
        "allocate",
        "Parameters take",
        "of the machine's",
        "batch_size (4)",
    ):
        assert words in str(caught.value)
    assert not (tmp_path / "run" / "events.jsonl").exists()


def test_step_that_needs_too_much_is_explained_with_sizes(tmp_path, monkeypatch):
    with pytest.raises(MemoryShortageError, match=r"step 3, with 4 samples(.|\n)*optimizer's state (.|\n)*halve"):
        carry_out(hungry(tmp_path, monkeypatch, lambda: Hungry(2, first_pass=2)))


def test_halved_step_has_the_gradient_of_the_whole_batch(tmp_path, monkeypatch):
    changes = {"on_out_of_memory": "halve", "epochs": 1}
    halved = carry_out(hungry(tmp_path / "halved", monkeypatch, lambda: Hungry(1, dropout=0.0), **changes))

    whole = carry_out(hungry(tmp_path / "whole", monkeypatch, lambda: Network(dropout=0.0), **changes))
    for name, value in whole.weights.items():
        torch.testing.assert_close(halved.weights[name], value, rtol=1e-5, atol=1e-6)  # sums in another order
    assert halved.step == whole.step == 6
    assert [(e["step"], e["pieces"], e["samples_at_once"]) for e in events(tmp_path / "halved", "out_of_memory")] == [
        (1, 2, 2),
        (1, 4, 1),
    ]


@pytest.mark.parametrize("killed_at", [5, 7, 9])
def test_resumed_run_halves_from_the_same_step_on_whatever_memory_it_has(tmp_path, monkeypatch, killed_at):
    changes = {"on_out_of_memory": "halve", "save_every_n_steps": 3}
    whole = carry_out(hungry(tmp_path / "whole", monkeypatch, lambda: Hungry(2, first_pass=4), **changes))
    killed = hungry(tmp_path / "killed", monkeypatch, lambda: Hungry(2, first_pass=4), **changes)
    killed.diary.act("on_step_end", killed_at, kill)
    with pytest.raises(Killed):
        carry_out(killed)

    resumed = carry_out(hungry(tmp_path / "killed", monkeypatch, lambda: Network(), **changes))

    assert len(events(tmp_path / "killed", "out_of_memory")) == 1
    diaries = [[[epoch, step, sorted(seen)] for epoch, step, seen in run.order] for run in (resumed, whole)]
    assert [entry[:2] for entry in diaries[0]] == [entry[:2] for entry in diaries[1]]
    assert_same(replace(resumed, order=[]), replace(whole, order=[]))


def test_single_sample_that_needs_too_much_ends_the_run(tmp_path, monkeypatch):
    with pytest.raises(MemoryShortageError, match="with 1 sample at once"):
        carry_out(hungry(tmp_path, monkeypatch, lambda: Hungry(0), on_out_of_memory="halve"))

    assert [event["pieces"] for event in events(tmp_path, "out_of_memory")] == [2, 4]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_of_memory_are_told_from_others(error, expected):
    assert is_shortage(error) is expected
    wrapped = ValueError("something else")
    wrapped.__cause__ = error
    assert is_shortage(wrapped) is expected


def test_pieces_together_are_the_batch():
    batch = {
        "ids": torch.arange(10).reshape(5, 2),
        "more": (np.arange(5), torch.tensor(3.0)),
        "texts": ["a", "b", "c", "d", "e"],
        "temperature": 0.5,
    }

    parts = cut(batch, 2)

    assert [len(part["ids"]) for part in parts] == [2, 3]
    assert torch.equal(torch.cat([part["ids"] for part in parts]), batch["ids"])
    assert np.array_equal(np.concatenate([part["more"][0] for part in parts]), np.arange(5))
    assert [part["more"][1].item() for part in parts] == [3.0, 3.0]
    assert [text for part in parts for text in part["texts"]] == batch["texts"]
    assert len(cut(torch.zeros(3, 1), 8)) == 3
