import json
import math
import pickle
from collections import Counter, OrderedDict, defaultdict, namedtuple
from enum import IntEnum

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ray_trainer.checkpoint.decoding import decode
from ray_trainer.checkpoint.encoding import encode
from ray_trainer.checkpoint.tensors import read_tensors, tensor_image
from ray_trainer.errors import CheckpointCorruptError, CheckpointError


def through_bytes(state):
    """What comes back after the JSON and the tensors have been bytes."""
    encoded = encode(state, ("state",))
    text = json.dumps(encoded.tree, allow_nan=False)
    files = {name: b"".join(tensor_image("file", tensors).chunks()) for name, tensors in encoded.tensors.items()}
    return decode(json.loads(text), {name: read(data) for name, data in files.items()})


def read(data, block=7):
    """The tensors of a file that comes in small pieces."""
    return read_tensors((data[at : at + block] for at in range(0, len(data), block)), len(data), "file")


def same(a, b):
    """Equal in type and in every bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    return a == b


def raw(tensor):
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.booleans(), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(plain)
@settings(max_examples=150, deadline=None, database=None)
def test_any_nested_plain_state_comes_back_equal_with_its_types(state):
    assert same(through_bytes(state), state)


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.bool),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
    *(torch.complex32, torch.float8_e8m0fnu),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (5,), (2, 3)], ids=str)
def test_tensor_of_every_type_and_shape_comes_back_bit_for_bit(dtype, shape):
    count = math.prod(shape) * dtype.itemsize
    content = torch.arange(count, dtype=torch.uint8) % 2 if dtype == torch.bool else torch.arange(count) * 37
    tensor = content.to(torch.uint8).view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)

    assert same(through_bytes({"x": tensor}), {"x": tensor})


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.arange(6).reshape(2, 3).T,
        np.array(3.5),
        np.zeros((0, 4), dtype=np.int8),
        np.array([1, 2], dtype=">i4"),
        np.array(["2024-01-01"], dtype="datetime64[D]"),
        np.array([1 + 2j]),
        np.array([True, False]),
        np.float64("nan"),
        np.int64(-3),
        np.bool_(True),
    ],
    ids=lambda value: f"{value.dtype}{value.shape}",
)
def test_numpy_arrays_and_scalars_come_back_bit_for_bit(array):
    result = through_bytes([array])[0]

    assert type(result) is type(array)
    assert result.dtype == array.dtype
    assert result.shape == array.shape
    assert result.tobytes() == array.tobytes()


def test_restored_tensors_and_arrays_can_be_changed_in_place():
    tensor, array = through_bytes([torch.zeros(3), np.zeros(3)])

    tensor += 1
    array += 1

    assert tensor.tolist() == array.tolist() == [1, 1, 1]


def test_tensors_that_are_one_are_stored_once_and_are_one_again():
    shared = torch.randn(4, 4)
    state = {"a": shared, "b": shared, "part": shared[0]}

    encoded = encode(state)
    result = through_bytes(state)

    assert sorted(encoded.tensors["trainer"]) == ["a", "part"]
    assert result["a"].data_ptr() == result["b"].data_ptr()
    assert same(result["part"], shared[0])


def test_memory_format_survives():
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)

    result = through_bytes(image)

    assert result.stride() == image.stride()
    assert torch.equal(result, image)


@pytest.mark.parametrize(
    "view",
    [torch.randn(4, 6)[:, ::2], torch.randn(4).expand(3, 4), torch.randn(3, dtype=torch.complex64).conj()],
    ids=["strided", "expanded", "conjugated"],
)
def test_views_are_stored_as_what_they_show(view):
    assert torch.equal(through_bytes(view), view)


def test_names_that_would_collide_are_told_apart():
    state = {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}, "__metadata__": torch.ones(2)}

    assert same(through_bytes(state), state)


def test_keys_that_look_like_the_format_are_kept():
    state = {"$tensor": "not one", "$": {"$tuple": [1]}}

    assert same(through_bytes(state), state)


def test_model_state_keeps_its_order_and_its_metadata():
    state = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).state_dict()

    result = through_bytes(state)

    assert same(result, state)
    assert result._metadata == state._metadata


def optimizers(parameters):
    yield torch.optim.AdamW(parameters, lr=0.1)
    yield torch.optim.AdamW(parameters, lr=torch.tensor(0.1), amsgrad=True)
    yield torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    yield torch.optim.LBFGS(parameters)
    yield torch.optim.Adagrad(parameters)


@pytest.mark.parametrize("index", range(5))
def test_optimizer_state_comes_back_exactly(index):
    model = nn.Linear(3, 2)
    optimizer = list(optimizers(list(model.parameters())))[index]

    def loss():
        optimizer.zero_grad()
        value = model(torch.ones(4, 3)).square().sum()
        value.backward()
        return value

    optimizer.step(loss)

    assert same(through_bytes(optimizer.state_dict()), optimizer.state_dict())


SCHEDULERS = {
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [2, 2, 5]},
    "CosineAnnealingLR": {"T_max": 5},
    "CosineAnnealingWarmRestarts": {"T_0": 2},
    "OneCycleLR": {"max_lr": 1.0, "total_steps": 10},
    "ReduceLROnPlateau": {},
    "LambdaLR": {"lr_lambda": lambda step: 0.5},
    "PolynomialLR": {},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_state_comes_back_exactly(name):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = getattr(torch.optim.lr_scheduler, name)(optimizer, **SCHEDULERS[name])

    state = scheduler.state_dict()

    assert same(through_bytes(state), state)


class Colour(IntEnum):
    RED = 1


Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (lambda: None, "function"),
        (nn.Linear(1, 1), "Linear"),
        (Colour.RED, "Colour"),
        (Pair(1, 2), "Pair"),
        ({1, 2}, "set"),
        (defaultdict(int), "defaultdict"),
        (np.array([object()]), "object"),
        (torch.zeros(2, device="meta"), "meta"),
        (torch.zeros(2, 2).to_sparse(), "sparse"),
        ({(1, frozenset()): 1}, "tuple"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_anything_else_is_refused_with_its_path(value, what):
    with pytest.raises(CheckpointError, match=rf"hooks\.my_hook\.callback.*{what}"):
        encode({"hooks": {"my_hook": {"callback": value}}})


def test_state_that_contains_itself_is_refused():
    state: dict[str, object] = {}
    state["me"] = state

    with pytest.raises(CheckpointError, match="part of itself"):
        encode(state)


def test_counters_and_ordered_dicts_keep_their_type():
    state = {"counter": Counter({3: 2}), "ordered": OrderedDict([("b", 1), ("a", 2)])}

    assert same(through_bytes(state), state)


def test_safetensors_itself_reads_what_is_written():
    tensors = {
        "weight": torch.randn(3, 4),
        "half": torch.randn(5).bfloat16(),
        "flag": torch.tensor([True, False, True]),
        "count": torch.tensor(7),
        "nothing": torch.empty(0, 2),
        "transposed": torch.randn(2, 3).T,
        'ünïcode "name"': torch.ones(1),
    }

    result = safetensors.torch.load(b"".join(tensor_image("file", tensors).chunks()))

    assert result.keys() == tensors.keys()
    assert all(torch.equal(result[name], tensors[name]) for name in tensors)
    assert all(result[name].dtype == tensors[name].dtype for name in tensors)


def test_size_is_known_before_writing():
    file = tensor_image("file", {"a": torch.randn(3), "b": torch.zeros(2, dtype=torch.int8)})

    assert file.size_bytes == sum(len(chunk) for chunk in file.chunks())


def test_what_safetensors_writes_is_read():
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5)}

    result = read(safetensors.torch.save(tensors))

    assert result.keys() == tensors.keys()
    assert all(same(result[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}},
        {"a": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [1 << 40, (1 << 40) + 8]}},
        {"a": {"dtype": "OBJECT", "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        },
        {"a": {}},
        {"a": None},
        [1, 2],
        "text",
    ],
    ids=str,
)
def test_forged_header_is_refused(header):
    text = json.dumps(header).encode()

    with pytest.raises(CheckpointCorruptError, match="file"):
        read(len(text).to_bytes(8, "little") + text + bytes(8))


@pytest.mark.parametrize("data", [b"", b"\xff" * 8, b"\xff" * 64, pickle.dumps([1]), b"[" * 100_000])
def test_bytes_that_are_no_safetensors_are_refused(data):
    with pytest.raises(CheckpointCorruptError, match="file"):
        read(data)


@pytest.mark.parametrize(
    "tree",
    [
        {"$tensor": "trainer/missing"},
        {"$tensor": "trainer/a", "dtype": "nn"},
        {"$tensor": "trainer/a", "stride": [1 << 40]},
        {"$array": "trainer/a", "dtype": "O", "shape": [1]},
        {"$scalar": "00", "dtype": "O8"},
        {"$pickle": "gASVAAAA"},
        {"$int": "no"},
        {"$bytes": "***"},
        {"$dict": [[[], 1]]},
    ],
    ids=str,
)
def test_forged_tree_is_refused(tree):
    with pytest.raises(CheckpointCorruptError):
        decode(tree, {"trainer": {"a": torch.zeros(2)}})
