"""A run on the digits that is killed on the way."""

from pathlib import Path
from typing import Any

from cluster_runs import write_run_file

DIGITS = Path(__file__).with_name("digits_experiment.py")
STEPS_AN_EPOCH, EPOCHS = 45, 6  # 1,437 images, 32 a step
KILL_AT_STEP = 50  # after the checkpoint of step 40, in the second epoch


def digits(directory: Path, save_every: int = 20, **cluster: Any) -> Path:
    """Logged at each step and saved in the middle of epochs only."""
    return write_run_file(
        directory / "digits.yaml",
        experiment=f"{DIGITS}:experiment",
        training={
            "epochs": EPOCHS,
            "batch_size": 16,
            "learning_rate": 2e-3,
            "lr_scheduler_type": "cosine",
            "monitor": "val_accuracy",
            "mode": "max",
            "save_every_n_epochs": None,
            "save_every_n_steps": save_every,
            "log_every_n_steps": 1,
        },
        cluster={"num_workers": 2, "name": "digits", "storage_path": str(directory), "max_failures": 3, **cluster},
    )
