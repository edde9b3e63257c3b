"""A worker that is killed is replaced alone: the others stay, no step is lost or done twice, whatever comes next."""

import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import handover
import mortal_experiment
import pytest
import ray
from cluster_runs import (
    Command,
    assert_same_run,
    assert_times_add_up,
    command_line,
    descendants,
    kill,
    ray_of_two_cpus,
    stopped_controllers,
    training,
    whole_lines,
)
from digits_run import KILL_AT_STEP, digits
from experiments import events
from mortal_experiment import LAST_STEP, experiment_of

from ray_trainer import TrainingConfig
from ray_trainer.checkpoint.catalog import list_checkpoints
from ray_trainer.cluster import ClusterConfig
from ray_trainer.cluster.launch import fit_watched
from ray_trainer.cluster.watching import NoDisplay, Watch, user
from ray_trainer.runtime import Stop
from ray_trainer.storage import Storage

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(600)]

for module in (mortal_experiment, handover):
    ray.cloudpickle.register_pickle_by_value(module)  # workers cannot import it


def newest_row(command: Command) -> int:
    return int(whole_lines(command.run_dir / "metrics.jsonl")[-1]["step"])


def wait_for_attempt(command: Command, attempt: int) -> None:
    """Until a run goes on after its failures."""

    def has_resumed() -> bool | None:
        seen = [row["attempt"] for row in whole_lines(command.run_dir / "events.jsonl") if row["event"] == "resumed"]
        return attempt in seen or None

    command.until(has_resumed, f"attempt {attempt}")


def test_run_that_loses_each_rank_in_turn_ends_as_the_undisturbed_one(tmp_path: Path, undisturbed: Path) -> None:
    with training(digits(tmp_path)) as command:
        command.wait_for_step(1)
        first, second = command.worker_pid(0), command.worker_pid(1)
        rendezvous = command.actor_pid("Rendezvous")
        command.wait_for_step(KILL_AT_STEP)
        times = [time.time()]
        kill(second)
        first_killed_at = newest_row(command)
        wait_for_attempt(command, 2)
        kill(rendezvous)  # Ray starts it anew; it has nothing to remember
        command.wait_for_step(first_killed_at + 20)
        times.append(time.time())
        kill(first)
        second_killed_at = newest_row(command)
        assert command.wait() == 0, command.output
        assert "Traceback" not in command.output

    resumed = events(command.run_dir, "resumed")
    assert [event["tier"] for event in resumed] == ["survivor", "survivor"]
    assert resumed[0]["step"] - first_killed_at in (0, 1)
    assert resumed[1]["step"] - second_killed_at in (0, 1)
    rejoined = events(command.run_dir, "rejoined")
    assert [event["replaced"] for event in rejoined] == [[1], [0]]
    for killed_at, event in zip(times, rejoined, strict=True):
        assert_times_add_up(command.run_dir, killed_at, event, "waited_s", "group_s", "state_s")
    assert_same_run(undisturbed, command.run_dir)


