"""Sweeps without Ray: spaces, what is refused, which values trials get, what the events of a sweep add up to."""

import csv
import importlib.util
import io
import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import experiments
import numpy as np
import pytest

from ray_trainer.checkpoint import list_checkpoints
from ray_trainer.cli.runfile import load_run_file, resolved
from ray_trainer.cluster import ClusterConfig, SweepConfig, choice, grid, loguniform, randint, uniform
from ray_trainer.cluster.ledger import Ledger
from ray_trainer.cluster.schedule import as_result, build_scheduler, prime
from ray_trainer.cluster.search import DrawnSearch, open_search
from ray_trainer.cluster.session import room_for_runs
from ray_trainer.cluster.space import KINDS, read_domain
from ray_trainer.cluster.sweep_job import saved_with_each_validation
from ray_trainer.cluster.trials import as_csv, trials_of
from ray_trainer.config import TrainingConfig
from ray_trainer.config.documents import dump_yaml
from ray_trainer.errors import ConfigError
from ray_trainer.storage import Storage

RATE, WIDTH = "training.learning_rate", "model.width"
SPACE = {RATE: loguniform(1e-4, 1e-1), WIDTH: choice([8, 16, 32])}


def message_of(config: SweepConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        config.validate()
    return str(caught.value)


@pytest.mark.parametrize(
    ("notation", "low", "high"),
    [(uniform(-1.0, 3.0), -1.0, 3.0), (loguniform(1e-4, 1e-1), 1e-4, 1e-1), (randint(2, 5), 2, 4)],
)
def test_drawn_numbers_fill_their_bounds_and_never_leave_them(notation, low, high):
    domain = read_domain(notation)
    drawn = [domain.at(place) for place in [0.0, *np.linspace(0, 1, 1000, endpoint=False), math.nextafter(1, 0)]]

    assert min(drawn) == pytest.approx(low)
    assert max(drawn) == pytest.approx(high, rel=0.02)
    assert all(low <= value <= high for value in drawn)
    assert (domain.clamp(high * 10 + 1), domain.clamp(low - 10)) == (high, low)


def test_half_of_a_logarithmic_range_lies_below_its_geometric_mean():
    domain = read_domain(loguniform(1e-4, 1e-2))

    assert sum(domain.at(place) < 1e-3 for place in np.linspace(0, 1, 1000, endpoint=False)) == 500


def test_whole_numbers_and_choices_are_equally_likely():
    places = np.linspace(0, 1, 300, endpoint=False)
    for notation in (randint(1, 4), choice([1, 2, 3])):
        assert Counter(read_domain(notation).at(place) for place in places) == {1: 100, 2: 100, 3: 100}


@pytest.mark.parametrize(
    ("name", "notation", "told"),
    [
        ("training.lr", uniform(0.1, 1), "did you mean 'learning_rate'?"),
        ("learning_rate", uniform(0.1, 1), "did you mean 'training.learning_rate'?"),
        ("cluster.num_workers", choice([1]), "varies 'training.NAME' and 'model.NAME'"),
        ("training.monitor", choice(["a"]), "nothing to search"),
        ("training.learning_rate", loguniform(0, 1), "lower bound above 0"),
        ("training.learning_rate", uniform(1, 0.1), "the lower one comes first"),
        ("training.learning_rate", uniform(-1, 1), "holds -1, but it must be a number that is above 0"),
        ("training.batch_size", uniform(1, 8), None),
        ("training.batch_size", randint(0, 8), "holds 0, but it must be a whole number that is at least 1"),
        ("training.optimizer", choice(["adamw", "lion"]), "holds 'lion', but it must be one of"),
        ("model.width", {"choise": [1]}, "there is no 'choise'"),
        ("model.width", choice([]), "at least one"),
        ("model.width", grid([1, 1]), "holds 1 twice"),
        ("model.width", randint(1.0, 2), "two whole numbers"),
        ("model.width", [1, 2], "write one of {choice: [...]}"),
    ],
)
def test_wrong_space_is_refused_with_what_to_write(name, notation, told):
    config = SweepConfig(space={name: notation}, num_samples=2)
    if told is None:  # bounds may be whole although what lies between is not: the trial refuses that
        assert config.validate()
    else:
        assert told in message_of(config)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_samples": 1}, "one trial compares nothing"),
        ({"search": "grid"}, "can't cross training.learning_rate"),
        ({"search": "optuna", "space": {WIDTH: grid([1, 2])}}, "takes no grid, as in model.width"),
        ({"scheduler": "pbt", "search": "optuna"}, "set search to random"),
        ({"scheduler": "pbt", "space": {WIDTH: choice([1, 2])}}, "may change in the middle of a run"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, told):
    assert told in message_of(SweepConfig(**({"space": SPACE, "num_samples": 4} | changes)))


def test_metric_and_mode_follow_from_the_training_section_or_from_the_metric():
    training = TrainingConfig(monitor="val_accuracy", mode="max")

    assert SweepConfig().objective(training) == ("val_accuracy", "max")
    assert SweepConfig(metric="val/loss").objective(training) == ("val_loss", "min")
    assert SweepConfig(metric="train_accuracy").objective(TrainingConfig()) == ("train_accuracy", "max")


def test_space_of_a_run_file_is_held_against_its_other_sections_and_round_trips(tmp_path: Path):
    path = tmp_path / "run.yaml"
    text = "experiment: a.py:b\nmodel: {width: 8, inner: {depth: 2}}\nsweep: {num_samples: 2, space: {%s}}\n"
    path.write_text(text % "model.inner.depth: {randint: [1, 4]}, training.learning_rate: {uniform: [1e-3, 1]}")
    run = load_run_file(path)
    path.write_text(dump_yaml(resolved(run)))
    assert load_run_file(path) == run

    path.write_text(text % "model.widht: {choice: [1, 2]}, model.inner.dpeth: {choice: [1, 2]}")
    with pytest.raises(ConfigError, match=r"line 3: sweep\.space: .*did you mean 'width'\?.*did you mean 'depth'\?"):
        load_run_file(path)


def test_values_of_a_trial_follow_from_seed_and_number_alone():
    config = SweepConfig(space=SPACE, num_samples=20, seed=3)
    first = [DrawnSearch(config).settings(number) for number in range(20)]

    assert [DrawnSearch(config).settings(number) for number in reversed(range(20))] == first[::-1]
    assert len({settings[RATE] for settings in first}) == 20
    assert {settings[WIDTH] for settings in first} == {8, 16, 32}
    assert DrawnSearch(SweepConfig(space=SPACE, num_samples=20, seed=4)).settings(0) != first[0]


def test_grid_tries_each_point_as_often_as_asked_and_draws_the_rest():
    space = {WIDTH: grid([8, 16]), "model.depth": grid([1, 2, 3]), RATE: uniform(0.1, 1.0)}
    config = SweepConfig(space=space, num_samples=2)
    tried = [DrawnSearch(config).settings(number) for number in range(config.num_trials())]

    points = Counter((settings[WIDTH], settings["model.depth"]) for settings in tried)
    assert points == {(width, depth): 2 for width in (8, 16) for depth in (1, 2, 3)}
    assert len({settings[RATE] for settings in tried}) == 12
    assert SweepConfig(search="grid", space={WIDTH: choice([1, 2]), "model.depth": grid([1, 2])}).num_trials() == 4


@pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="optuna is an extra")
def test_optuna_learns_from_what_it_is_told_also_after_a_restart():
    config = SweepConfig(space={RATE: uniform(0.1, 1.0), WIDTH: choice([8, 16])}, num_samples=60, search="optuna")
    known = {}
    search = open_search(config, "min", known)
    for number in range(40):  # the nearer to 0.5 the better
        search = open_search(config, "min", known) if number == 20 else search
        settings = search.settings(number)
        value = abs(settings[RATE] - 0.5) + 0.01 * settings[WIDTH]
        search.tell(number, value)
        known[number] = (settings, True, value)

    late = [settings[RATE] for number, (settings, _, _) in known.items() if number >= 30]
    assert np.mean(np.abs(np.array(late) - 0.5)) < 0.1  # 0.23 if it drew blindly
    assert len({settings[RATE] for settings, _, _ in known.values()}) == 40
    assert known[39][0][WIDTH] == 8


