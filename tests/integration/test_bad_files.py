"""Bad files and rows of Ray Datasets: named before training, or left out in the same way at every start."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import ray.data
from experiments import events, metric_rows
from torch import nn

from ray_trainer import Experiment, TaskSpec, TrainingConfig
from ray_trainer.cluster import ClusterConfig, DataFiles, fit
from ray_trainer.cluster.shards import RayBlocks, index_ray_dataset
from ray_trainer.data.batch import BatchPlan
from ray_trainer.data.quarantine import BadDataPolicy
from ray_trainer.data.source import build_source
from ray_trainer.errors import DataError, StateMismatchError

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test

REFUSE, QUARANTINE = BadDataPolicy(), BadDataPolicy("quarantine", max_ratio=0.3)
NUM_FILES, ROWS = 5, 20


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    temp_dir = str(tmp_path_factory.mktemp("ray"))
    ray.init(address="local", num_cpus=2, include_dashboard=False, _temp_dir=temp_dir, object_store_memory=300_000_000)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


def table(part: int, **changes: Any) -> pa.Table:
    ids = range(part * ROWS, (part + 1) * ROWS)
    columns = {"id": list(ids), "x": [i * 0.5 for i in ids], "y": [i % 3 for i in ids]}
    return pa.table(columns | changes)


def write_files(directory: Path, kind: str, **changes: Any) -> Path:
    """Files of 20 rows each; the third one has the changed columns."""
    directory.mkdir(exist_ok=True)
    for part in range(NUM_FILES):
        content = table(part, **(changes if part == 2 else {}))
        if kind == "parquet":
            pq.write_table(content, directory / f"part{part}.parquet")
        else:
            lines = [json.dumps(row) + "\n" for row in content.to_pylist()]
            (directory / f"part{part}.jsonl").write_text("".join(lines))
    return directory


def with_value(value: float | None) -> list[float | None]:
    return [value if i == 7 else 0.0 for i in range(ROWS)]


def ids(blocks: RayBlocks, policy: BadDataPolicy = QUARANTINE) -> list[int]:
    """What an epoch of three ranks trains on, in order."""
    plans = [BatchPlan(8, 24, rank=rank, world_size=3, shuffle=False) for rank in range(3)]
    steps = zip(*(build_source(blocks, plan, bad_data=policy).steps(0) for plan in plans), strict=True)
    parts = [part for step in steps for part in step if part.num_samples]
    return [int(i) for part in parts for micro_batch in part.micro_batches for i in micro_batch["id"]]


def all_but(*rows: int) -> list[int]:
    return [i for i in range(NUM_FILES * ROWS) if i not in rows]


@pytest.mark.parametrize("value", [math.nan, None])
def test_number_that_is_none_is_named_with_row_and_file_or_left_out(tmp_path, value):
    dataset = ray.data.read_json(str(write_files(tmp_path, "json", x=with_value(value))), include_paths=True)
    word = "missing" if value is None else "NaN"

    refused = index_ray_dataset(dataset, policy=REFUSE)
    with pytest.raises(DataError, match=rf"row 47 \(file .*part2\.\w+\): {word} in column 'x'"):
        ids(refused, REFUSE)
    blocks = index_ray_dataset(dataset, full_shuffle_bytes=0, window_pack_bytes=512, policy=QUARANTINE)
    assert len(blocks.packs) > 3
    assert ids(blocks) == all_but(47)


def test_only_columns_of_the_task_are_searched(tmp_path):
    dataset = ray.data.read_json(str(write_files(tmp_path, "json", x=with_value(math.nan))))
    policy = BadDataPolicy(columns=frozenset({"id", "y"}))
    assert ids(index_ray_dataset(dataset, policy=policy), policy) == all_but()


def test_column_without_any_value_is_not_bad():
    dataset = ray.data.from_arrow(pa.table({"id": list(range(100)), "x": pa.nulls(100, pa.float64())})).repartition(3)
    assert ids(index_ray_dataset(dataset, policy=REFUSE), REFUSE) == all_but()


def test_files_with_other_columns_are_named_or_left_out(tmp_path):
    directory = write_files(tmp_path, "json", x=["text"] * ROWS)
    dataset = ray.data.read_json(str(directory), include_paths=True)

    with pytest.raises(DataError, match=r"x: float64 \[\] / string .*row 40 on \(file .*part2.jsonl\)"):
        index_ray_dataset(dataset, policy=REFUSE)
    blocks = index_ray_dataset(dataset, policy=QUARANTINE)
    assert ids(blocks) == all_but(*range(40, 60))
    assert blocks.left_out.num_rows == ROWS
    assert "part2.jsonl): another schema, x: double / string" in blocks.left_out.places[0]
    with pytest.raises(DataError, match=r"20 of 100 rows.*max_bad_ratio \(0.1\)"):
        index_ray_dataset(dataset, policy=BadDataPolicy("quarantine", max_ratio=0.1))


@pytest.mark.slow  # Ray tries again and again to read what is no Parquet
def test_files_that_cannot_be_read_together_are_named(tmp_path):
    directory = write_files(tmp_path, "parquet", x=["text"] * ROWS)
    (directory / "part9.parquet").write_bytes(b"garbage" * 9)
    files = DataFiles(ray.data.read_parquet, str(directory), transform=lambda dataset: dataset.drop_columns(["y"]))

    with pytest.raises(
        DataError, match=r"(?s)2 of 6 files.*part9.parquet: .*part2.parquet: another schema, x: double / s"
    ):
        files.index(REFUSE)


def test_line_that_was_cut_makes_its_file_bad(tmp_path):
    directory = write_files(tmp_path, "json")
    (directory / "part2.jsonl").write_bytes((directory / "part2.jsonl").read_bytes()[:-9])
    files = DataFiles(ray.data.read_json, [str(path) for path in sorted(directory.iterdir())])

    with pytest.raises(DataError, match=r"1 of 5 files cannot be trained on:\s+\S*part2.jsonl: \w+"):
        files.index(REFUSE)
    assert ids(files.index(QUARANTINE)) == all_but(*range(40, 60))


def test_failure_of_the_pipeline_itself_blames_no_file(tmp_path):
    def fail(batch: dict[str, Any]) -> dict[str, Any]:
        raise RuntimeError("no such column")

    files = DataFiles(ray.data.read_json, str(write_files(tmp_path, "json")), lambda data: data.map_batches(fail))
    with pytest.raises(DataError, match="no such column"):
        files.index(QUARANTINE)


def test_empty_files_among_many_are_no_matter(tmp_path):
    for kind, read in (("parquet", ray.data.read_parquet), ("json", ray.data.read_json)):
        directory = write_files(tmp_path / kind, kind)
        (directory / f"part2b.{'jsonl' if kind == 'json' else kind}").write_bytes(b"")
        if kind == "parquet":
            pq.write_table(table(0).slice(0, 0), directory / "part2c.parquet")
        assert ids(index_ray_dataset(read(str(directory)), policy=REFUSE), REFUSE) == all_but()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 3)

    def forward(self, x):
        return self.layer(x[:, None].float() / 100)


def experiment(directory: Path) -> Experiment:
    return Experiment(
        build_model=lambda config: Net(),
        build_datasets=lambda config, training: {"train": DataFiles(ray.data.read_json, str(directory))},
        task_spec=TaskSpec("rows", "tabular_classification", input_fields=["x"], target_field="y", metrics=["loss"]),
    )


def train(tmp_path: Path, name: str, num_workers: int = 1, **changes: Any) -> Path:
    training = TrainingConfig(
        **{
            "epochs": 2,
            "global_batch_size": 8,
            "log_every_n_steps": 1,
            "on_bad_data": "quarantine",
            "max_bad_ratio": 0.3,
            "tensorboard": False,
            **changes,
        }
    )
    cluster = ClusterConfig(name=name, storage_path=str(tmp_path), num_workers=num_workers)
    return Path(fit(experiment(tmp_path / "data"), training, cluster).run_dir.removeprefix("file://"))


def test_run_over_bad_files_goes_on_with_other_workers_and_changed_data_as_configured(tmp_path):
    directory = write_files(tmp_path / "data", "json", x=with_value(math.nan))
    whole = (directory / "part4.jsonl").read_text()
    (directory / "part4.jsonl").write_text(whole[:-9])
    with pytest.raises(DataError, match=r"1 of 5 files.*\s.*part4.jsonl"):
        train(tmp_path, "refused", on_bad_data="refuse")
    assert not (tmp_path / "refused").exists()

    train(tmp_path, "a", max_steps=3)
    run_dir = train(tmp_path, "a", num_workers=2, max_steps=13)  # 79 rows: 10 steps an epoch
    (told,) = events(run_dir, "data_quarantined")
    assert (told["num_files"], told["num_rows"]) == (1, 1)

    (directory / "part4.jsonl").write_text(whole)
    with pytest.raises(StateMismatchError, match="79 samples before, 99 now"):
        train(tmp_path, "a")
    train(tmp_path, "a", num_workers=2, on_data_change="restart_epoch")

    (changed,) = events(run_dir, "data_changed")
    assert (changed["step"], changed["epoch"], changed["action"]) == (13, 1, "restart_epoch")
    steps = [row["step"] for row in metric_rows(run_dir) if row["split"] == "train"]
    assert steps == list(range(1, 13 + 13 + 1))  # the second epoch again from its first sample, 99 rows
