"""A model of Hugging Face's `transformers`, built from its configuration: nothing is downloaded.

What stands under ``model:`` in the run file is the model's own configuration, so another architecture (gpt2, qwen3,
mistral ...) is another ``model_type`` there. The text is the Python that every Python carries, byte by byte.
Run it with ``ray-trainer train examples/transformers_from_config.yaml``.

The trained weights are a pretrained model like any other, once its configuration lies beside them:

    ray-trainer export runs/transformers_from_config --output my_llama/model.safetensors
    huggingface_config(model).save_pretrained("my_llama")          # in Python; model: what the run file says
    AutoModelForCausalLM.from_pretrained("my_llama")
"""

import sysconfig
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from ray_trainer import Experiment, TrainingConfig


def huggingface_config(config: SimpleNamespace) -> PretrainedConfig:
    values = dict(vars(config))
    for ours in ("context", "megabytes"):  # settings of the data, which no model knows
        del values[ours]
    return AutoConfig.for_model(values.pop("model_type"), **values)


def build_model(config: SimpleNamespace) -> nn.Module:
    return AutoModelForCausalLM.from_config(huggingface_config(config))


class Windows(Dataset[dict[str, Tensor]]):
    """A text, cut into pieces of equal length. Without labels the task is to tell each byte from those before."""

    def __init__(self, text: bytes, length: int) -> None:
        self.pieces = torch.tensor(list(text[: len(text) // length * length]), dtype=torch.uint8).view(-1, length)

    def __len__(self) -> int:
        """The number of pieces."""
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """The numbers of the bytes; the name is that of a parameter of the model."""
        return {"input_ids": self.pieces[index].long()}


def build_datasets(config: SimpleNamespace, training: TrainingConfig) -> dict[str, Windows]:
    library = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join(path.read_bytes() for path in sorted(library.glob("*.py")))[: config.megabytes * 1_000_000]
    cut = len(text) * 95 // 100
    return {"train": Windows(text[:cut], config.context), "val": Windows(text[cut:], config.context)}


experiment = Experiment(build_model=build_model, build_datasets=build_datasets)
