"""Checkpoints that an earlier version wrote, kept in ``tests/checkpoints``, are read and trained on for ever.

``python tests/integration/test_old_checkpoints.py DIRECTORY`` writes those of this version, for the next format.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from ranks import on_ranks
from safetensors.torch import load_file, save_file
from test_fsdp import CLOSE, newest, train

from ray_trainer.checkpoint import load_weights, verify
from ray_trainer.storage import Storage

KEPT = Path(__file__).parents[1] / "checkpoints"
SAVED_AT, LAST_STEP = 4, 6


def go_on(run_dir: Path, parallelism: str) -> dict[str, Any]:
    """Train on from what is in the directory; the weights after `SAVED_AT` steps are those at the resume."""
    answer = train(run_dir, parallelism)
    return {name: answer[name] for name in ("weights", "resumed", "after step 4")}


@pytest.mark.parametrize("parallelism", ["ddp", "fsdp"])
@pytest.mark.parametrize("version", sorted(path.name for path in KEPT.iterdir()))
def test_checkpoint_of_an_earlier_version_is_whole_and_training_goes_on_from_it(version, parallelism, tmp_path):
    kept = KEPT / version / parallelism
    run_dir = tmp_path / "run"
    (name,) = (path.name for path in kept.glob("checkpoint_*"))
    shutil.copytree(kept / name, run_dir / name)
    then = load_file(kept / f"step{SAVED_AT}.safetensors")

    assert verify(Storage.open(run_dir), name) == []
    loaded = load_weights(run_dir)
    answers = on_ranks(2, go_on, run_dir, parallelism)

    assert loaded.keys() == then.keys()
    for answer in answers:
        assert answer["resumed"]["step"] == SAVED_AT
        for name, tensor in then.items():
            assert torch.equal(loaded[name], tensor), name
            assert torch.equal(answer["resumed"]["weights"][name], tensor), name
        torch.testing.assert_close(answer["weights"], load_file(kept / f"step{LAST_STEP}.safetensors"), **CLOSE)


def write(directory: Path) -> None:
    """Two short runs on two processes, of which one checkpoint and the weights of two steps are kept."""
    for parallelism in ("ddp", "fsdp"):
        run_dir = directory / f"{parallelism} run"
        answer = on_ranks(2, go_on, run_dir, parallelism)[0]
        kept = directory / parallelism
        kept.mkdir()
        (saved,) = run_dir.glob(f"checkpoint_*_step{SAVED_AT:08}")
        shutil.copytree(saved, kept / saved.name)
        assert newest(run_dir).name.endswith(f"_step{LAST_STEP:08}")
        for step, weights in ((SAVED_AT, answer["after step 4"]["weights"]), (LAST_STEP, answer["weights"])):
            whole = {name: tensor.contiguous().clone() for name, tensor in weights.items()}
            save_file(whole, kept / f"step{step}.safetensors")
        shutil.rmtree(run_dir)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
