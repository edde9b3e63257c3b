import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import pytest
from faulty_files import FaultyFiles

from ray_trainer.errors import LeaseHeldError, LeaseLostError
from ray_trainer.storage import Storage, exclusive
from ray_trainer.storage.claims import Claims
from ray_trainer.storage.exclusive import create_number, numbered_files
from ray_trainer.storage.holder import Holder
from ray_trainer.storage.lease import Terms, follow, holding

BRIEF = Terms(lease_s=0.2, renew_s=0.05)
DIES_HOLDING = """
import os, signal, sys
from ray_trainer.storage import Storage
from ray_trainer.storage.lease import holding
with holding(Storage.open(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(params=["disk", "object store"])
def run(request, tmp_path, monkeypatch):
    if request.param == "disk":
        return Storage.open(tmp_path / "run")
    monkeypatch.setattr(exclusive, "SETTLE_S", 0.02)
    return FaultyFiles(tmp_path).storage()


def claim_file(run):
    return next(name for name in run.child(".lease").list() if "renewed" not in name)


def rewrite(run, name, **changes):
    """As if another process had written it."""
    document = json.loads(run.child(".lease").read(name))
    for key, value in changes.items():
        document[key] = document[key] | value if isinstance(value, dict) else value
    run.child(".lease").write(name, json.dumps(document).encode())


def abandon(run, terms=BRIEF):
    """Leave the lease of a process elsewhere that has not released it."""
    with holding(run, terms):
        run.write("events.jsonl", b"")
    rewrite(run, "00000001.renewed.json", released=False)
    rewrite(run, claim_file(run), holder={"host": "elsewhere", "machine": "another"})


def test_second_holder_is_refused_with_who_since_when_and_how_and_writes_nothing(run):
    with holding(run):
        before = {name: run.child(".lease").read(name) for name in run.child(".lease").list()}
        with pytest.raises(LeaseHeldError) as caught, holding(run):
            pass
        assert {name: run.child(".lease").read(name) for name in run.child(".lease").list()} == before

    text = str(caught.value)
    assert f"process {os.getpid()}" in text
    assert time.strftime("since %Y-%m-%d") in text
    assert "--take-over" in text
    assert "take_over=True" in text


def test_lease_is_free_again_after_its_end_and_the_epoch_grows(run):
    epochs = []
    for _ in range(3):
        with holding(run) as lease:
            epochs.append(lease.number)
            run.write("events.jsonl", b"")

    assert epochs == [1, 2, 3]


def test_directory_in_which_nothing_but_the_lease_was_written_is_not_there_afterwards(tmp_path):
    run = Storage.open(tmp_path / "a" / "b")

    with holding(run):
        assert run.exists()

    assert list(tmp_path.iterdir()) == []


def test_lease_of_a_process_of_this_machine_that_was_killed_is_free_at_once(tmp_path):
    killed = subprocess.run([sys.executable, "-c", DIES_HOLDING, str(tmp_path)], check=False, timeout=60)
    assert killed.returncode == -9

    with holding(Storage.open(tmp_path)) as lease:
        assert lease.number == 2


def test_process_that_reuses_the_number_of_a_dead_one_is_not_taken_for_it():
    here = Holder.here()
    assert not here.is_known_to_be_dead()

    assert Holder.from_dict(here.to_dict() | {"started": "1"}).is_known_to_be_dead()
    assert not Holder.from_dict(here.to_dict() | {"started": "1", "machine": "another"}).is_known_to_be_dead()


def test_holder_elsewhere_is_believed_until_its_lease_expires(run):
    abandon(run, Terms(lease_s=1000, renew_s=100))

    with pytest.raises(LeaseHeldError, match="on elsewhere"), holding(run):
        pass


def test_expired_lease_of_a_machine_that_is_gone_is_free(run):
    abandon(run)
    time.sleep(BRIEF.lease_s)

    with holding(run, BRIEF) as lease:
        assert lease.number == 2


def test_lease_that_expired_by_a_wrong_clock_but_is_renewed_is_not_free(run):
    abandon(run)
    rewrite(run, "00000001.renewed.json", expires=1.0)
    renewed = threading.Timer(0.05, lambda: rewrite(run, "00000001.renewed.json", count=99))
    renewed.start()

    with pytest.raises(LeaseHeldError), holding(run, Terms(lease_s=0.2, renew_s=0.2)):
        pass
    renewed.join()


def test_torn_claim_is_taken_for_somebody_until_it_expires(run):
    abandon(run)
    run.child(".lease").write(claim_file(run), b"")
    run.child(".lease").delete("00000001.renewed.json")

    with pytest.raises(LeaseHeldError, match="an unknown host"), holding(run):
        pass
    time.sleep(BRIEF.lease_s)
    with holding(run, BRIEF):
        pass


@pytest.mark.parametrize("store", ["disk", "disk without links", "object store"])
def test_of_many_who_want_a_number_at_once_one_gets_it(tmp_path, monkeypatch, store):
    def no_link(source, target):
        raise PermissionError(1, "Operation not permitted")

    if store == "disk without links":
        monkeypatch.setattr(os, "link", no_link)
    monkeypatch.setattr(exclusive, "SETTLE_S", 0.2)
    place = FaultyFiles(tmp_path).storage() if store == "object store" else Storage.open(tmp_path)
    barrier = threading.Barrier(8)
    created = []

    def create(index):
        barrier.wait()
        created.append(create_number(place, 1, str(index).encode()))

    threads = [threading.Thread(target=create, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    winners = [name for name in created if name is not None]
    assert len(winners) == 1
    assert numbered_files(place) == {1: winners[0]}


def test_of_many_who_want_a_run_at_once_one_gets_it(tmp_path):
    outcomes = []
    done = threading.Barrier(6)

    def take():
        with ExitStack() as stack:
            try:
                outcomes.append(stack.enter_context(holding(Storage.open(tmp_path))).number)
            except LeaseHeldError:
                outcomes.append(None)
            done.wait()

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [number for number in outcomes if number is not None] == [1]


def test_who_was_taken_over_can_change_nothing_any_more(run):
    with holding(run, BRIEF) as old:
        mine = run.fenced(old.fence)
        mine.child("a").write("kept", b"old")
        with holding(run, take_over=True) as new:
            for change in (
                lambda: mine.write("x", b"old"),
                lambda: mine.child("a").write("kept", b"spoilt"),
                lambda: mine.child("a").delete("kept"),
                lambda: mine.move("a", "b"),
            ):
                with pytest.raises(LeaseLostError, match=f"taken over by process {os.getpid()}"):
                    change()
            run.fenced(new.fence).write("x", b"new")

        assert run.read("x") == b"new"
        assert run.child("a").read("kept") == b"old"
        assert run.list() == [".lease", "a", "x"]
        deadline = time.monotonic() + 5
        while old.lost is None:
            assert time.monotonic() < deadline, "its thread has not noticed"
            time.sleep(0.01)


def test_take_over_while_a_large_file_is_written_leaves_nothing_of_it(tmp_path):
    run = Storage.open(tmp_path)
    with ExitStack() as stack, holding(run) as old:

        def chunks():
            yield b"first"
            stack.enter_context(holding(run, take_over=True))
            yield b"second"

        with pytest.raises(LeaseLostError):
            run.fenced(old.fence).write_chunks("model", chunks())

        assert sorted(path.name for path in tmp_path.iterdir()) == [".lease"]


def test_lines_are_not_added_by_who_was_taken_over(tmp_path):
    run = Storage.open(tmp_path)
    with holding(run) as old:
        mine = run.fenced(old.fence)
        mine.append("events.jsonl", b"1\n")
        old.fence.GLANCE_LOCAL_S = 0.0
        with holding(run, take_over=True), pytest.raises(LeaseLostError):
            mine.append("events.jsonl", b"2\n")

    assert run.read("events.jsonl") == b"1\n"


def test_each_start_of_workers_fences_off_the_one_before_but_not_its_driver(run):
    with holding(run) as lease:
        first = run.fenced(follow(run, lease.number))
        first.write("a", b"1")
        second = run.fenced(follow(run, lease.number))

        with pytest.raises(LeaseLostError, match="started again"):
            first.write("a", b"2")
        second.write("b", b"1")
        run.fenced(lease.fence).write("c", b"1")
        assert second.fence.epoch > first.fence.epoch > lease.number


def test_workers_of_a_driver_that_was_taken_over_cannot_start_again(run):
    with holding(run) as old, holding(run, take_over=True), pytest.raises(LeaseLostError, match="taken over"):
        follow(run, old.number)


def test_driver_whose_workers_have_claimed_still_holds_the_run(run):
    with holding(run) as lease:
        follow(run, lease.number)

        with pytest.raises(LeaseHeldError), holding(run):
            pass


def test_directory_that_vanished_is_a_failure_of_storage_and_not_made_anew(tmp_path):
    run = Storage.open(tmp_path / "run")
    with holding(run) as lease:
        mine = run.fenced(lease.fence)
        mine.write("a", b"1")
        (tmp_path / "run").rename(tmp_path / "unmounted")

        with pytest.raises(FileNotFoundError, match="vanished"):
            mine.write("b", b"1")
        assert not (tmp_path / "run").exists()

        (tmp_path / "unmounted").rename(tmp_path / "run")
        mine.write("b", b"1")


def test_lease_that_somebody_deleted_is_lost_once_another_one_began(tmp_path):
    run = Storage.open(tmp_path)
    with holding(run):
        run.write("a", b"")
    with holding(run) as old:
        shutil.rmtree(tmp_path / ".lease")
        with holding(run), pytest.raises(LeaseLostError, match="deleted"):
            run.fenced(old.fence).write("x", b"1")


def test_fence_travels_with_its_storage_to_other_processes(run):
    with holding(run) as old:
        elsewhere = (
            pickle.loads(pickle.dumps(Storage.fenced(run, old.fence))) if run.is_local else run.fenced(old.fence)
        )
        assert elsewhere.fence.epoch == 1
        elsewhere.write("a", b"1")
        with holding(run, take_over=True), pytest.raises(LeaseLostError):
            elsewhere.write("a", b"2")


def test_lease_is_renewed_while_it_is_held(run):
    with holding(run, BRIEF):
        claims = Claims(run)
        claim = claims.leader(claims.files())
        deadline = time.monotonic() + 5
        while (renewal := claims.renewal(claim)) is None or renewal.count < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(LeaseHeldError), holding(run, BRIEF):
            pass


def test_old_claims_are_forgotten_but_not_the_driver_of_the_newest(run):
    with holding(run) as lease:
        for _ in range(5):
            newest = follow(run, lease.number)
            Claims(run).inherit(newest.epoch, [])

        assert list(Claims(run).files()) == [lease.number, newest.epoch]
        assert Claims(run).newest_inheritance().number == newest.epoch


def test_late_claim_of_a_number_that_is_free_again_does_not_count(run):
    with holding(run) as lease:
        follow(run, lease.number)
        newest = follow(run, lease.number)
        Claims(run).inherit(newest.epoch, [])  # number 2 is forgotten

        assert Claims(run).try_to_create(2) is None
        run.fenced(newest).write("a", b"1")
