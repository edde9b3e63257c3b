"""Which library is this sentence about? Real sentences, told apart by the words in them.

The sentences are the first ones of the documentation inside four installed packages: nothing is downloaded. Guessing is
right once in four times; this network, which only takes the mean over the words, is right three times in four. Run it
with ``ray-trainer train examples/text_classification.yaml``.
"""

import re
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ray_trainer import Experiment, TaskSpec, TrainingConfig

LIBRARIES = ("pandas", "ray", "sklearn", "torch")
BEGINNING = re.compile(r'"""\s*([A-Z][^"]{30,400}?)\n\s*\n')  # of a docstring: up to its first empty line
PER_LIBRARY = 2500

# ---- the data ---- one sample is a sentence as numbers of words, and the number of its library


def sentences(library: str) -> list[str]:
    """All different ones, in an order that is the same at every start."""
    spec = find_spec(library)  # finds the files without importing them
    assert spec is not None
    root = Path((spec.submodule_search_locations or [])[0])
    found = {
        sentence
        for path in sorted(root.rglob("*.py"))
        for sentence in BEGINNING.findall(path.read_text(errors="replace"))
    }
    return sorted(found, key=lambda sentence: crc32(sentence.encode()))


def word_ids(sentence: str, vocabulary: int) -> list[int]:
    """A number for each word, from 1 on; 0 is for padding. Two words may share one, which hurts little."""
    return [1 + crc32(word.encode()) % (vocabulary - 1) for word in re.findall(r"\w+", sentence.lower())]


def build_datasets(config: SimpleNamespace, training: TrainingConfig) -> dict[str, list[dict[str, Any]]]:
    samples = [
        {"input_ids": word_ids(sentence, config.vocabulary), "label": label}
        for label, library in enumerate(LIBRARIES)
        for sentence in sentences(library)[:PER_LIBRARY]
    ]
    order = np.random.default_rng(0).permutation(len(samples))
    held_out = len(samples) // 10
    return {
        "train": [samples[index] for index in order[held_out:]],
        "val": [samples[index] for index in order[:held_out]],
    }


def pad(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch: sentences are filled up to the longest one, and the mask says which words are real."""
    ids = pad_sequence([torch.tensor(sample["input_ids"]) for sample in samples], batch_first=True)
    labels = torch.tensor([sample["label"] for sample in samples])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "label": labels}


# ---- the model ---- B sentences, T words, C channels


class BagOfWords(nn.Module):
    """The mean over the words of a sentence, then two layers."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.word = nn.Embedding(config.vocabulary, config.width)
        self.classify = nn.Sequential(
            nn.Linear(config.width, config.width),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(config.width, len(LIBRARIES)),
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) each -> (B, 4)."""
        mask = attention_mask.unsqueeze(2)
        mean = (self.word(input_ids) * mask).sum(1) / mask.sum(1)
        return self.classify(mean)


experiment = Experiment(
    build_model=BagOfWords,
    build_datasets=build_datasets,
    collate_fn=pad,
    task_spec=TaskSpec(
        name="which library",
        task_type="text_classification",
        input_fields=["input_ids", "attention_mask"],
        target_field="label",
        output_schema={"num_classes": len(LIBRARIES)},
    ),
)
