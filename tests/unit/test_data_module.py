import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate

from ray_trainer.data import (
    BatchPlan,
    CollatorRegistry,
    DataLoaderConfig,
    DataLoaderFactory,
    TextCollator,
    UniversalDataModule,
)
from ray_trainer.data.batch import count_samples, to_device
from ray_trainer.data.module import split_rows
from ray_trainer.errors import ConfigError, DataError


class Task:
    def __init__(self, modality: str) -> None:
        self.modality = modality


class Tokenizer:
    """A token a character."""

    pad_token_id = 7
    eos_token_id = 8

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text], "attention_mask": [1] * len(text)}


class Texts(Dataset):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> str:
        return "a" * (index + 1)


TEXT, VISION, AUDIO = Task("text"), Task("vision"), Task("audio")
NUMBERS = TensorDataset(torch.arange(20))


def numbers(loader: "DataLoader | None") -> list[int]:
    assert loader is not None
    return [int(number) for (batch,) in loader for number in batch]


def module(train=NUMBERS, val=None, **options) -> UniversalDataModule:
    return UniversalDataModule(train, val, **{"batch_size": 4, "num_workers": 0, "val_split": 0.0, **options})


# Text collator


def test_texts_are_padded_masked_and_ignored_in_the_labels():
    batch = TextCollator(Tokenizer())(["abc", "a"])
    assert batch["input_ids"].tolist() == [[97, 98, 99], [97, 7, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[97, 98, 99], [97, -100, -100]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


@pytest.mark.parametrize(
    "samples",
    [
        [[1, 2, 3], [4]],
        [torch.tensor([1, 2, 3]), torch.tensor([4])],
        [{"input_ids": [1, 2, 3]}, {"input_ids": [4]}],
        [([1, 2, 3], [1, 2, 3]), (torch.tensor([4]), torch.tensor([4]))],
        [{"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1]}, {"input_ids": [4, 9, 9], "attention_mask": [1, 0, 0]}],
    ],
)
def test_token_ids_in_any_form_give_the_same_labels(samples):
    batch = TextCollator(Tokenizer())(samples)
    assert batch["labels"].tolist() == [[1, 2, 3], [4, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_one_label_a_text_stays_one_label():
    batch = TextCollator(Tokenizer())([{"text": "ab", "labels": 1}, ("c", 0), {"text": "d", "labels": 1, "id": 5}])
    assert batch["labels"].tolist() == [1, 0, 1]
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}


def test_further_sequences_are_padded_and_texts_left_out():
    samples = [
        {"input_ids": [1, 2], "token_type_ids": [1, 1], "source": "x", "weight": 0.5},
        {"input_ids": [1], "token_type_ids": [1], "source": "y", "weight": 2},
    ]
    batch = TextCollator(Tokenizer())(samples)
    assert batch["token_type_ids"].tolist() == [[1, 1], [1, 0]]
    assert batch["weight"].tolist() == [0.5, 2.0]
    assert "source" not in batch


def test_long_texts_are_cut():
    assert TextCollator(Tokenizer(), max_length=2)(["abc", "a"])["labels"].tolist() == [[97, 98], [97, -100]]


def test_without_a_padding_token_the_end_token_fills_up():
    tokenizer = Tokenizer()
    tokenizer.pad_token_id = None
    assert TextCollator(tokenizer)(["ab", "a"])["input_ids"].tolist() == [[97, 98], [97, 8]]


@pytest.mark.parametrize("sample", [{"image": 1}, 5, {"input_ids": [1, 2], "labels": [1]}])
def test_a_sample_without_matching_tokens_is_refused(sample):
    with pytest.raises(DataError, match="sample has"):
        TextCollator(Tokenizer())([sample])


# Registry


def test_built_in_collators_are_found_by_modality():
    registry = CollatorRegistry()
    assert [info.name for info in registry.list_collators()] == ["default", "vision", "text"]
    assert isinstance(registry.get_collator(TEXT, tokenizer=Tokenizer()), TextCollator)
    assert registry.get_collator(AUDIO) is registry.get_collator() is default_collate
    batch = registry.get_collator(VISION)([(torch.zeros(3, 2, 2), 1), (torch.ones(3, 2, 2), 0)])
    assert batch["pixel_values"].shape == (2, 3, 2, 2)
    assert batch["labels"].tolist() == [1, 0]


def test_a_text_collator_without_a_tokenizer_is_an_error():
    with pytest.raises(ValueError, match="tokenizer required for text collator"):
        CollatorRegistry().get_collator(TEXT)


def test_the_newest_collator_of_a_modality_is_chosen_and_any_by_its_name():
    registry = CollatorRegistry()
    registry.register("mine", "text", "Counts.")(lambda **_: len)
    assert registry.get_collator(TEXT) is len
    assert isinstance(registry.get_collator(TEXT, "text", tokenizer=Tokenizer()), TextCollator)
    with pytest.raises(ValueError, match=r"no collator 'yours'. There are: default, mine, text, vision"):
        registry.get_collator(collator_name="yours")


def test_the_shared_registry_forgets_on_reset():
    CollatorRegistry.get_instance().register("mine", "text")(lambda **_: len)
    assert CollatorRegistry.get_instance().get_collator(TEXT) is len
    CollatorRegistry.reset()
    assert "mine" not in {info.name for info in CollatorRegistry.get_instance().list_collators()}


# Loader factory


def test_loaders_with_the_same_seed_agree_and_epochs_differ():
    config = DataLoaderConfig(batch_size=4, num_workers=0)
    first, second = (DataLoaderFactory().create_dataloader(NUMBERS, config) for _ in range(2))
    epochs = [numbers(first) for _ in range(2)]
    assert epochs == [numbers(second) for _ in range(2)]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == list(range(20))


def test_a_list_of_tensors_can_be_loaded():
    config = DataLoaderConfig(batch_size=3, num_workers=0, shuffle=False, drop_last=True)
    loader = DataLoaderFactory().create_dataloader([torch.tensor(i) for i in range(7)], config)
    assert numbers(loader) == list(range(6))


def test_the_collator_is_the_configs_else_the_tasks():
    config = DataLoaderConfig(batch_size=2, num_workers=0, shuffle=False)
    loader = DataLoaderFactory().create_dataloader(Texts(), config, TEXT, Tokenizer())
    assert next(iter(loader))["labels"].tolist() == [[97, -100], [97, 97]]
    own = copy.copy(config)
    own.collate_fn = len
    assert next(iter(DataLoaderFactory().create_dataloader(Texts(), own, TEXT, Tokenizer()))) == 2


def test_a_loader_config_lists_every_error():
    config = DataLoaderConfig(batch_size=0, num_workers=-1, prefetch_factor=0)
    with pytest.raises(ConfigError, match=r"batch_size is 0(.|\n)*num_workers is -1(.|\n)*prefetch_factor is 0"):
        DataLoaderFactory().create_dataloader(NUMBERS, config)


# Module


@given(num_samples=st.integers(2, 300), fraction=st.floats(0.001, 0.999), seed=st.integers())
def test_a_split_holds_each_sample_once_and_leaves_something_on_both_sides(num_samples, fraction, seed):
    train, val = split_rows(num_samples, fraction, seed)
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(num_samples))
    assert len(train) >= 1
    assert len(val) == min(max(round(num_samples * fraction), 1), num_samples - 1)


def test_splits_follow_the_seed():
    assert split_rows(50, 0.2, 1)[1].tolist() == split_rows(50, 0.2, 1)[1].tolist()
    assert split_rows(50, 0.2, 1)[1].tolist() != split_rows(50, 0.2, 2)[1].tolist()


def test_a_module_holds_back_a_share_for_validation():
    split = module(val_split=0.25)
    train, val = numbers(split.train_dataloader()), numbers(split.val_dataloader())
    assert len(val) == 5
    assert val == sorted(val)
    assert sorted(train + val) == list(range(20))


def test_given_validation_data_is_used_whole_and_in_its_order():
    source = module(val=TensorDataset(torch.arange(5))).val_source(BatchPlan(2, 2, drop_last=True))
    assert [batch.tolist() for step in source.steps(0) for (batch,) in step.micro_batches] == [[0, 1], [2, 3], [4]]


def test_without_validation_data_and_split_there_is_none():
    assert module().val_dataloader() is None
    assert module().val_source(BatchPlan(2, 2)) is None


def test_each_pass_over_a_training_loader_is_a_new_epoch_and_any_can_be_asked_for():
    data = module()
    passes = [numbers(data.train_dataloader()), numbers(data.train_dataloader())]
    again = data.train_dataloader(epoch=1)
    assert passes[0] != passes[1]
    assert numbers(again) == numbers(again) == passes[1]


def test_a_training_source_equals_the_loader_of_the_same_epoch():
    data = module()
    source = data.train_source(BatchPlan(4, 4))
    assert [int(n) for step in source.steps(3) for (batch,) in step.micro_batches for n in batch] == numbers(
        data.train_dataloader(3)
    )


@pytest.mark.parametrize("data", [TensorDataset(torch.zeros(1)), DataLoader(NUMBERS)])
def test_what_cannot_be_split_is_refused(data):
    with pytest.raises(DataError, match="cannot be split"):
        module(data, val_split=0.5)


def test_texts_are_collated_with_the_tokenizer_but_tensors_are_taken_as_they_are():
    texts = module(Texts(), task_spec=TEXT, tokenizer=Tokenizer()).train_source(BatchPlan(2, 2))
    assert next(texts.steps(0)).micro_batches[0].keys() == {"input_ids", "attention_mask", "labels"}
    tensors = module(Subset(NUMBERS, range(9)), task_spec=TEXT, tokenizer=Tokenizer())
    assert isinstance(next(tensors.train_source(BatchPlan(2, 2)).steps(0)).micro_batches[0], tuple)


def test_a_registered_collator_is_used_for_its_modality():
    registry = CollatorRegistry()
    registry.register("mine", "vision")(lambda **_: len)
    source = module(task_spec=VISION, collator_registry=registry, val_split=0.5).train_source(BatchPlan(4, 4))
    assert next(source.steps(0)).micro_batches == [4]


# Batches


def test_samples_are_counted_by_the_first_tensor_that_has_a_length():
    assert count_samples({"weight": torch.tensor(1.0), "x": [torch.zeros(3, 2)]}) == 3
    assert count_samples(["a", "b"]) == count_samples({"ids": [[1, 2, 3], [4]]}) == 2
    with pytest.raises(DataError, match="no dimension"):
        count_samples({"loss": torch.tensor(1.0)})


def test_batches_of_any_depth_are_moved_and_what_is_no_tensor_stays():
    batch = {"x": torch.zeros(2), "more": [(torch.zeros(1), "text")]}
    moved = to_device(batch, torch.device("meta"))
    assert moved["x"].is_meta
    assert moved["more"][0][0].is_meta
    assert moved["more"][0][1] == "text"
    assert to_device(batch, torch.device("cpu")) is batch
