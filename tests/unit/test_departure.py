"""When a run leaves nodes that are going to be taken away."""

import pytest

from ray_trainer.cluster.departure import Departure, Move

NOW = 1_700_000_000.0


def moves(departure: Departure, deadlines: dict[str, float], seconds: range, has_room: bool = False) -> dict[int, Move]:
    """What is done, by the second; nothing where the run just stays."""
    found = {second: departure.next_move(deadlines, has_room, NOW + second) for second in seconds}
    return {second: move for second, move in found.items() if move is not Move.STAY}


def test_node_is_left_at_once_if_there_is_room_elsewhere():
    assert moves(Departure(["a", "b"], outlives=False), {"a": NOW + 120}, range(1), has_room=True) == {0: Move.LEAVE}


@pytest.mark.parametrize(("notice_s", "leaves_after_s"), [(30, 20), (120, 90), (3600, 2700)])
def test_run_without_room_elsewhere_saves_trains_on_and_leaves_in_time(notice_s, leaves_after_s):
    found = moves(Departure(["a"], outlives=False), {"a": NOW + notice_s}, range(leaves_after_s + 1))

    assert found == {0: Move.SAVE, leaves_after_s: Move.LEAVE}


def test_node_is_left_once_there_is_room():
    departure = Departure(["a"], outlives=True)

    assert moves(departure, {"a": NOW + 120}, range(50)) == {0: Move.SAVE}
    assert moves(departure, {"a": NOW + 120}, range(50, 51), has_room=True) == {50: Move.LEAVE}


def test_node_that_goes_at_an_unknown_time_or_at_once_is_left_at_once():
    for deadline in (0, NOW - 5, NOW, NOW + 5):
        assert moves(Departure(["a"], outlives=False), {"a": deadline}, range(1)) == {0: Move.LEAVE}


def test_those_who_go_on_by_themselves_save_twice_for_each_node_and_do_not_leave():
    departure = Departure(["a", "b", "c"], outlives=True)

    assert moves(departure, {"a": NOW + 40}, range(20)) == {0: Move.SAVE}
    assert moves(departure, {"a": NOW + 40, "b": NOW + 60}, range(20, 61)) == {
        20: Move.SAVE,
        30: Move.SAVE,
        50: Move.SAVE,
    }


def test_nobody_goes_on_when_all_nodes_are_taken_away():
    departure = Departure(["a", "b"], outlives=True)

    assert moves(departure, {"a": NOW + 40, "b": NOW + 40}, range(31)) == {0: Move.SAVE, 30: Move.LEAVE}


def test_nodes_of_others_are_none_of_its_business():
    assert Departure(["a", "b"], outlives=False).affected({"b": 1.0, "c": 2.0}) == {"b": 1.0}
