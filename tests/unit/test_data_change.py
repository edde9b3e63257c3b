"""A run whose data is not what it was at its checkpoint: refused with what differs, or continued as configured."""

import json
import signal
from types import SimpleNamespace

import pytest
import torch
from experiments import (
    POINTS,
    Diary,
    Network,
    Points,
    assert_same,
    carry_out,
    checkpoints,
    events,
    metric_rows,
    prepare,
    settings,
)
from torch.utils.data import DataLoader, TensorDataset
from xxhash import xxh3_128_hexdigest

from ray_trainer import TaskSpec, Trainer
from ray_trainer.data.batch import BatchPlan
from ray_trainer.data.order import SampleOrder
from ray_trainer.data.source import build_source
from ray_trainer.errors import StateMismatchError

SIZE, STEP_SAMPLES = 19, 4


def start(run_dir, size=SIZE, stop_at=None, data=None, **changes):
    """One start of a run over that many points; stopped by a signal after a step, or carried to its end."""
    prepared = prepare(run_dir, size=size, **changes)
    if data is not None:
        prepared.train_set = data
    if stop_at is None:
        return carry_out(prepared)
    prepared.diary.act("on_step_end", stop_at - 1, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        carry_out(prepared)
    return None


def samples(outcome, epoch, after_step=0):
    """What was trained on in an epoch, in order."""
    return [place for at, step, seen in outcome.order if at == epoch and step > after_step for place in seen]


def order(size, epoch):
    return SampleOrder(size, 42).indices(epoch, 0, size).tolist()


def assert_each_row_once(run_dir):
    keys = [(row["split"], row["step"]) for row in metric_rows(run_dir)]
    assert len(keys) == len(set(keys))


def forget_description(checkpoint):
    """Turn a manifest into one of an earlier version, sealed as that would be."""
    path = checkpoint / "manifest.json"
    document = json.loads(path.read_text())
    del document["data"]
    zeroed = json.dumps(document | {"xxh3_128": "0" * 32}, indent=1).encode()
    path.write_bytes(zeroed.replace(b"0" * 32, xxh3_128_hexdigest(zeroed).encode()))


def test_data_that_grew_is_refused_with_what_differs_and_what_to_do(tmp_path):
    start(tmp_path, stop_at=2)
    before = sorted(path.name for path in tmp_path.iterdir())

    with pytest.raises(StateMismatchError, match=r"19 samples before, 20 now.*on_data_change.*restart_epoch"):
        start(tmp_path, size=20)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_columns_that_differ_are_named(tmp_path):
    inputs, labels = torch.randn(9, 6), torch.arange(9) % 3
    task = TaskSpec("pairs", "tabular_classification", metrics=["loss"])

    def attempt(*tensors):
        trainer = Trainer(torch.nn.Linear(6, 3), SimpleNamespace(), settings(tmp_path, epochs=9, max_steps=2), task)
        trainer.train(TensorDataset(*tensors), resume_from="auto")

    attempt(inputs, labels)
    with pytest.raises(StateMismatchError, match=r"the content of column '0' differs.*draws at random.*seed"):
        attempt(inputs + 1, labels)
    with pytest.raises(StateMismatchError, match=r"column '1' was int64 \[\] and is int32 \[\]"):
        attempt(inputs, labels.int())
    with pytest.raises(StateMismatchError, match="column '2' is new"):
        attempt(inputs, labels, labels)


def test_the_manifest_describes_the_data(tmp_path):
    start(tmp_path, stop_at=2)

    data = json.loads((tmp_path / checkpoints(tmp_path)[-1] / "manifest.json").read_text())["data"]

    assert (data["train"]["kind"], data["train"]["num_samples"], data["val"]["num_samples"]) == ("Points", SIZE, 7)
    assert {name: column[0] for name, column in data["train"]["columns"].items()} == {
        "features": "float32 [6]",
        "labels": "int64 []",
    }


def test_checkpoint_without_a_description_is_continued_and_its_change_is_still_noticed(tmp_path):
    start(tmp_path / "old", stop_at=2)
    forget_description(tmp_path / "old" / checkpoints(tmp_path / "old")[-1])

    with pytest.raises(StateMismatchError, match="the checkpoint does not say what it was"):
        start(tmp_path / "old", size=20)
    assert_same(start(tmp_path / "old"), start(tmp_path / "whole"))


@pytest.mark.parametrize("size", [26, 11])
def test_restarted_epoch_sees_each_sample_of_the_new_data_once(tmp_path, size):
    start(tmp_path, stop_at=7)

    resumed = start(tmp_path, size=size, on_data_change="restart_epoch")

    assert samples(resumed, 0) == order(SIZE, 0)
    assert samples(resumed, 1, after_step=7) == order(size, 1)
    assert resumed.step == 7 + -(-size // STEP_SAMPLES)
    assert_each_row_once(tmp_path)
    told = events(tmp_path, "data_changed")
    assert [(row["split"], row["action"], row["step"], row["epoch"]) for row in told] == [
        ("train", "restart_epoch", 7, 1)
    ]
    assert told[0]["differs"][0] == f"19 samples before, {size} now"


def test_restarted_epoch_counts_in_its_mean_the_new_data_alone(tmp_path):
    frozen = {"learning_rate": 1e-30, "weight_decay": 0.0, "validate_every_n_epochs": None, "monitor": "train_loss"}
    data = Points(26)
    model = Network(dropout=0.0)
    torch.nn.init.zeros_(model.layers[3].weight)
    model.layers[3].bias.data = torch.tensor([9.0, 0, 0])

    def trainer(**changes):
        return Trainer(model, SimpleNamespace(), settings(tmp_path, **frozen, **changes), POINTS, Diary(model))

    trainer(max_steps=7).train(Points(SIZE))
    results = trainer(on_data_change="restart_epoch").train(data, resume_from="auto")

    expected = (data.labels == 0).float().mean()  # class 0 is chosen whatever comes in
    assert results["metrics_summary"]["train/accuracy"][1] == pytest.approx(float(expected))


@pytest.mark.parametrize("size", [26, 17])
def test_continued_run_goes_on_at_the_same_place_of_the_new_order(tmp_path, size):
    start(tmp_path, stop_at=7)

    resumed = start(tmp_path, size=size, on_data_change="continue")

    assert samples(resumed, 1) == order(SIZE, 1)[: 2 * STEP_SAMPLES] + order(size, 1)[2 * STEP_SAMPLES :]
    assert [row["action"] for row in events(tmp_path, "data_changed")] == ["continue"]
    assert_each_row_once(tmp_path)


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: DataLoader(data, batch_size=2)])
def test_continued_epoch_that_became_shorter_than_what_was_done_ends(tmp_path, wrap):
    start(tmp_path, stop_at=8, data=wrap(Points(SIZE)))

    resumed = start(tmp_path, size=9, data=wrap(Points(9)), on_data_change="continue")

    assert resumed.step == 8
    assert len(resumed.history) == 2
    assert_each_row_once(tmp_path)


