import pickle
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import ray.data
import torch

from ray_trainer.cluster.shards import RayBlocks, index_ray_dataset
from ray_trainer.data.module import UniversalDataModule
from ray_trainer.data.order import SampleOrder
from ray_trainer.data.source import BatchPlan, StepBatch, build_source
from ray_trainer.errors import DataError

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

NUM_ROWS = 1003

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    temp_dir = str(tmp_path_factory.mktemp("ray"))
    ray.init(address="local", num_cpus=2, include_dashboard=False, _temp_dir=temp_dir, object_store_memory=300_000_000)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


def numbers(num_blocks: int = 7, num_rows: int = NUM_ROWS) -> ray.data.Dataset:
    dataset = ray.data.range(num_rows, override_num_blocks=num_blocks)
    return dataset.map_batches(lambda batch: {"id": batch["id"], "x": batch["id"] * 0.5})


def from_columns(columns: dict[str, Any], num_blocks: int = 1) -> ray.data.Dataset:
    return ray.data.from_arrow(pa.table(columns)).repartition(num_blocks)


def ids(step: StepBatch) -> list[int]:
    return [int(i) for micro_batch in step.micro_batches for i in micro_batch["id"]] if step.num_samples else []


def fetched(blocks: RayBlocks, rows: list[int]) -> dict[str, Any]:
    return blocks.fetch(np.array(rows))


@pytest.fixture(scope="module")
def blocks() -> RayBlocks:
    return index_ray_dataset(numbers())


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_see_each_row_once_in_the_order_of_the_seed(blocks, world_size):
    plans = [BatchPlan(8, 24, rank=rank, world_size=world_size) for rank in range(world_size)]
    steps = zip(*(build_source(blocks, plan).steps(3) for plan in plans), strict=True)
    seen = [i for step in steps for part in step for i in ids(part)]
    assert seen == SampleOrder(NUM_ROWS, 42).indices(3, 0, NUM_ROWS).tolist()


def test_starting_late_opens_only_what_is_needed_and_gives_the_rest(blocks):
    source = build_source(blocks, BatchPlan(8, 24))
    whole = [ids(step) for step in source.steps(1)]
    assert [ids(step) for step in source.steps(1, 38)] == whole[38:]


def test_batches_hold_the_values_of_the_pipeline_as_tensors(blocks):
    batch = fetched(blocks, [1002, 0, 500, 500])
    assert torch.equal(batch["id"], torch.tensor([1002, 0, 500, 500]))
    assert torch.equal(batch["x"], torch.tensor([501.0, 0, 250, 250], dtype=torch.float64))
    batch["x"] += 1  # a copy, not the object store
    assert fetched(blocks, [0])["x"].item() == 0


def test_images_keep_their_shape():
    images = np.random.default_rng(0).integers(0, 255, (100, 8, 8), dtype=np.uint8)
    indexed = index_ray_dataset(ray.data.from_numpy_refs([ray.put(images[:40]), ray.put(images[40:])]))
    rows = [99, 3, 40, 39]
    assert np.array_equal(fetched(indexed, rows)["data"].numpy(), images[rows])


def test_rows_are_those_of_the_files_in_their_order(tmp_path):
    for part in range(4):
        start = part * 50
        table = pa.table(
            {
                "id": list(range(start, start + 50)),
                "text": [f"row {i}" for i in range(start, start + 50)],
                "tokens": [[i, i + 1, i + 2] for i in range(start, start + 50)],
                "ragged": [[i] * (i % 3) for i in range(start, start + 50)],
                "flag": [i % 2 == 0 for i in range(start, start + 50)],
            }
        )
        pq.write_table(table, tmp_path / f"part{part}.parquet")
    indexed = index_ray_dataset(ray.data.read_parquet(str(tmp_path)))
    batch = fetched(indexed, [199, 0, 101])
    assert batch["id"].tolist() == [199, 0, 101]
    assert batch["text"] == ["row 199", "row 0", "row 101"]
    assert torch.equal(batch["tokens"], torch.tensor([[199, 200, 201], [0, 1, 2], [101, 102, 103]]))
    assert batch["ragged"] == [[199], [], [101, 101]]
    assert batch["flag"].tolist() == [False, True, False]


def test_a_collator_is_given_rows(blocks):
    source = build_source(blocks, BatchPlan(4, 4, shuffle=False), lambda rows: [row["x"].item() for row in rows])
    assert next(source.steps(0)).micro_batches == [[0, 0.5, 1, 1.5]]


