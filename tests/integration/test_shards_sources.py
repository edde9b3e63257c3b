"""Rows of a Ray Dataset are the same from any source, when memory is short, and when the node that held them died."""

import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
import ray
import ray.data
import torch
from cluster_runs import short_directory, whole_lines
from experiments import Points, carry_out, prepare
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import nn

from ray_trainer import DefaultHooks, Experiment, TaskSpec, TrainingConfig
from ray_trainer.cluster import ClusterConfig, fit
from ray_trainer.cluster.shards import RayBlocks, index_ray_dataset
from ray_trainer.data.order import SampleOrder
from ray_trainer.data.source import BatchPlan, build_source
from ray_trainer.errors import DataError

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test

MB = 1_000_000
STORE_BYTES = 100 * MB
NUM_ROWS, NUM_FILES = 60, 3
ROWS = {
    "id": list(range(NUM_ROWS)),
    "features": [[i * 0.5, i * 0.25] for i in range(NUM_ROWS)],
    "labels": [i % 3 for i in range(NUM_ROWS)],
}


@pytest.fixture(scope="module")
def temp_dir() -> Iterator[str]:
    with short_directory() as path:
        yield path


@pytest.fixture(scope="module")
def cluster(temp_dir: str) -> Iterator[Cluster]:
    """A head node with two CPUs and little memory, where this process is the driver."""
    head = {
        "num_cpus": 2,
        "object_store_memory": STORE_BYTES,
        "include_dashboard": False,
        "temp_dir": temp_dir,
        "_system_config": {"health_check_period_ms": 1000, "health_check_failure_threshold": 5},
    }
    cluster = Cluster(initialize_head=True, connect=True, head_node_args=head)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield cluster
    ray.shutdown()
    cluster.shutdown()


# ---- sources ----