@pytest.mark.parametrize("action", ["restart_epoch", "continue"])
def test_change_at_the_edge_of_an_epoch_begins_the_next_one_with_the_new_data(tmp_path, action):
    start(tmp_path, stop_at=7)
    edge = checkpoints(tmp_path)[0]
    assert edge == "checkpoint_epoch0000_step00000005"

    prepared = prepare(tmp_path, size=26, on_data_change=action)
    resumed = carry_out(prepared, str(tmp_path / edge))

    assert [len(samples(resumed, epoch)) for epoch in (0, 1)] == [SIZE, 26]
    assert samples(resumed, 1) == order(26, 1)
    assert resumed.step == 5 + 7


@pytest.mark.parametrize("action", ["restart_epoch", "continue"])
def test_run_interrupted_again_after_a_change_equals_one_that_was_not(tmp_path, action):
    for name in ("once", "often"):
        start(tmp_path / name, stop_at=3)
    once = start(tmp_path / "once", size=26, on_data_change=action)
    start(tmp_path / "often", size=26, on_data_change=action, stop_at=5)
    start(tmp_path / "often", size=26, on_data_change=action, stop_at=9)  # what is allowed need not happen again
    often = start(tmp_path / "often", size=26)

    assert_same(often, once)
    assert len(events(tmp_path / "often", "data_changed")) == 1


