import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed as dist

from ray_trainer.checkpoint.encoding import encode
from ray_trainer.checkpoint.layout import pack_shards, pack_state
from ray_trainer.checkpoint.shards import ShardReader, pieces_and_table
from ray_trainer.errors import CheckpointCorruptError, CheckpointError


@pytest.fixture
def mesh():
    """Of this process alone."""
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded(mesh, tensor):
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(tensor, mesh, [Shard(0)])


def cut(tensor, bounds, dimension):
    """The pieces of a tensor between bounds, and their tables, by rank."""
    pieces, tables = {}, {}
    for rank, (start, end) in enumerate(zip([0, *bounds], [*bounds, tensor.shape[dimension]], strict=True)):
        piece = tensor.narrow(dimension, start, end - start)
        offsets = [start if place == dimension else 0 for place in range(tensor.dim())]
        entry = {"dtype": "float32", "shape": list(tensor.shape), "offsets": offsets, "lengths": list(piece.shape)}
        pieces[rank], tables[rank] = {"w": piece.clone()}, {"model": {"w": entry}}
    return pieces, tables


def put_together(pieces, tables, share=None):
    reader = ShardReader(tables, ["model"], share)
    for rank, file in reader.files:
        reader.take(rank, file, pieces[rank])
    return reader.tensors()["model"]["w"], [rank for rank, _ in reader.files]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_part_is_put_together_from_pieces_cut_anywhere(data):
    shape = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=3))
    dimension = data.draw(st.integers(0, len(shape) - 1))
    bounds = sorted(data.draw(st.lists(st.integers(0, shape[dimension]), max_size=4)))
    offsets = [data.draw(st.integers(0, length)) for length in shape]
    lengths = [data.draw(st.integers(0, end - start)) for start, end in zip(offsets, shape, strict=True)]
    tensor = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
    pieces, tables = cut(tensor, bounds, dimension)

    whole, _ = put_together(pieces, tables)
    part, _ = put_together(pieces, tables, lambda *_: (tuple(offsets), tuple(lengths)))

    assert torch.equal(whole, tensor)
    expected = tensor[tuple(slice(start, start + n) for start, n in zip(offsets, lengths, strict=True))]
    assert torch.equal(part, expected)


def test_pieces_that_hold_nothing_of_a_share_are_not_read():
    pieces, tables = cut(torch.arange(12.0).reshape(6, 2), [2, 4], 0)

    part, ranks = put_together(pieces, tables, lambda *_: ((3, 0), (1, 2)))

    assert part.tolist() == [[6.0, 7.0]]
    assert ranks == [1]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tables: tables.pop(1), "pieces of model/w are missing"),
        (lambda tables: tables[1]["model"]["w"].update(offsets=[5, 0]), "lies outside its tensor"),
        (lambda tables: tables[1]["model"]["w"].update(shape=[7, 2]), "a piece of another tensor"),
        (lambda tables: tables[1]["model"]["w"].pop("offsets"), "offsets"),
        (lambda tables: tables[0]["model"]["w"].update(dtype="nothing"), "nothing"),
        (lambda tables: tables.update({2: []}), "list"),
    ],
)
def test_tables_that_do_not_cover_a_tensor_are_refused(change, told):
    _, tables = cut(torch.arange(12.0).reshape(6, 2), [2], 0)
    change(tables)

    with pytest.raises(CheckpointCorruptError, match=told):
        ShardReader(tables, ["model"], None)


@pytest.mark.parametrize("change", [lambda piece: piece[:1], lambda piece: piece[:3], lambda piece: piece.double()])
def test_piece_that_is_not_what_its_table_says_is_refused(change):
    pieces, tables = cut(torch.arange(12.0).reshape(6, 2), [2], 0)
    reader = ShardReader(tables, ["model"], None)

    with pytest.raises(CheckpointCorruptError, match="rank 1 of model"):
        reader.take(1, "model", {"w": change(pieces[1]["w"])})


def test_tied_weights_are_stored_once_and_plain_tensors_are_no_shards(mesh):
    weight = torch.arange(6.0).reshape(3, 2)
    shared = sharded(mesh, weight)
    state = {"model": {"a": shared, "b": shared, "c": torch.ones(2)}, "optimizer": None}

    encoded = encode(state, file_of=lambda path: (path[0], path[1:]))
    pieces, table = pieces_and_table(encoded.shards)

    assert encoded.tree["model"]["a"] == encoded.tree["model"]["b"] == {"$tensor": "model/a"}
    assert torch.equal(pieces["model"]["a"], weight)
    assert table == {"model": {"a": {"dtype": "float32", "shape": [3, 2], "offsets": [0, 0], "lengths": [3, 2]}}}
    assert [image.name for image in pack_shards(state, 2)] == ["model.shard00002.safetensors", "shard00002.json"]
    assert "c" in encoded.tensors["model"]


def test_state_without_shards_has_no_files_of_them():
    state = {"model": {"w": torch.ones(2)}, "optimizer": {"state": {}}}

    assert pack_shards(state, 1) == []
    assert [image.name for image in pack_state(state).images] == ["model.safetensors", "trainer.json"]


def test_sharded_tensor_in_another_part_is_refused_by_name(mesh):
    state = {"model": {}, "hooks": {"average": {"w": sharded(mesh, torch.ones(2, 2))}}}

    with pytest.raises(CheckpointError, match=r"hooks\.average\.w: a sharded tensor, outside of model and optimizer"):
        pack_state(state)
