"""Plain PyTorch loaders, for code that wants one."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ray_trainer.data.collate import CollatorRegistry, HasModality
from ray_trainer.data.readers import without_subsets
from ray_trainer.data.samples import Collate
from ray_trainer.errors import ConfigError
from ray_trainer.seeding import create_seeded_generator, seed_worker


@dataclass
class DataLoaderConfig:
    """How a loader reads.

    Attributes:
        batch_size: samples a batch.
        shuffle: a new order each epoch, from ``seed``.
        num_workers: loader processes; 0 reads in this one.
        pin_memory: None pins if there is a GPU.
        prefetch_factor: batches each process reads ahead.
        persistent_workers: None keeps processes between epochs if there are any.
        drop_last: leave out a short last batch.
        seed: any integer.
        collate_fn: makes a batch of a list of samples; None chooses by the task.
    """

    batch_size: int = 32
    shuffle: bool = True
    num_workers: int = 2
    pin_memory: bool | None = None
    prefetch_factor: int = 2
    persistent_workers: bool | None = None
    drop_last: bool = False
    seed: int = 42
    collate_fn: Collate | None = None

    def validate(self) -> None:
        """Check all fields.

        Raises:
            ConfigError: lists every field that cannot be used.
        """
        least = {"batch_size": 1, "num_workers": 0, "prefetch_factor": 1}
        errors = [
            f"{name} is {getattr(self, name)}; it must be at least {low}."
            for name, low in least.items()
            if getattr(self, name) < low
        ]
        if self.persistent_workers and self.num_workers == 0:
            errors.append("persistent_workers is True, but num_workers is 0. Set num_workers, or leave it out.")
        if errors:
            raise ConfigError("\n".join(errors))


class DataLoaderFactory:
    """Builds loaders whose order and augmentation follow from a seed.

    Args:
        registry: of collators; None takes the shared one.
    """

    def __init__(self, registry: CollatorRegistry | None = None) -> None:
        self._registry = registry or CollatorRegistry.get_instance()

    def create_dataloader(
        self,
        dataset: Any,
        config: DataLoaderConfig | None = None,
        task_spec: HasModality | None = None,
        tokenizer: Any = None,
    ) -> "DataLoader[Any]":
        """A loader; its collator is the config's, else the one the registry has for the task, else PyTorch's.

        Args:
            dataset: map-style or iterable; a list of equal tensors becomes a `TensorDataset`.
            config: None takes the defaults.
            task_spec: chooses the collator, except for tensors.
            tokenizer: for text.

        Raises:
            ConfigError: the config cannot be used.
            ValueError: the collator of the task refuses, for example for want of a tokenizer.
        """
        config = config or DataLoaderConfig()
        config.validate()
        if isinstance(dataset, list) and dataset and all(isinstance(item, Tensor) for item in dataset):
            dataset = TensorDataset(torch.stack(dataset))
        collate_fn = config.collate_fn or choose_collator(dataset, task_spec, tokenizer, self._registry)
        has_workers = config.num_workers > 0
        return DataLoader(
            dataset,
            batch_size=config.batch_size,
            shuffle=config.shuffle if hasattr(dataset, "__getitem__") else None,
            num_workers=config.num_workers,
            collate_fn=collate_fn,
            pin_memory=torch.cuda.is_available() if config.pin_memory is None else config.pin_memory,
            drop_last=config.drop_last,
            worker_init_fn=seed_worker,
            generator=create_seeded_generator(config.seed),
            prefetch_factor=config.prefetch_factor if has_workers else None,
            persistent_workers=has_workers if config.persistent_workers is None else config.persistent_workers,
        )


def choose_collator(
    data: Any, task_spec: HasModality | None, tokenizer: Any, registry: CollatorRegistry
) -> Collate | None:
    """The collator of a task, or None where stacking is all there is to do.

    Tensors are already of one shape and need none, except one that the user registered. Of the built-in ones,
    the text collator is chosen if there is a tokenizer.
    """
    info = registry.newest_for(task_spec)
    if not registry.is_built_in(info):
        return info.factory(tokenizer=tokenizer)
    is_text = task_spec is None or task_spec.modality == "text"
    if is_text and tokenizer is not None and not isinstance(without_subsets(data)[0], TensorDataset):
        return registry.get_collator(collator_name="text", tokenizer=tokenizer)
    return None