def test_change_that_no_checkpoint_holds_yet_is_told_once(tmp_path):
    start(tmp_path, stop_at=3)
    for _ in range(2):
        prepared = prepare(tmp_path, size=26, on_data_change="restart_epoch")
        prepared.train_set.on_read = lambda index: None
        prepared.diary.act("on_epoch_start", 1, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            carry_out(prepared)

    assert checkpoints(tmp_path) == ["checkpoint_epoch0000_step00000003"]
    assert len(events(tmp_path, "data_changed")) == 1


def test_older_checkpoint_from_before_the_change_is_changed_data_again(tmp_path):
    start(tmp_path, save_every_n_steps=1, stop_at=3)
    start(tmp_path, size=26, save_every_n_steps=1, on_data_change="continue", stop_at=5)
    for name in checkpoints(tmp_path)[-2:]:
        (tmp_path / name / "trainer.json").write_text("torn")

    with pytest.raises(StateMismatchError, match="19 samples before, 26 now"):
        start(tmp_path, size=26)
    resumed = start(tmp_path, size=26, on_data_change="restart_epoch")

    assert samples(resumed, 0, after_step=3) == order(26, 0)
    assert [row["action"] for row in events(tmp_path, "data_changed")] == ["continue", "restart_epoch"]


def test_learning_rate_reaches_its_end_with_the_last_step_of_the_changed_run(tmp_path):
    options = {"lr_scheduler_type": "linear", "warmup_steps": 0, "log_every_n_steps": 1}
    start(tmp_path, stop_at=7, **options)

    resumed = start(tmp_path, size=26, on_data_change="restart_epoch", **options)

    rates = {row["step"]: row["learning_rate"] for row in resumed.rows if row["split"] == "train"}
    assert resumed.step == 14
    assert rates[14] == pytest.approx(0.02 / 14)  # one step above zero
    assert rates[8] == pytest.approx(0.02 * 7 / 14)


def test_finished_run_needs_its_data_no_more(tmp_path):
    whole = start(tmp_path)

    again = start(tmp_path, size=26, on_data_change="restart_epoch")

    assert again.step == whole.step
    assert again.rows == whole.rows
    assert not events(tmp_path, "data_changed")


def test_changed_validation_data_is_told_and_not_refused(tmp_path):
    start(tmp_path, stop_at=3)
    prepared = prepare(tmp_path)
    prepared.val_set = Points(8, seed=1)

    carry_out(prepared)

    told = events(tmp_path, "data_changed")
    assert [(row["split"], row["action"], row["differs"]) for row in told] == [
        ("val", "continue", ["7 samples before, 8 now"])
    ]


def test_new_draw_of_the_validation_share_is_told(tmp_path):
    def attempt(size, stop_at=None, **changes):
        prepared = prepare(tmp_path, size=size, validation_split=0.2, **changes)
        prepared.val_set = None
        if stop_at is None:
            carry_out(prepared)
            return
        prepared.diary.act("on_step_end", stop_at - 1, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit):
            carry_out(prepared)

    attempt(20, stop_at=2)
    with pytest.raises(StateMismatchError, match="validation_split draws its share anew"):
        attempt(30)
    attempt(30, on_data_change="restart_epoch")
    assert {row["split"] for row in events(tmp_path, "data_changed")} == {"train", "val"}


class Columns:
    """What a Hugging Face dataset looks like from outside."""

    column_names = ("x", "text")
    features = ("x", "text")

    def __init__(self, size, text="row"):
        self.size, self.text = size, text

    def __len__(self):
        return self.size

    def __getitem__(self, rows):
        return {"x": [[float(row), 1.0] for row in rows], "text": [f"{self.text} {row}" for row in rows]}


def test_hugging_face_data_says_what_differs():
    first, other = (build_source(Columns(30, text), BatchPlan(4, 4)).describe() for text in ("row", "line"))

    assert first.differences(other) == ["the content of column 'text' differs"]