def tables() -> list[pa.Table]:
    return [pa.table(ROWS).slice(start, NUM_ROWS // NUM_FILES) for start in range(0, NUM_ROWS, NUM_ROWS // NUM_FILES)]


def write_parquet(filesystem: pyarrow.fs.FileSystem, directory: str) -> None:
    for number, table in enumerate(tables()):
        pq.write_table(table, f"{directory}/part{number}.parquet", filesystem=filesystem)


def write_jsonl(filesystem: pyarrow.fs.FileSystem, directory: str) -> None:
    for number, table in enumerate(tables()):
        with filesystem.open_output_stream(f"{directory}/part{number}.jsonl") as file:
            file.write("".join(json.dumps(row) + "\n" for row in table.to_pylist()).encode())


def write_images(filesystem: pyarrow.fs.FileSystem, directory: str) -> None:
    image = pytest.importorskip("PIL.Image")
    for number in range(NUM_ROWS):
        with filesystem.open_output_stream(f"{directory}/{number:02}.png") as file:
            image.fromarray(picture(number)).save(file, "PNG")


def picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 255, (4, 5, 3), dtype=np.uint8)


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[pyarrow.fs.FileSystem, str]:
    """A file system, and an empty directory on it."""
    if request.param == "disk":
        return pyarrow.fs.LocalFileSystem(), str(tmp_path)
    return on_s3(request.getfixturevalue("s3_server"))


def on_s3(server: Any) -> tuple[pyarrow.fs.FileSystem, str]:
    bucket = server.new_bucket()
    filesystem, _ = pyarrow.fs.FileSystem.from_uri(server.uri(bucket))
    return filesystem, f"{bucket}/rows"


@pytest.fixture(scope="module")
def in_memory(cluster: Cluster) -> RayBlocks:
    return index_ray_dataset(ray.data.from_arrow(tables()))


def everything(blocks: RayBlocks) -> dict[str, Any]:
    return blocks.fetch(np.arange(len(blocks)))


@pytest.mark.parametrize(
    ("write", "read"),
    [(write_parquet, ray.data.read_parquet), (write_jsonl, ray.data.read_json)],
    ids=["parquet", "jsonl"],
)
def test_rows_of_files_are_those_in_memory_in_the_same_order(in_memory, place, write: Any, read: Any):
    filesystem, directory = place
    write(filesystem, directory)

    blocks = index_ray_dataset(read(directory, filesystem=filesystem))

    assert everything(blocks)["id"].tolist() == ROWS["id"]
    torch.testing.assert_close(everything(blocks), everything(in_memory), rtol=0, atol=0)
    assert blocks.fingerprint() == in_memory.fingerprint()


def test_images_come_in_the_order_of_their_files(cluster, place):
    filesystem, directory = place
    write_images(filesystem, directory)

    blocks = index_ray_dataset(ray.data.read_images(directory, filesystem=filesystem))

    assert np.array_equal(
        everything(blocks)["image"].numpy(), np.stack([picture(number) for number in range(NUM_ROWS)])
    )


class Diary(DefaultHooks):
    """Writes down the rows of each step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[int] = []

    def build_model(self, config: SimpleNamespace) -> nn.Module:
        return Network(self)

    def build_hooks(self) -> "Diary":
        return self

    def on_step_end(self, record: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(self.rows) + "\n")
        self.rows = []


class Network(nn.Module):
    """One layer, and a diary."""

    def __init__(self, diary: Diary) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)
        self.diary = diary

    def forward(self, id: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        if self.training and torch.is_grad_enabled():
            self.diary.rows += id.tolist()
        return self.layer(features.float())


def test_fit_trains_on_files_of_s3_in_the_order_of_the_seed(cluster, s3_server, tmp_path):
    filesystem, directory = on_s3(s3_server)
    write_parquet(filesystem, directory)
    diary = Diary(tmp_path / "rows.jsonl")
    experiment = Experiment(
        diary.build_model,
        lambda config, training: {"train": ray.data.read_parquet(directory, filesystem=filesystem)},
        TaskSpec("rows", "tabular_classification", input_fields=["id", "features"]),
        build_hooks=diary.build_hooks,
    )

    fit(experiment, TrainingConfig(epochs=2, batch_size=25), ClusterConfig(storage_path=str(tmp_path), name="s3"))

    steps = whole_lines(diary.path)
    assert [len(step) for step in steps] == [25, 25, 10] * 2
    order = SampleOrder(NUM_ROWS, TrainingConfig().random_seed)
    seen = [row for step in steps for row in step]
    assert seen == [*order.indices(0, 0, NUM_ROWS), *order.indices(1, 0, NUM_ROWS)]


# ---- memory ----


def spilled_bytes(temp_dir: str) -> int:
    """What of the object store lies on disk now."""
    return sum(path.stat().st_size for path in Path(temp_dir).glob("session_2*/ray_spilled_objects*/*"))


def wide_rows(num_bytes: int) -> ray.data.Dataset:
    """Rows of 4 KB, all of them made of their number."""
    numbers = ray.data.range(num_bytes // 4000, override_num_blocks=num_bytes // (8 * MB))
    return numbers.map_batches(
        lambda batch: {"x": np.repeat(batch["id"][:, None].astype(np.float32), 1000, axis=1)}, batch_size=500
    )


@pytest.mark.parametrize("is_windowed", [False, True], ids=["shuffled fully", "shuffled in windows"])
def test_data_of_four_times_the_object_store_is_read_from_disk(cluster, temp_dir, is_windowed):
    settings = {"full_shuffle_bytes": 1, "window_pack_bytes": 2**21} if is_windowed else {}
    blocks = index_ray_dataset(wide_rows(4 * STORE_BYTES), **settings)
    assert spilled_bytes(temp_dir) > 2 * STORE_BYTES

    seen = []
    for step in build_source(blocks, BatchPlan(500, 500)).steps(0):
        (batch,) = step.micro_batches
        assert torch.equal(batch["x"].min(1).values, batch["x"].max(1).values)
        seen += batch["x"][:, 0].int().tolist()

    assert blocks.is_windowed == is_windowed
    assert sorted(seen) == list(range(len(blocks)))


# ---- loss of a node ----


@ray.remote(num_cpus=2)
class Busy:
    """Keeps other work away from a node."""

    def ready(self) -> None:
        """It is there."""


@ray.remote(num_cpus=1, max_retries=0)
def read_all(blocks: RayBlocks) -> list[list[float]] | str:
    try:
        return [everything(blocks)[name].flatten().tolist() for name in ("id", "x")]
    except DataError as error:
        return str(error)


def pipeline(noise: Callable[[], Any]) -> ray.data.Dataset:
    """Blocks of 200 KB: small ones would not be in the object store."""

    def widen(batch: dict[str, Any]) -> dict[str, Any]:
        x = np.repeat(batch["id"][:, None] * 0.5, 25, axis=1)
        return {"id": batch["id"], "x": x + noise().random(x.shape)}

    return ray.data.range(4000, override_num_blocks=4).map_batches(widen)


def test_rows_of_a_lost_node_are_computed_again_and_refused_if_they_differ(cluster):
    away_from_here = NodeAffinitySchedulingStrategy(cluster.head_node.node_id, soft=False)
    busy = Busy.options(scheduling_strategy=away_from_here).remote()
    ray.get(busy.ready.remote())
    node = cluster.add_node(num_cpus=2, object_store_memory=STORE_BYTES)
    settings = {"full_shuffle_bytes": 1, "window_pack_bytes": 2**18}
    seeded = index_ray_dataset(pipeline(lambda: np.random.default_rng(1)), **settings)
    unseeded = index_ray_dataset(pipeline(np.random.default_rng), **settings)
    assert nodes_with(seeded.packs + unseeded.packs) == {node.node_id}
    before, unseeded_before = (ray.get(read_all.remote(blocks)) for blocks in (seeded, unseeded))
    assert isinstance(unseeded_before, list)

    ray.kill(busy)
    cluster.remove_node(node, allow_graceful=False)
    cluster.wait_for_nodes()
    assert nodes_with(seeded.packs + unseeded.packs) == set()

    assert ray.get(read_all.remote(seeded)) == before
    assert "were lost and computed again, and came out different" in ray.get(read_all.remote(unseeded))


def nodes_with(packs: list[Any]) -> set[str]:
    return {node for location in ray.experimental.get_object_locations(packs).values() for node in location["node_ids"]}


# ---- what a resume reads ----


def test_late_start_in_an_epoch_opens_no_more_packs_than_an_early_one(cluster):
    blocks = index_ray_dataset(wide_rows(40 * MB), full_shuffle_bytes=1, window_pack_bytes=2**18)
    assert len(blocks.packs) > 100

    def packs_loaded(share: float) -> int:
        blocks.packs_loaded = 0
        blocks._open.clear()
        source = build_source(blocks, BatchPlan(100, 100))
        next(source.steps(0, int(share * source.steps_per_epoch())))
        return blocks.packs_loaded

    assert 0 < packs_loaded(0.9) <= 16  # two windows of eight packs
    assert 0 < packs_loaded(0.01) <= 16


@pytest.mark.parametrize("share", [0.01, 0.9])
def test_start_within_an_epoch_reads_the_samples_of_its_step_alone(share):
    points = Points(1000)
    read: list[int] = []
    points.on_read = read.append
    source = build_source(points, BatchPlan(10, 20, world_size=2))
    start = int(share * source.steps_per_epoch())

    next(source.steps(0, start))

    assert read == SampleOrder(1000, 42).indices(0, start * 20, start * 20 + 10).tolist()


def test_resumed_run_reads_as_little_late_in_an_epoch_as_early(tmp_path):
    def reads_until_the_next_step(step: int) -> int:
        run_dir = tmp_path / str(step)
        broken = prepare(run_dir, size=400, epochs=1)
        broken.diary.act("on_step_end", step, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit):
            carry_out(broken)
        resumed = prepare(run_dir, size=400, epochs=1)
        read: list[int] = []
        counts: list[int] = []
        resumed.train_set.on_read = read.append
        resumed.diary.on_call = lambda name, count: counts.append(len(read)) if name == "on_step_end" else None
        carry_out(resumed)
        assert len(resumed.diary.order) == 100
        return counts[0]

    early, late = reads_until_the_next_step(1), reads_until_the_next_step(90)

    assert early == late < 100  # those of a step, of the fingerprint and of the check of a first batch
