"""A small GPT that learns to write Python, byte by byte, from the source text that every Python carries.

Ray Data reads the files and packs them into rows of equal length; each byte is predicted from its own file alone.
Run it with ``ray-trainer train examples/gpt.yaml``. At the end it prints how well it predicts files that it has not
seen, in bits per byte, and what it writes by itself.
"""

import math
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import ray.data
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_trainer import DefaultHooks, Experiment, TrainingConfig
from ray_trainer.cluster import pack_documents

# ---- the model ---- B samples, T positions, C channels, H heads


class Attention(nn.Module):
    """Each position looks at those that it may see."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.heads = config.heads
        self.query_key_value = nn.Linear(config.width, 3 * config.width, bias=False)
        self.output = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, may_see: Tensor) -> Tensor:
        """(B, T, C) and (B, 1, T, T) -> (B, T, C)."""
        query, key, value = self.query_key_value(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=may_see)  # (B, H, T, C / H)
        return self.output(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, then two layers at each position; both are added to what is there."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 4 * config.width), nn.GELU(), nn.Linear(4 * config.width, config.width)
        )

    def forward(self, x: Tensor, may_see: Tensor) -> Tensor:
        """(B, T, C) and (B, 1, T, T) -> (B, T, C)."""
        x = x + self.attention(self.attention_norm(x), may_see)
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.context = config.context
        self.byte = nn.Embedding(256, config.width)
        self.position = nn.Embedding(config.context + 1, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.next_byte = nn.Linear(config.width, 256, bias=False)
        self.next_byte.weight = self.byte.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:  # what is added 2 x layers times starts smaller, as in GPT-2
                is_added = name.endswith(("output.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.layers) if is_added else 0.02)

    def forward(self, input_ids: Tensor, document_ids: Tensor, position_ids: Tensor) -> Tensor:
        """(B, T) each -> (B, T, 256)."""
        may_see = (document_ids[:, :, None] == document_ids[:, None, :]).tril()[:, None]  # same file, and not later
        x = self.byte(input_ids) + self.position(position_ids)
        for block in self.blocks:
            x = block(x, may_see)
        return self.next_byte(self.norm(x))

    @torch.no_grad()
    def write(self, text: str, length: int, temperature: float = 0.8) -> str:
        """Continue a text."""
        generator = torch.Generator().manual_seed(0)
        data = list(text.encode())
        for _ in range(length):
            seen = torch.tensor([data[-self.context :]])
            logits = self(seen, torch.zeros_like(seen), torch.arange(seen.shape[1])[None])[0, -1]
            data += torch.multinomial((logits / temperature).softmax(0), 1, generator=generator).tolist()
        return bytes(data).decode(errors="replace")


# ---- the data ---- one sample is a row of context + 1 bytes: each but the first is predicted from those before


def source_files() -> list[Path]:
    library = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    return [path for path in sorted(library.rglob("*.py")) if left_out.isdisjoint(path.relative_to(library).parts)]


def rows(files: list[Path], context: int) -> ray.data.Dataset:
    texts = ray.data.read_binary_files([str(path) for path in files])
    return pack_documents(texts, list, context + 1, end_of_document=0, column="bytes")  # `list` gives the bytes


def build_datasets(config: SimpleNamespace, training: TrainingConfig) -> dict[str, ray.data.Dataset]:
    files = source_files()
    held_out = files[::20]
    rest = [path for path in files if path not in held_out]
    return {"train": rows(rest, config.context), "val": rows(held_out, config.context)}


# ---- what is told of it ----


class Author(DefaultHooks):
    """Keeps the model that it builds, and lets it write after each validation."""

    def build_model(self, config: SimpleNamespace) -> nn.Module:
        """On each worker, at each start."""
        self.model = GPT(config)
        return self.model

    def build_hooks(self) -> "Author":
        """The same object, which knows the model by then."""
        return self

    def on_validation_end(self, metrics: dict[str, float]) -> None:
        """Print, on the first worker, how good the model is and what it writes."""
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            bits_per_byte = metrics["val_loss"] / math.log(2)
            print(f"{bits_per_byte:.3f} bits per byte. A sample:\n{self.model.write('def ', length=400)}\n")


author = Author()
experiment = Experiment(
    build_model=author.build_model,
    build_datasets=build_datasets,
    build_hooks=author.build_hooks,
)  # without a TaskSpec the task is language modelling: each position is compared with the byte after it
