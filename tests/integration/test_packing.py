"""Documents become rows of tokens: the same ones whatever Ray Data does, each token predicted once."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import ray.data
import torch
from cluster_runs import ray_of_two_cpus
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from ray_trainer import Experiment, TrainingConfig
from ray_trainer.cluster import ClusterConfig, fit, pack_documents
from ray_trainer.cluster.packing import packed
from ray_trainer.cluster.shards import index_ray_dataset
from ray_trainer.errors import ConfigError, DataError
from ray_trainer.seeding import set_random_seed

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test

END, VOCABULARY, LENGTH = 0, 64, 24
TEXTS = ["abc" * (number * 7 % 11) + f" {number}" for number in range(157)] + [""] * 3


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with ray_of_two_cpus():
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield


def tokenize(text: str) -> list[int]:
    """Letters and digits as 1 to 36, all else as 37."""
    return [int(letter, 36) + 1 if letter.isalnum() else 37 for letter in text]


def documents(num_blocks: int, texts: list[str] = TEXTS) -> ray.data.Dataset:
    return ray.data.from_items([{"text": text, "url": "-"} for text in texts], override_num_blocks=num_blocks)


def packed_by_ray(dataset: ray.data.Dataset, tokenizer: Any = tokenize, **settings: Any) -> dict[str, Any]:
    """All rows, in their order, as `fit` would see them."""
    settings = {"end_of_document": END, "documents_per_group": 50} | settings
    blocks = index_ray_dataset(pack_documents(dataset, tokenizer, LENGTH, **settings))
    return blocks.fetch(np.arange(len(blocks)))


def packed_by_hand(texts: list[str] = TEXTS, documents_per_group: int = 50) -> torch.Tensor:
    """The input of the model, token by token."""
    rows = []
    for start in range(0, len(texts), documents_per_group):
        tokens = [token for text in texts[start : start + documents_per_group] for token in [*tokenize(text), END]]
        for begin in range(0, len(tokens) - 1, LENGTH - 1):
            row = tokens[begin : begin + LENGTH]
            rows.append(row + [END] * (LENGTH - len(row)))
    return torch.tensor(rows, dtype=torch.int32)


@given(
    lengths=st.lists(st.integers(0, 12), max_size=30),
    length=st.integers(2, 9),
)
@settings(deadline=None, max_examples=300)
def test_each_token_but_the_first_of_a_document_is_predicted_once_and_from_its_document(lengths, length):
    tokens = iter(range(1, 1000))
    group = [np.array([next(tokens) for _ in range(size)], dtype=np.int32) for size in lengths]
    document_of = {token: number for number, document in enumerate(group) for token in document.tolist()}

    rows = packed(group, length, end_of_document=0)

    assert all(column.dtype == np.int32 for column in rows.values())
    is_predicted = rows["labels"][:, 1:] != -100
    predicted = rows["labels"][:, 1:][is_predicted].tolist()
    assert [token for token in predicted if token] == [token for document in group for token in document.tolist()[1:]]
    assert predicted.count(0) == sum(size > 0 for size in lengths)  # what would an empty document be predicted from?
    assert (rows["labels"][:, 0] == -100).all()
    from_the_same = rows["document_ids"][:, 1:] == rows["document_ids"][:, :-1]
    assert from_the_same[is_predicted].all()
    assert (rows["position_ids"][:, 1:][is_predicted] == rows["position_ids"][:, :-1][is_predicted] + 1).all()
    for row, numbers in zip(rows["input_ids"], rows["document_ids"], strict=True):
        groups = {
            number: {document_of[token] for token in row[numbers == number].tolist() if token} for number in numbers
        }
        assert all(len(members) <= 1 for members in groups.values())
        assert -1 not in groups or not groups[-1]


@pytest.mark.parametrize("num_blocks", [1, 13])
def test_rows_do_not_depend_on_the_blocks_that_documents_lie_in(cluster, num_blocks):
    assert torch.equal(packed_by_ray(documents(num_blocks))["input_ids"], packed_by_hand())


def test_rows_do_not_depend_on_steps_before_the_packing(cluster):
    kept = [text for number, text in enumerate(TEXTS) if number % 3]
    numbered = ray.data.range(len(TEXTS), override_num_blocks=9)
    texts = numbered.map_batches(lambda b: {"text": [TEXTS[i] for i in b["id"] if i % 3]}, batch_size=50)

    assert torch.equal(packed_by_ray(texts)["input_ids"], packed_by_hand(kept))


def test_documents_of_files_are_packed_in_the_order_of_the_files(cluster, tmp_path):
    for part, start in enumerate(range(0, len(TEXTS), 40)):
        lines = [json.dumps({"body": text}) for text in TEXTS[start : start + 40]]
        (tmp_path / f"part{part}.jsonl").write_text("\n".join(lines))

    rows = packed_by_ray(ray.data.read_json(str(tmp_path), lines=True), column="body")

    assert torch.equal(rows["input_ids"], packed_by_hand())


def test_tokenizer_of_hugging_face_is_used_as_it_is(cluster):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {letter: number + 1 for number, letter in enumerate("0123456789abcdefghijklmnopqrstuvwxyz")}
    model = tokenizers.models.WordLevel(vocabulary | {"?": 37}, unk_token="?")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")

    assert torch.equal(packed_by_ray(documents(4), tokenizer)["input_ids"], packed_by_hand())


class Reader(nn.Module):
    """One layer of attention within documents."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, 16)
        self.place = nn.Embedding(LENGTH, 16)
        self.next_token = nn.Linear(16, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, document_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        may_see = (document_ids[:, :, None] == document_ids[:, None, :]).tril()
        x = self.token(input_ids) + self.place(position_ids)
        return self.next_token(F.scaled_dot_product_attention(x, x, x, attn_mask=may_see))


def test_a_packed_document_has_the_logits_that_it_has_alone():
    texts = [[5, 6, 7, 8], [9] * 6, [5, 6, 7, 8]]
    rows = packed([np.array(text, dtype=np.int32) for text in texts], LENGTH, END)
    (row,) = ({name: torch.from_numpy(column) for name, column in rows.items()},)
    torch.manual_seed(0)
    model = Reader()

    together = model(row["input_ids"], row["document_ids"], row["position_ids"])[0]
    alone = model(torch.tensor([[*texts[0], END]]), torch.zeros(1, 5), torch.arange(5)[None])[0]

    torch.testing.assert_close(together[:5], alone)
    torch.testing.assert_close(together[12:17], alone)


def test_fit_trains_on_packed_rows_and_counts_each_token_once(cluster, tmp_path: Path):
    experiment = Experiment(
        lambda config: Reader(),
        lambda config, training: {"train": pack_documents(documents(5), tokenize, LENGTH, end_of_document=END)},
    )

    result = fit(
        experiment,
        TrainingConfig(epochs=1, batch_size=4, learning_rate=1e-12, warmup_ratio=0),
        ClusterConfig(num_workers=2, name="packed", storage_path=str(tmp_path)),
    )

    rows = packed([np.array(tokenize(text), dtype=np.int32) for text in TEXTS], LENGTH, END)
    assert result.results["metrics_summary"]["train/loss"][0] == pytest.approx(loss_by_hand(rows), rel=1e-5)


def loss_by_hand(rows: dict[str, Any]) -> float:
    """Mean over all predicted tokens, for a model that hardly learns."""
    set_random_seed(TrainingConfig().random_seed)
    model = Reader()
    columns = {name: torch.from_numpy(column) for name, column in rows.items()}
    logits = model(columns["input_ids"], columns["document_ids"], columns["position_ids"])
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), columns["labels"][:, 1:].flatten().long()).item()


def test_wrong_arguments_are_refused_all_at_once():
    with pytest.raises(ConfigError) as caught:
        pack_documents(SimpleNamespace(), "gpt2", 1, documents_per_group=0)
    for problem in ("tokenizer is 'gpt2'", "length is 1", "end_of_document is missing", "documents_per_group is 0"):
        assert problem in str(caught.value)


def test_missing_document_is_named_by_the_one_before_it(cluster):
    with pytest.raises(DataError, match="column 'text' holds None in the one after 'two'"):
        packed_by_ray(documents(1, ["one", "two", None]))


def test_tokens_that_are_not_whole_numbers_are_shown(cluster):
    with pytest.raises(DataError, match=r"tokenizer returned \[0.5\]"):
        packed_by_ray(documents(1, ["one"]), lambda text: [0.5])
