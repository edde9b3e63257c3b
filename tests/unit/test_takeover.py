"""A trial that takes over another one starts from its weights and optimizer, whatever happens to it meanwhile."""

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from experiments import Outcome, assert_same, carry_out, checkpoints, events, metric_rows, prepare, run

from ray_trainer import load_weights
from ray_trainer.cluster.takeover import Note, Offer, offer, same_decision, take_over
from ray_trainer.cluster.trial import is_finished
from ray_trainer.storage import Storage
from ray_trainer.storage.lease import holding

OTHER_RATE = 0.005
SETTINGS = {"training.learning_rate": OTHER_RATE}


@pytest.fixture
def trials(tmp_path: Path) -> Path:
    """Two trials, of which the second one is further."""
    run(tmp_path / "taker", epochs=1, learning_rate=0.1)
    run(tmp_path / "donor", epochs=2)
    return tmp_path


def first_offer(trials: Path) -> Offer:
    """The donor's checkpoint of its first epoch."""
    return offer(Storage.open(trials / "donor"), "donor", checkpoints(trials / "donor")[0], exchange(trials), units=1)


def exchange(trials: Path) -> Storage:
    return Storage.open(trials / "exchange")


def go_on(run_dir: Path, place: str) -> Outcome:
    return carry_out(prepare(run_dir, epochs=3, learning_rate=OTHER_RATE), resume_from=place)


def test_taker_goes_on_as_the_donor_would_with_the_same_settings(trials):
    offered = first_offer(trials)
    note = take_over(Storage.open(trials / "taker"), Note(offered, SETTINGS))
    assert checkpoints(trials / "taker") == []
    assert metric_rows(trials / "taker") == [
        row for row in metric_rows(trials / "donor") if row["step"] <= offered.step
    ]

    taken = go_on(trials / "taker", note.offer.place)
    other = go_on(trials / "other", str(trials / "donor" / checkpoints(trials / "donor")[0]))

    assert_same(taken.weights, other.weights)
    assert_same(taken.optimizer, other.optimizer)
    assert taken.schedule["base_lrs"] == [OTHER_RATE]
    assert taken.order == other.order


def test_offer_outlives_the_checkpoint_that_it_is_a_copy_of(trials):
    offered = first_offer(trials)
    Storage.open(trials / "donor").delete()

    note = take_over(Storage.open(trials / "taker"), Note(offered, SETTINGS))

    assert go_on(trials / "taker", note.offer.place).step > offered.step


def test_taker_that_was_killed_on_the_way_does_the_rest(trials):
    taker, note = Storage.open(trials / "taker"), Note(first_offer(trials), SETTINGS)
    note.write(taker)  # killed right after its decision
    taker.delete(checkpoints(trials / "taker")[0])  # or a little later

    found = Note.read(taker)
    assert found == note
    assert take_over(taker, found).is_cleared
    assert checkpoints(trials / "taker") == []
    go_on(trials / "taker", note.offer.place)
    left = checkpoints(trials / "taker")

    assert take_over(taker, Note.read(taker)).is_cleared  # started again later: nothing is cleared twice
    assert checkpoints(trials / "taker") == left


def test_process_that_still_ends_the_lineage_before_is_waited_for(trials):
    taker, offered = Storage.open(trials / "taker"), first_offer(trials)
    is_held, late = threading.Event(), trials / "taker" / "checkpoint_epoch0009_step00000099"

    def end_slowly() -> None:
        with holding(taker):
            is_held.set()
            time.sleep(1.5)
            shutil.copytree(trials / "donor" / checkpoints(trials / "donor")[0], late)

    with ThreadPoolExecutor() as pool:
        ending = pool.submit(end_slowly)
        is_held.wait()
        take_over(taker, Note(offered, SETTINGS))

    ending.result()
    assert checkpoints(trials / "taker") == []


def test_donor_keeps_its_three_newest_copies(trials):
    donor = Storage.open(trials / "donor")
    run(trials / "donor", epochs=5)

    for name in checkpoints(trials / "donor"):
        offer(donor, "donor", name, exchange(trials), units=1)

    kept = exchange(trials).child("donor").list()
    assert len(kept) == 3
    assert kept[-1].endswith(checkpoints(trials / "donor")[-1][-13:])


def test_donor_that_took_over_another_one_offers_its_new_weights_also_at_steps_where_it_has_been(trials):
    taker = Storage.open(trials / "taker")
    run(trials / "taker", epochs=4)
    before = [offer(taker, "taker", name, exchange(trials), units=1) for name in checkpoints(trials / "taker")][-3:]
    at_first = load_weights(before[0].place)
    note = take_over(taker, Note(first_offer(trials), SETTINGS))
    go_on(trials / "taker", note.offer.place)

    anew = offer(taker, "taker", checkpoints(trials / "taker")[0], exchange(trials), units=2)

    assert anew.step == before[0].step
    bias = "layers.0.bias"
    assert_same(load_weights(anew.place), load_weights(trials / "taker" / checkpoints(trials / "taker")[0]))
    assert not load_weights(anew.place)[bias].equal(at_first[bias])


def test_offer_is_taken_once_for_the_same_settings_and_again_for_others(trials):
    note = Note(first_offer(trials), SETTINGS)

    assert same_decision(note, note.offer.place, dict(SETTINGS))
    assert not same_decision(note, note.offer.place, {"training.learning_rate": 1.0})
    assert not same_decision(None, note.offer.place, SETTINGS)


def test_finished_run_is_known_as_such_until_it_takes_over_another_one(trials):
    taker = Storage.open(trials / "taker")
    assert is_finished(taker)
    assert not is_finished(Storage.open(trials / "absent"))

    take_over(taker, Note(first_offer(trials), SETTINGS))

    assert not is_finished(taker)
    (told,) = events(trials / "taker", "took_over")
    assert (told["donor"], told["settings"]) == ("donor", SETTINGS)