def fit_with_deaths(
    directory: Path, *deaths: str, watching: AbstractContextManager[Watch] | None = None, **cluster_settings: Any
) -> Path:
    """The directory of a run of three workers in which each of these deaths came true."""
    graves = directory / "graves"
    graves.mkdir(parents=True, exist_ok=True)
    for death in deaths:
        (graves / death).touch()
    training = TrainingConfig(epochs=3, batch_size=5, log_every_n_steps=4, save_every_n_steps=5, tensorboard=False)
    cluster = ClusterConfig(
        num_workers=3,
        name="mortal",
        storage_path=str(directory),
        max_failures=20,
        **{"resources_per_worker": {"CPU": 0.5}, **cluster_settings},
    )
    values = {"graves": str(graves)}
    result = fit_watched(experiment_of(), training, cluster, values, watching or user(NoDisplay()))
    assert list(graves.iterdir()) == []
    return Path(result.run_dir)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The run of three workers in which nobody dies; its Ray is there for the others."""
    with ray_of_two_cpus():
        yield fit_with_deaths(tmp_path_factory.mktemp("whole"))


def test_deaths_in_every_phase_and_during_recovery_lose_and_repeat_no_step(tmp_path: Path, whole: Path) -> None:
    struck = fit_with_deaths(
        tmp_path / "struck",
        "in_forward_3-rank0",  # of its second step; the others wait for its gradients
        "handing_over-rank1",  # a survivor, once the newcomer has half of its state
        "in_restore-rank0",  # the newcomer, once it has all of the other's
        "in_restore-rank2",  # and that one: what the newcomer in the place of rank 1 was given must be enough
        "taking_over-rank2",  # who comes next, once it has half of that
        "after_validation-rank2",
        *(f"after_step_14-rank{rank}" for rank in range(3)),  # nobody is left: the checkpoint of step 12
        "at_the_end-rank0",  # the others are done, and come back for it
    )

    resumed = events(struck, "resumed")
    assert [event["step"] for event in resumed] == [1, 6, 12, LAST_STEP]
    assert [event["tier"] for event in resumed] == ["survivor", "survivor", "storage", "storage"]
    _, second, *_ = events(struck, "failure")
    assert events(struck, "rejoined")[0]["noticed_at"] < second["time"]  # by one who has died since
    assert_same_run(whole, struck)


def worker_pids() -> set[int]:
    return {pid for pid in descendants(os.getpid()) if command_line(pid).startswith("ray::RayTrainWorker")}


def test_spares_take_the_place_of_the_dead_and_their_own_deaths_disturb_nobody(tmp_path: Path, whole: Path) -> None:
    (tmp_path / "graves").mkdir()
    holds = [tmp_path / "graves" / f"hold_after_step_{step}" for step in (2, 12)]
    for hold in holds:
        hold.touch()
    run_dir = tmp_path / "mortal"

    def wait_for(event: str, of: str = "") -> dict[str, Any]:
        while True:
            rows = [row for row in whole_lines(run_dir / "events.jsonl") if row["event"] == event and of in str(row)]
            if rows:
                return rows[-1]
            assert not running.done(), running.result()
            time.sleep(0.05)

    with ThreadPoolExecutor() as pool:
        running = pool.submit(
            fit_with_deaths,
            tmp_path,
            "after_step_3-rank1",
            "after_step_9-rank0",
            spare_workers=2,
            resources_per_worker={"CPU": 0.4},
            hang_floor_s=None,
        )
        trains = wait_for("workers_started")["pids"]
        first, second = worker_pids() - set(trains)
        kill(first)
        assert f"(pid {first})" in wait_for("spare_lost")["cause"]
        holds[0].unlink()
        wait_for("failure", "rank 0")
        wait_for("rejoined", "'replaced': [0]")
        with stopped_controllers():  # the run ends without one
            holds[1].unlink()
            struck = running.result()

    resumed = events(struck, "resumed")
    assert [(event["step"], event["tier"]) for event in resumed] == [(3, "survivor"), (9, "survivor")]
    assert [event["replaced"] for event in events(struck, "rejoined")] == [[1], [0]]
    assert events(struck, "rejoined")[0]["by_spares"] == [1]
    assert events(struck, "workers_started")[1]["pids"] == [trains[0], second, trains[2]]
    failures = [event["cause"] for event in events(struck, "failure")]
    assert ["rank 1: " in " ".join(failures), "rank 2: " in " ".join(failures)] == [True, False]
    assert len(events(struck, "spare_lost")) == 1
    assert_same_run(whole, struck)


class Following:
    """Somebody who follows a run and may end it."""

    stop = Stop.NONE

    def wish(self) -> Stop:
        return self.stop

    def see(self, progress: Mapping[str, Any], events: list[dict[str, Any]]) -> None:
        pass


def test_survivors_that_wait_for_another_one_save_when_the_run_is_to_stop(tmp_path: Path, whole: Path) -> None:
    hold = tmp_path / "graves" / "hold_after_step_8"
    hold.parent.mkdir()
    hold.touch()
    run_dir = tmp_path / "mortal"
    follower = Following()
    with ThreadPoolExecutor() as pool:
        running = pool.submit(fit_with_deaths, tmp_path, "after_step_9-rank1", watching=nullcontext(follower))
        while not any(row["step"] == 8 for row in whole_lines(run_dir / "metrics.jsonl")):
            assert not running.done(), running.result()
            time.sleep(0.05)
        with stopped_controllers():  # nobody comes
            hold.unlink()
            while (tmp_path / "graves" / "after_step_9-rank1").exists():
                time.sleep(0.05)
            follower.stop = Stop.SIGTERM
            with pytest.raises(SystemExit, match="143"):
                running.result()

    assert list_checkpoints(Storage.open(str(run_dir)))[-1].step == 9
    assert [event["by"] for event in events(run_dir, "interrupted")] == ["SIGTERM"]
    assert_same_run(whole, fit_with_deaths(tmp_path))