@pytest.mark.skipif(importlib.util.find_spec("optuna") is not None, reason="optuna is installed")
def test_missing_optuna_is_told_with_what_to_install():
    assert "ray-trainer[sweep]" in str(SweepConfig(search="optuna").missing_package())


def test_each_validation_gets_its_checkpoint():
    training = TrainingConfig(
        save_every_n_epochs=4,
        validate_every_n_epochs=6,
        save_every_n_steps=None,
        validate_every_n_steps=10,
        keep_best_k=0,
    )
    saved = saved_with_each_validation(training)

    assert (saved.save_every_n_epochs, saved.save_every_n_steps, saved.keep_best_k) == (2, 10, 1)


@pytest.mark.parametrize(
    ("workers", "strategy", "cpus", "room"),
    [
        (1, "PACK", [2], 2),
        (2, "PACK", [2, 1], 1),
        (2, "STRICT_PACK", [3, 3], 2),
        (2, "STRICT_SPREAD", [3, 1], 1),
        (3, "STRICT_SPREAD", [9, 9], 0),
        ((1, 4), "PACK", [3], 3),
        ((1, 3), "PACK", [6], 2),
    ],
)
def test_room_is_counted_in_whole_runs(workers, strategy, cpus, room):
    cluster = ClusterConfig(num_workers=workers, placement_strategy=strategy)

    assert room_for_runs(cluster, [{"CPU": float(count)} for count in cpus]) == room


