"""Moving over from the original Training Loop Orchestrator (``utils.training.engine``).

What is the same needs no comment. Where something differs, the original's line stands above ours. Run it with
``python examples/moving_over.py``: a tiny language model learns from Python's own help pages.
"""

import sys
from pydoc_data.topics import topics
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

# was: from utils.training.engine import Trainer
# was: from utils.training.training_config import TrainingConfig
from ray_trainer import TaskSpec, Trainer, TrainingConfig

# ---- the configuration of the model ---- it stood in TrainingConfig; here the trainer reads only pad_token_id of it

# was: TrainingConfig(vocab_size=256, d_model=64, max_seq_len=64, ...)
model_config = SimpleNamespace(vocab_size=256, d_model=64, max_seq_len=64)


class NextByte(nn.Module):
    """Says which byte comes next, from all those before."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.memory = nn.GRU(config.d_model, config.d_model, batch_first=True)
        self.output = nn.Linear(config.d_model, config.vocab_size)

    # was: def forward(self, input_ids, labels=None, **kwargs), since every field of a batch was passed on.
    # now: name what the model takes. Logits are returned as before: bare, as {"logits": ...}, or first in a tuple.
    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """(B, T) -> (B, T, 256)."""
        states, _ = self.memory(self.embedding(input_ids))
        return {"logits": self.output(states)}


def help_pages(length: int) -> TensorDataset:
    """Some of Python's help pages in pieces; labels are the same bytes, and the loss shifts them, as before."""
    text = "".join(topics.values()).encode()[: 2000 * length]
    pieces = torch.tensor(list(text)).view(-1, length)
    return TensorDataset(pieces, pieces)


def training_config(directory: str) -> TrainingConfig:
    return TrainingConfig(
        learning_rate=3e-3,
        batch_size=16,
        epochs=3,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        weight_decay=0.01,
        random_seed=42,
        # was: checkpoint_dir="/content/drive/MyDrive/transformer-checkpoints" by default; now "checkpoints"
        checkpoint_dir=directory,
        # was: 5 by default, so that three epochs left no checkpoint at all; now 1, and the last step is always saved
        save_every_n_epochs=1,
        # was: use_amp=True by default, which did nothing; now None, and "bf16-mixed" really computes in 16 bits
        precision="fp32",
        # was: warmup_ratio and use_lr_schedule, of which nothing came; now the schedule counts optimizer steps
        warmup_ratio=0.1,
        lr_scheduler_type="cosine",
        # was: early_stopping_patience=5 by default, which nobody read; now None by default, and it stops
        early_stopping_patience=2,
        # was: wandb_project="..."; now gone: metrics.jsonl and tensorboard/ in checkpoint_dir, or hooks of your own
        # was: strategy, devices, num_nodes; now ClusterConfig(num_workers=2) and fit() of ray_trainer.cluster
    )


class Progress:
    """Hooks have the same names and arguments; any subset of them will do, as the original only promised."""

    # was: on_validation_end was given "loss" and "accuracy"; now "val_loss" and so on, as its documentation said

    def on_epoch_end(self, epoch: int, metrics: dict[str, float]) -> None:
        """Keys are ``train_loss``, ``val_loss`` ...; ``loss`` is that of training, as before."""
        print(f"epoch {epoch}: loss {metrics['train_loss']:.3f}, validation {metrics['val_loss']:.3f}")


def main(directory: str = "runs/moving_over") -> list[float]:
    """Train, or continue; returns the validation losses."""
    torch.manual_seed(0)
    trainer = Trainer(
        model=NextByte(model_config),
        config=model_config,
        training_config=training_config(directory),
        # was: with a TaskSpec train() failed, so None was passed, and every task was language modelling
        task_spec=TaskSpec("help pages", "lm", "decoder_only", input_fields=["input_ids"]),
        hooks=Progress(),
    )
    pages = help_pages(model_config.max_seq_len)
    train_set, val_set = TensorDataset(*pages[200:]), TensorDataset(*pages[:200])

    # was: resume_from='./checkpoints/checkpoint_epoch0005.pt', which began the next epoch without history
    # now: a checkpoint too, which is a directory without any pickle in it; or "auto": the newest, or a fresh start
    results = trainer.train(train_data=train_set, val_data=val_set, resume_from="auto")

    # The keys are the same: metrics_summary, best_epoch, final_loss, checkpoint_path, training_time.
    # was: val/* columns of zeros without validation data; now no such columns
    print(results["metrics_summary"][["epoch", "train/loss", "val/loss", "val/perplexity"]])

    # was: torch.load(path)["model_state_dict"]
    # now: safetensors.torch.load_file(f"{results['checkpoint_path']}/model.safetensors")
    print(f"best weights in {results['checkpoint_path']}")
    return list(results["metrics_summary"]["val/loss"])


if __name__ == "__main__":
    main(*sys.argv[1:2])
