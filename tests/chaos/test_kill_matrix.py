"""Some cells of the kill matrix, one after the other in one run; all of them: ``python tests/chaos/kill_matrix.py``."""

import os
from pathlib import Path

import pytest
from kill_matrix import Run

from ray_trainer.chaos.processes import command_line, descendants

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

HELPERS = ("ray::PlacementGroupCleaner", "ray::Rendezvous")  # of a controller


def test_deaths_in_phases_that_are_hard_to_hit_change_no_bit_and_no_sample(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", epochs=14).undisturbed()
    struck = Run(tmp_path / "struck", epochs=14)

    deaths, helpers = [], []
    for death in struck.struck(CELLS):
        deaths.append(death)
        lines = map(command_line, descendants(os.getpid()))
        helpers.append(sorted(line.partition(".")[0].strip("\0 ") for line in lines if line.startswith(HELPERS)))

    assert [(death.phase, death.victim) for death in deaths] == CELLS
    assert struck.differences(whole) == []
    assert [death.steps_repeated for death in deaths if death.victim in ("rank0", "another")] == [0, 0, 0, 0]
    assert helpers == [list(HELPERS)] * len(CELLS)  # nothing stays of those of a lost controller
    (death,) = [death for death in struck.fired() if death["point"] == "saved"]
    saved = [row for row in struck.events("checkpoint_saved", since=0) if row["time"] <= death["time"]]
    resumed = struck.events("resumed", since=death["time"])
    assert (resumed[0]["from"], resumed[0]["tier"]) == (saved[-1]["checkpoint"], "storage")
