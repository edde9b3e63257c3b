"""`ray-trainer plan`: the simulation, held against the closed forms of Young and Daly."""

import json
import math

import pytest

from ray_trainer.cli import main
from ray_trainer.cli.outlook import Prospect, best_outcome, simulate
from ray_trainer.metrics.events import EventLog
from ray_trainer.storage import Storage

HOUR_S = 3600.0
BUSY = Prospect(mtbf_s=6 * HOUR_S, stall_s=60.0, durable_s=60.0, recovery_s=300.0)


def daly_goodput(prospect: Prospect, interval_s: float) -> float:
    """Daly 2006: expected time of a run with exponential failures, also while it saves and recovers."""
    m = prospect.mtbf_s
    return interval_s / (m * math.exp(prospect.recovery_s / m) * math.expm1((interval_s + prospect.stall_s) / m))


@pytest.mark.parametrize("interval_s", [120.0, 1600.0, 2 * HOUR_S, 8 * HOUR_S])
@pytest.mark.parametrize("recovery_s", [0.0, 300.0, 3 * HOUR_S])
def test_goodput_is_that_of_dalys_closed_form(interval_s, recovery_s):
    prospect = Prospect(BUSY.mtbf_s, BUSY.stall_s, BUSY.durable_s, recovery_s)

    outcome = simulate(prospect, interval_s, seed=1, num_failures=40_000)

    assert outcome.goodput == pytest.approx(
        daly_goodput(prospect, interval_s), rel=0.04
    )  # four deviations of 40,000 draws


def test_shares_of_the_time_add_up_to_all_of_it():
    outcome = simulate(BUSY, 1000.0, seed=0)

    assert outcome.goodput + outcome.checkpoints + outcome.repeated + outcome.down == pytest.approx(1)
    assert outcome.checkpoints / outcome.goodput == pytest.approx(BUSY.stall_s / 1000.0)


@pytest.mark.parametrize("stall_s", [0.5, 10.0, 60.0])
def test_best_interval_is_that_of_young_and_daly(stall_s):
    prospect = Prospect(BUSY.mtbf_s, stall_s, stall_s, BUSY.recovery_s)

    best = best_outcome(prospect, seed=0)

    # the top is flat: a quarter to either side costs less than a tenth of a percent
    assert best.interval_s == pytest.approx(prospect.young_daly_s, rel=0.3)
    assert daly_goodput(prospect, best.interval_s) > daly_goodput(prospect, prospect.young_daly_s) - 0.001


def test_checkpoints_that_are_safe_later_lose_more_and_do_not_overlap():
    slow = Prospect(BUSY.mtbf_s, stall_s=1.0, durable_s=900.0, recovery_s=300.0)
    at_once = Prospect(BUSY.mtbf_s, stall_s=1.0, durable_s=1.0, recovery_s=300.0)

    assert simulate(slow, 1000.0, seed=0).goodput < simulate(at_once, 1000.0, seed=0).goodput
    assert best_outcome(slow, seed=0).interval_s >= 899.0


def test_cluster_that_fails_faster_than_it_recovers_gets_nothing_done():
    hopeless = Prospect(mtbf_s=60.0, stall_s=1.0, durable_s=1.0, recovery_s=3000.0)

    assert simulate(hopeless, 60.0, seed=0, num_failures=20).goodput < 1e-3


def test_same_seed_gives_the_same_plan_for_scripts(capsys):
    command = ["plan", "--nodes", "128", "--node-mtbf-days", "300", "--every-minutes", "1", "--json"]

    assert main(command) == 0
    first = capsys.readouterr().out
    assert main(command) == 0

    assert capsys.readouterr().out == first
    plan = json.loads(first)
    assert plan["mtbf_s"] == 300 * 86400 / 128
    assert plan["best"]["goodput"] >= plan["every_minutes"]["goodput"]
    assert plan["every_minutes"]["interval_s"] == 60


def test_plan_for_people_ends_with_what_to_write_into_the_run_file(capsys):
    assert main(["plan", "--nodes", "128", "--node-mtbf-days", "300", "--recovery-s", "300"]) == 0

    assert capsys.readouterr().out.splitlines()[-1].startswith("in the run file: save_every_minutes: ")


def test_plan_takes_what_a_run_has_measured(tmp_path, capsys):
    log = EventLog(Storage.open(str(tmp_path)), attempt=1, clock=iter([0, 10, 20, 30]).__next__)
    log.record("workers_started", step=0, num_workers=2)
    for step, stall_s in ((5, 0.5), (9, 1.5)):
        log.record("checkpoint_saved", step=step, stall_s=stall_s, durable_s=4.0)
    log.record("failure", cause="a worker died")
    EventLog(Storage.open(str(tmp_path)), attempt=2, clock=lambda: 75).record("workers_started", step=9, num_workers=2)

    assert main(["plan", "--nodes", "8", "--node-mtbf-days", "8", "--like", str(tmp_path)]) == 0

    told = capsys.readouterr().out
    assert "a failure every 1 d; " in told
    assert "stops training for 1 s and is safe after 4 s; recovery takes 45 s" in told


def test_run_without_a_checkpoint_has_measured_nothing(tmp_path, capsys):
    assert main(["plan", "--nodes", "8", "--node-mtbf-days", "8", "--like", str(tmp_path)]) == 2
    assert "no checkpoint" in capsys.readouterr().err


def test_numbers_that_cannot_be_are_all_named(capsys):
    wrong = ["--nodes", "0", "--node-mtbf-days", "nan", "--stall-s", "5", "--durable-s", "1", "--recovery-s", "inf"]

    assert main(["plan", *wrong]) == 2

    told = capsys.readouterr().err
    for name in ("--nodes = 0", "--node-mtbf-days = nan", "--durable-s = 1", "--recovery-s = inf"):
        assert name in told
