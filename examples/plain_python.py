"""Training in one process, without Ray: a `Trainer`, a model and data.

Run it with ``python examples/plain_python.py``. Break it off with Ctrl-C, or as harshly as you like, and start it
again: it goes on where it was. Started once more after its end, it has nothing left to do and tells its results.
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from ray_trainer import TaskSpec, Trainer, TrainingConfig, load_weights


def main(directory: str = "runs/plain_python", epochs: int = 15) -> float:
    """Train on handwritten digits; returns the accuracy on those that were held out."""
    images, labels = load_digits(return_X_y=True)
    pixels, digits = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    train, val = order[360:], order[:360]

    torch.manual_seed(0)  # the weights that the model starts with
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))

    trainer = Trainer(
        model,
        config=None,  # of the model, where it has one
        training_config=TrainingConfig(
            epochs=epochs,
            batch_size=32,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            save_every_n_steps=20,
            monitor="val_accuracy",
            mode="max",
            checkpoint_dir=directory,
        ),
        task_spec=TaskSpec("digits", "tabular_classification", input_fields=["pixels"]),
    )
    results = trainer.train(
        TensorDataset(pixels[train], digits[train]),
        TensorDataset(pixels[val], digits[val]),
        resume_from="auto",  # the newest good checkpoint, or a fresh start
    )
    print(results["metrics_summary"][["epoch", "train/loss", "val/loss", "val/accuracy", "learning_rate"]])
    print(f"best epoch {results['best_epoch']}, in {results['checkpoint_path']}")

    model.load_state_dict(load_weights(directory))  # the best ones; those of the last step are in the model already
    model.eval()
    right = model(pixels[val]).argmax(1) == digits[val]
    return right.float().mean().item()


if __name__ == "__main__":
    print(f"accuracy {main(*sys.argv[1:2]):.3f}")