@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_scheduler_judges_a_trial_by_those_of_an_earlier_start(scheduler):
    config = SweepConfig(space=SPACE, num_samples=5, scheduler=scheduler)
    events = [report(f"trial_{number:04d}", step, 0.9 - number / 10) for number in range(3) for step in (1, 2, 3)]
    fresh, primed = (build_scheduler(config, "val_accuracy", "max") for _ in range(2))
    prime(primed, trials_of(events, "max").values(), "val_accuracy")
    tune, late = SimpleNamespace(get_live_trials=list), Mock(trial_id="late")

    decisions = []
    for judge in (fresh, primed):
        judge.on_trial_add(tune, late)
        decisions.append(judge.on_trial_result(tune, late, as_result("val_accuracy", 0.1, 1)))

    assert decisions == ["CONTINUE", "STOP"]


def report(trial: str, step: int, value: float | None, **settings: float) -> dict:
    return {
        "event": "trial_reported", "trial": trial, "step": step, "epoch": step - 1, "units": step, "value": value,
        "checkpoint": f"checkpoint_{step}", "settings": settings,
    }  # fmt: skip


def test_events_add_up_to_trials_and_a_takeover_forgets_what_was_reached_before():
    events = [
        {"event": "trial_started", "trial": "trial_0001", "settings": {"a": 1}},
        {"event": "trial_started", "trial": "trial_0000", "settings": {"a": 2}},
        report("trial_0000", 1, 0.5, a=2),
        report("trial_0000", 2, 0.4, a=2),
        report("trial_0000", 3, None, a=2),
        report("trial_0001", 1, 0.1, a=1),
        {
            "event": "trial_took_over", "trial": "trial_0001", "donor": "trial_0000", "settings": {"a": 3}, "step": 2,
            "epoch": 1,
        },
        report("trial_0001", 3, 0.3, a=3),
        {"event": "trial_ended", "trial": "trial_0000", "status": "stopped", "reason": "worse"},
    ]  # fmt: skip
    trials = trials_of(events, "min")

    assert list(trials) == ["trial_0000", "trial_0001"]
    first, second = trials.values()
    assert (first.status, first.reason, first.value, first.step) == ("stopped", "worse", 0.4, 3)
    assert (second.status, second.value, second.settings, second.takeovers) == (
        "running", 0.3, {"a": 3}, ["trial_0000"],
    )  # fmt: skip
    rows = list(csv.DictReader(io.StringIO(as_csv([second, first], "val_loss"))))
    assert [(row["trial"], float(row["val_loss"]), row["a"]) for row in rows] == [
        ("trial_0001", 0.3, "3"),
        ("trial_0000", 0.4, "2"),
    ]


def test_sweep_started_differently_is_refused_with_the_difference(tmp_path: Path):
    storage = Storage.open(tmp_path / "s")
    ledger = Ledger(storage, {"sweep.seed": 1, "model": {"width": 2}}, "val_loss", "min")
    ledger.open()
    ledger.record("trial_started", "trial_0000", settings={"a": 1})
    ledger.summarise("running")

    again = Ledger(storage, {"sweep.seed": 1, "model": {"width": 2}}, "val_loss", "min")
    again.require_same_sweep()
    assert again.trials["trial_0000"].status == "running"
    with pytest.raises(ConfigError, match=r"sweep\.seed was 1 and is 2.*another cluster\.name"):
        Ledger(storage, {"sweep.seed": 2, "model": {"width": 2}}, "val_loss", "min").require_same_sweep()


def test_trial_that_has_not_ended_when_a_sweep_ends_waits_for_the_next_start(tmp_path: Path):
    ledger = Ledger(Storage.open(tmp_path / "s"), {}, "val_loss", "min")
    ledger.open()
    ledger.record("trial_started", "trial_0000", settings={})
    ledger.record("trial_started", "trial_0001", settings={})
    ledger.record("trial_ended", "trial_0001", status="finished", reason="")

    ledger.conclude("out of time", "")

    summary = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert {trial["name"]: trial["status"] for trial in summary["trials"]} == {
        "trial_0000": "waiting",
        "trial_0001": "finished",
    }


def test_trial_that_went_on_after_its_last_report_is_told_as_far_as_it_went(tmp_path: Path):
    """A scheduler ends a trial at a report, and the run may have validated once more until it stops."""
    ledger = Ledger(Storage.open(tmp_path / "s"), {}, "val_loss", "min")
    ledger.open()
    experiments.run(tmp_path / "s/trials/trial_0000", epochs=2, keep_last_n=10)
    first, *_, last = list_checkpoints(ledger.storage.child("trials/trial_0000"))
    ledger.record("trial_started", "trial_0000", settings={})
    report = {"value": first.metrics["val_loss"] + 1, "checkpoint": first.name, "settings": {}, "units": 1}
    ledger.record("trial_reported", "trial_0000", step=first.step, epoch=first.epoch, **report)
    ledger.record("trial_ended", "trial_0000", status="stopped", reason="")

    ledger.conclude("finished", "")

    told = ledger.trials["trial_0000"]
    assert first.step < last.step
    assert (told.step, told.epoch) == (last.step, last.epoch)


def test_kinds_of_domains_are_those_of_the_functions():
    assert {next(iter(made)) for made in (choice([1]), grid([1]), uniform(0, 1), loguniform(1, 2), randint(0, 1))} == (
        set(KINDS)
    )
