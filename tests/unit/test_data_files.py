"""Files for Ray Data that are not there, or are read in the wrong way: told before anything is started."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ray_trainer import Experiment, TrainingConfig
from ray_trainer.cluster import DataFiles
from ray_trainer.cluster.launch import build_datasets
from ray_trainer.errors import ConfigError


def not_found(paths: Any) -> Any:
    raise FileNotFoundError(paths)


def wrong_kind(paths: Any) -> Any:
    raise ValueError("No input files found with the extension png")


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (DataFiles(not_found, "/not/there"), "FileNotFoundError: /not/there"),
        (DataFiles(wrong_kind, str(Path(__file__).parent)), "ValueError: No input files found"),
        (DataFiles(lambda paths: SimpleNamespace(), "x", transform=lambda dataset: None), "AttributeError"),
    ],
    ids=["no file", "wrong reader", "transform without result"],
)
def test_files_that_cannot_be_read_at_all_are_an_error_of_build_datasets(files, told):
    experiment = Experiment(lambda config: None, lambda config, training: {"train": files})

    with pytest.raises(ConfigError, match=rf"{told}.*Check build_datasets"):
        build_datasets(experiment, {}, TrainingConfig())
