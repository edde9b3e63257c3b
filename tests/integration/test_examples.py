"""Each example, run as a reader would, on less."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

EXAMPLES = Path(__file__).parents[2] / "examples"


def train(example: str, run_dir: Path, *overrides: str) -> str:
    """What ``ray-trainer train`` prints; it must end well."""
    command = [sys.executable, "-m", "ray_trainer", "train", str(EXAMPLES / example), *overrides]
    done = subprocess.run(
        [*command, f"cluster.storage_path={run_dir}"], capture_output=True, text=True, cwd=run_dir, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_gpt_tells_bits_per_byte_and_writes_a_sample(tmp_path):
    small = ("model.layers=1", "model.heads=1", "model.width=16", "model.context=32")

    printed = train("gpt.yaml", tmp_path, *small, "training.max_steps=3", "training.limit_val_batches=2")

    assert "bits per byte. A sample:" in printed
    assert "def " in printed.partition("A sample:")[2]
    assert "val/perplexity" in printed


def test_digits_are_trained_and_validated(tmp_path):
    assert "val/accuracy" in train("digits.yaml", tmp_path, "training.epochs=1")