def test_the_fingerprint_is_that_of_the_content_not_of_the_blocks(blocks):
    assert index_ray_dataset(numbers(num_blocks=3)).fingerprint() == blocks.fingerprint()
    others = [
        numbers(num_rows=NUM_ROWS - 1),
        numbers().map_batches(lambda b: {**b, "x": np.where(b["id"] == 700, -1.0, b["x"])}),
        numbers().map_batches(lambda b: {"id": b["id"], "y": b["x"]}),
        numbers().map_batches(lambda b: {"id": b["id"], "x": b["x"].astype(np.float32)}),
        numbers().map_batches(lambda b: {key: value[::-1] for key, value in b.items()}, batch_size=None),
    ]
    prints = {index_ray_dataset(other).fingerprint() for other in others}
    assert len(prints | {blocks.fingerprint()}) == 6


def test_the_fingerprint_sees_every_number_of_a_row():
    pairs = np.arange(20, dtype=np.float32).reshape(10, 2)
    changed = pairs.copy()
    changed[7, 1] += 1
    prints = {index_ray_dataset(ray.data.from_numpy(rows)).fingerprint() for rows in (pairs, pairs.copy(), changed)}
    assert len(prints) == 2


def test_a_share_can_be_held_back_for_validation_of_data_in_windows():
    indexed = index_ray_dataset(numbers(), full_shuffle_bytes=0, window_pack_bytes=512)
    data = UniversalDataModule(indexed, val_split=0.1)
    sources = [data.train_source(BatchPlan(8, 24)), data.val_source(BatchPlan(8, 24))]
    train, val = ([i for step in source.steps(0) for i in ids(step)] for source in sources)
    assert len(val) == 100
    assert sorted(train + val) == list(range(NUM_ROWS))


def test_data_larger_than_the_limit_is_shuffled_in_windows_of_packs():
    indexed = index_ray_dataset(numbers(), full_shuffle_bytes=0, window_pack_bytes=512)
    assert indexed.is_windowed
    assert len(indexed.packs) > 25
    assert sum(indexed.block_sizes) == NUM_ROWS
    source = build_source(indexed, BatchPlan(8, 24))
    seen = [i for step in source.steps(0) for i in ids(step)]
    assert sorted(seen) == list(range(NUM_ROWS))
    assert indexed.packs_loaded < 3 * len(indexed.packs)
    values = fetched(indexed, [1002, 5, 700, 5])
    assert values["x"].tolist() == [501, 2.5, 350, 2.5]


def test_strings_of_several_packs_come_in_the_order_that_was_asked_for():
    texts = [f"text {i}" for i in range(60)]
    indexed = index_ray_dataset(from_columns({"text": texts}, 3), full_shuffle_bytes=0, window_pack_bytes=128)
    assert len(indexed.packs) > 2
    assert fetched(indexed, [59, 0, 30, 1, 30])["text"] == [texts[i] for i in [59, 0, 30, 1, 30]]


@ray.remote
class Worker:
    def __init__(self, pickled: bytes) -> None:
        self.blocks: RayBlocks = pickle.loads(pickled)

    def ids(self, start: int) -> list[list[int]]:
        return [ids(step) for step in build_source(self.blocks, BatchPlan(8, 100)).steps(0, start)]


def test_a_worker_that_is_replaced_goes_on_where_the_killed_one_stopped(blocks):
    first = Worker.remote(ray.cloudpickle.dumps(blocks))
    whole = ray.get(first.ids.remote(0))
    ray.kill(first)
    second = Worker.remote(ray.cloudpickle.dumps(blocks))
    assert ray.get(second.ids.remote(7)) == whole[7:]


def test_an_empty_dataset_is_refused():
    with pytest.raises(DataError, match="no rows"):
        index_ray_dataset(numbers().filter(lambda row: False))


def test_empty_blocks_among_others_are_no_matter():
    indexed = index_ray_dataset(numbers().filter(lambda row: row["id"] >= 500))
    assert fetched(indexed, [0, len(indexed) - 1])["id"].tolist() == [500, 1002]


def test_a_pipeline_that_fails_is_an_error_of_the_data():
    def broken(row: dict[str, Any]) -> dict[str, Any]:
        raise OSError("disk on fire")

    with pytest.raises(DataError, match="disk on fire"):
        index_ray_dataset(numbers().map(broken))


def test_columns_that_change_their_type_are_named():
    dataset = from_columns({"x": [1, 2]}).union(from_columns({"x": [1.5, 2.5]}))
    with pytest.raises(DataError, match="x: int64"):
        index_ray_dataset(dataset)


def test_rows_that_differ_after_they_were_computed_again_are_refused(blocks):
    other = index_ray_dataset(numbers().map_batches(lambda b: {"id": b["id"], "x": -b["x"]}))
    rebuilt = pickle.loads(ray.cloudpickle.dumps(blocks))
    rebuilt.packs = other.packs
    with pytest.raises(DataError, match="came out different"):
        fetched(rebuilt, [0])
