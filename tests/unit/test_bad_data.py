"""Rows that cannot be trained on: found before training, refused by default, or left out always in the same way."""

import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from experiments import events, settings
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import Subset, TensorDataset

from ray_trainer import TaskSpec, Trainer
from ray_trainer.data.batch import BatchPlan
from ray_trainer.data.module import UniversalDataModule
from ray_trainer.data.quarantine import BadDataPolicy, LeftOut, WithoutRows, bad_rows_of
from ray_trainer.data.readers import TensorReader
from ray_trainer.data.source import build_source
from ray_trainer.errors import DataError

PAIRS = TaskSpec("pairs", "tabular_classification", metrics=["loss"])


def numbered(size=200, **bad):
    """Rows that begin with their number; ``bad`` gives values for the second column, as ``at_17=math.nan``."""
    features = torch.zeros(size, 3)
    features[:, 0] = torch.arange(size)
    for name, value in bad.items():
        features[int(name.removeprefix("at_")), 1] = value
    return TensorDataset(features, torch.arange(size) % 3)


def source(data, world_size=1, rank=0, **policy):
    return build_source(data, BatchPlan(4, 12, rank, world_size), bad_data=BadDataPolicy(**policy))


def numbers(step):
    return [int(i) for micro_batch in step.micro_batches for i in micro_batch[0][:, 0]] if step.num_samples else []


@pytest.mark.parametrize(("value", "word"), [(math.nan, "NaN"), (math.inf, "infinity"), (-math.inf, "infinity")])
def test_number_that_is_none_is_refused_with_its_row_and_column(value, word):
    with pytest.raises(DataError, match=rf"1 of 200 rows[^.]*row 17: {word} in column '0'") as caught:
        source(numbered(at_17=value))
    assert "quarantine" in str(caught.value)


def test_numbers_that_are_merely_large_are_good():
    source(TensorDataset(torch.full((5, 4), 3e38), torch.zeros(5)))


def test_bad_rows_are_kept_where_that_is_wanted():
    assert source(numbered(at_17=math.nan), action="keep").num_samples == 200


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_rows_in_quarantine_are_in_no_step_of_any_rank_and_the_others_in_one(world_size):
    data = numbered(at_17=math.nan, at_0=math.inf, at_199=math.nan)
    ranks = [source(data, world_size, rank, action="quarantine", max_ratio=0.1) for rank in range(world_size)]
    steps = zip(*(each.steps(epoch=1) for each in ranks), strict=True)

    seen = [number for parts in steps for part in parts for number in numbers(part)]

    assert sorted(seen) == sorted(set(range(200)) - {17, 0, 199})
    assert len({each.fingerprint for each in ranks}) == 1
    assert ranks[0].left_out == LeftOut(
        3,
        0,
        {"infinity in column '0'": 1, "NaN in column '0'": 2},
        ("row 0: infinity in column '0'", "row 17: NaN in column '0'", "row 199: NaN in column '0'"),
    )
    assert torch.cat(list(ranks[0].column(1))).tolist() == [i % 3 for i in range(200) if i not in (0, 17, 199)]


def test_more_bad_rows_than_allowed_are_refused():
    two = numbered(at_17=math.nan, at_18=math.nan)
    assert source(two, action="quarantine").num_samples == 198
    with pytest.raises(DataError, match=r"3 of 200 rows.*max_bad_ratio \(0.01\)"):
        source(numbered(at_17=math.nan, at_18=math.nan, at_19=math.nan), action="quarantine")


def test_bad_rows_outside_of_a_subset_do_not_matter():
    data = numbered(at_17=math.nan)
    source(Subset(data, range(20, 50)))
    with pytest.raises(DataError, match="row 7: NaN"):
        source(Subset(data, range(10, 50)))


def test_share_for_validation_is_drawn_of_the_good_rows():
    data = UniversalDataModule(numbered(at_17=math.nan), val_split=0.2, bad_data=BadDataPolicy("quarantine"))
    plan = BatchPlan(4, 12)
    seen = [
        n for part in (data.train_source(plan), data.val_source(plan)) for step in part.steps(0) for n in numbers(step)
    ]
    assert sorted(seen) == [i for i in range(200) if i != 17]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=20, unique=True), st.integers(1, 9))
