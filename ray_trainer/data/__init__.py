"""From data of any kind to the steps of an epoch, in an order that is a function of the seed."""

from ray_trainer.data.batch import Batch, BatchPlan, StepBatch, to_device
from ray_trainer.data.collate import CollatorInfo, CollatorRegistry, TextCollator
from ray_trainer.data.factory import DataLoaderConfig, DataLoaderFactory
from ray_trainer.data.indexed import IndexedDataset
from ray_trainer.data.module import UniversalDataModule
from ray_trainer.data.order import SampleOrder
from ray_trainer.data.source import BatchSource, build_source

__all__ = [
    "Batch",
    "BatchPlan",
    "BatchSource",
    "CollatorInfo",
    "CollatorRegistry",
    "DataLoaderConfig",
    "DataLoaderFactory",
    "IndexedDataset",
    "SampleOrder",
    "StepBatch",
    "TextCollator",
    "UniversalDataModule",
    "build_source",
    "to_device",
]
