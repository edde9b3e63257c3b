"""What all chaos tests share."""

from pathlib import Path

import pytest
from cluster_runs import newest_checkpoint, step_of, training
from digits_run import EPOCHS, STEPS_AN_EPOCH, digits


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with training(digits(tmp_path_factory.mktemp("undisturbed"))) as command:
        assert command.wait() == 0, command.output
        assert "Traceback" not in command.output
    assert step_of(newest_checkpoint(command.run_dir)) == STEPS_AN_EPOCH * EPOCHS
    return command.run_dir