def test_without_rows_reads_as_if_they_had_never_been(rows, block):
    rows = np.array(sorted(rows))
    reader = TensorReader([torch.arange(40)])
    reader.block_sizes = [block] * (40 // block) + ([40 % block] if 40 % block else [])
    there = WithoutRows(reader, rows, LeftOut())
    expected = [i for i in range(40) if i not in rows]
    assert there.fetch(np.arange(len(there)))[0].tolist() == expected
    starts = np.cumsum([0, *reader.block_sizes])
    assert there.block_sizes == [sum(start <= i < end for i in expected) for start, end in pairwise(starts)]


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([1.0, None, math.nan, math.inf]), [("missing", [11]), ("NaN", [12]), ("infinity", [13])]),
        (pa.array([1, None, 3]), [("missing", [11])]),
        (pa.array([[1.0], [], [2.0, math.nan], None, [None]]), [("missing", [13, 14]), ("NaN", [12])]),
        (pa.array([[1, 2], None, [3, None]], pa.list_(pa.int64(), 2)), [("missing", [11, 12])]),
        (pa.array([[[1.0]], [[2.0], [math.inf]]]), [("infinity", [11])]),
        (pa.array(["a", None]), []),
        (np.array([[1.0, 2.0], [math.nan, 0.0]], np.float16), [("NaN", [11])]),
        (np.array([1, 2]), []),
    ],
)
def test_bad_rows_of_a_column_are_found_in_numbers_and_lists(column, expected):
    found = bad_rows_of("x", column, first_row=10)
    assert [(finding.reason, finding.rows.tolist()) for finding in found] == expected


def test_quarantine_is_one_event_of_the_run_and_a_mended_row_is_changed_data(tmp_path):
    def attempt(data, **changes):
        config = settings(tmp_path, early_stopping_patience=None, on_bad_data="quarantine", **changes)
        Trainer(nn.Linear(3, 3), SimpleNamespace(), config, PAIRS).train(data, numbered(8), resume_from="auto")

    attempt(numbered(at_17=math.nan), epochs=1)
    attempt(numbered(at_17=math.nan), epochs=2)

    (told,) = events(tmp_path, "data_quarantined")
    assert (told["split"], told["num_rows"], told["reasons"]) == ("train", 1, {"NaN in column '0'": 1})
    with pytest.raises(ValueError, match="199 samples before, 200 now"):
        attempt(numbered(), epochs=3)


def test_refused_rows_leave_no_trace_on_disk(tmp_path):
    trainer = Trainer(nn.Linear(3, 3), SimpleNamespace(), settings(tmp_path / "run"), PAIRS)
    with pytest.raises(DataError, match="row 17"):
        trainer.train(numbered(at_17=math.nan))
    assert not (tmp_path / "run").exists()


class Sampled(torch.utils.data.Dataset):
    """Read sample by sample, so that nobody looks before training."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data[index]


@pytest.mark.parametrize("held_back", [0.0, 0.4])
def test_skipped_step_names_the_samples_that_are_to_blame(tmp_path, caplog, held_back):
    data = Sampled(numbered(60, at_5=math.nan, at_14=math.inf))  # both are trained on, also where some are held back
    config = settings(tmp_path, epochs=1, batch_size=4, validation_split=held_back)

    Trainer(nn.Linear(3, 3), SimpleNamespace(), config, PAIRS).train(data)

    told = [place for event in events(tmp_path, "step_skipped") for place in event["bad_samples"]]
    assert sorted(told) == ["row 14: infinity in column '0'", "row 5: NaN in column '0'"]
    assert all(place in caplog.text for place in told)


def test_samples_that_can_not_be_read_again_do_not_end_the_run_that_wants_an_explanation():
    class Gone(TensorReader):
        def fetch(self, indices, epoch):
            raise OSError("the disk is away")

    data = numbered(12, at_3=math.nan)

    assert build_source(Gone(data.tensors), BatchPlan(4, 12)).bad_samples(0, 0, world_size=1) == []
    assert build_source(TensorReader(data.tensors), BatchPlan(4, 12)).bad_samples(0, 0, world_size=1) != []
