"""Some cells of the kill matrix, one after the other in one run; all of them: ``python tests/chaos/kill_matrix.py``."""

from pathlib import Path

import pytest
from kill_matrix import Run

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(900)]

CELLS = [
    ("all_reduce", "rank0"),
    ("after_update", "another"),
    ("keep", "rank0"),
    ("snapshot", "controller"),
    ("writer", "all"),
    ("saved", "all"),
    ("retention", "rank0"),
]


def test_deaths_in_phases_that_are_hard_to_hit_change_no_bit_and_no_sample(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", epochs=14).undisturbed()
    struck = Run(tmp_path / "struck", epochs=14)

    deaths = list(struck.struck(CELLS))

    assert [(death.phase, death.victim) for death in deaths] == CELLS
    assert struck.differences(whole) == []
    assert [death.steps_repeated for death in deaths if death.victim in ("rank0", "another")] == [0, 0, 0, 0]
    (death,) = [death for death in struck.fired() if death["point"] == "saved"]
    saved = [row for row in struck.events("checkpoint_saved", since=0) if row["time"] <= death["time"]]
    resumed = struck.events("resumed", since=death["time"])
    assert (resumed[0]["from"], resumed[0]["tier"]) == (saved[-1]["checkpoint"], "storage")
