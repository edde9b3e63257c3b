"""Who becomes which rank when processes meet, die and come back; without Ray, on a clock of the test's own."""

from typing import Any

import pytest

from ray_trainer.cluster.rendezvous import Rendezvous

ASKS_EVERY_S = 0.1


class Workers:
    """Processes in the places of Ray's workers, that ask as real ones do, and those of them that are dead."""

    def __init__(self, num_ranks: int, num_spares: int = 0, may_shrink: bool = False) -> None:
        self.num_ranks, self.num_spares, self.may_shrink = num_ranks, num_spares, may_shrink
        self.now_s = 100.0
        self.dead: set[str] = set()
        self.known: dict[str, tuple[int, dict[int, Any]]] = {}  # by name: what it knows of the newest generation
        self.answers: dict[str, dict[str, Any]] = {}
        self.start_rendezvous()

    def start_rendezvous(self) -> None:
        num_places = self.num_ranks + self.num_spares
        self.rendezvous = Rendezvous(
            self.num_ranks, num_places, self.may_shrink, lambda card: card["name"] in self.dead, lambda: self.now_s
        )

    def ask(self, *names: str, rounds: int = 3) -> None:
        """Let processes ask in turn until they are in the next generation. A name is a place and a letter: 0a."""
        asking = list(names)
        for _ in range(rounds):
            for name in list(asking):
                number, members = self.known.get(name, (0, {}))
                answer = self.rendezvous.join({"name": name, "place": int(name[0])}, number)
                if answer["number"] < number:
                    self.rendezvous.remember(number, members)
                if "members" in answer:
                    self.known[name] = (answer["number"], answer["members"])
                    if name in self.generation(name)[1]:
                        asking.remove(name)
                self.answers[name] = answer
                self.now_s += ASKS_EVERY_S / len(names)

    def end(self, *names: str) -> list[dict[str, Any]]:
        """Let ranks say that they are done; what they are told."""
        told = []
        for name in names:
            number, members = self.known[name]
            (rank,) = [rank for rank, card in members.items() if card["name"] == name]
            told.append(self.rendezvous.end(rank, number, f"outcome of {rank}".encode()))
            self.now_s += ASKS_EVERY_S
        return told

    def generation(self, name: str) -> tuple[int, list[str]]:
        """The number and the ranks of the newest generation, as a process knows them."""
        number, members = self.known.get(name, (0, {}))
        return number, [members[rank]["name"] for rank in sorted(members)]


def two_with_spares(num_spares: int = 1) -> Workers:
    """Places 0 and 1 train together, the others wait."""
    workers = Workers(2, num_spares)
    spares = [f"{2 + spare}a" for spare in range(num_spares)]
    workers.ask(*spares, "1a", "0a")
    workers.ask(*spares)
    assert workers.generation("0a") == (1, ["0a", "1a"])
    return workers


def test_first_generation_needs_all_workers_and_ranks_them_by_their_places():
    workers = Workers(2, num_spares=1)

    workers.ask("2a", "1a")
    assert workers.generation("1a") == (0, [])
    assert workers.answers["2a"]["gathers"]

    workers.ask("2a", "1a", "0a")
    assert workers.generation("0a") == workers.generation("1a") == (1, ["0a", "1a"])
    assert not workers.answers["2a"]["gathers"]


def test_spare_takes_the_rank_of_the_dead_and_the_survivor_keeps_its_own():
    workers = two_with_spares()
    workers.dead.add("0a")

    workers.ask("1a", "2a")

    assert workers.generation("1a") == workers.generation("2a") == (2, ["2a", "1a"])


def test_process_that_ray_starts_for_the_dead_becomes_the_next_spare():
    workers = two_with_spares()
    workers.dead.add("0a")
    workers.ask("1a", "2a")

    workers.ask("0b")
    assert not workers.answers["0b"]["gathers"]

    workers.dead.add("2a")
    workers.ask("1a", "0b")
    assert workers.generation("0b") == (3, ["0b", "1a"])


def test_spares_wait_for_a_member_that_may_be_alive():
    workers = two_with_spares(num_spares=2)

    workers.ask("2a", "3a", "0a")
    assert workers.generation("2a") == (1, ["0a", "1a"])

    workers.ask("2a", "3a", "0a", "1a")
    assert workers.generation("0a") == (2, ["0a", "1a"])


def test_the_spare_that_has_waited_longest_is_taken():
    workers = two_with_spares(num_spares=2)
    workers.ask("2b", "3a")
    workers.dead |= {"2a", "1a"}

    workers.ask("2b", "3a", "0a")

    assert workers.generation("0a") == (2, ["0a", "3a"])
    assert not workers.answers["2b"]["gathers"]


def test_spare_that_dies_while_it_waits_disturbs_nobody():
    workers = two_with_spares()
    workers.dead.add("2a")

    assert workers.rendezvous.bury([2]) == {2: None}
    workers.ask("2b")

    assert workers.generation("2b") == (1, ["0a", "1a"])
    assert not workers.answers["2b"]["gathers"]


def test_spare_that_has_died_a_moment_ago_is_not_taken():
    workers = two_with_spares()
    workers.dead |= {"1a", "2a"}

    workers.ask("0a")
    assert workers.generation("0a") == (1, ["0a", "1a"])

    workers.ask("1b", "0a")
    assert workers.generation("0a") == (2, ["0a", "1b"])


def test_without_spares_a_survivor_waits_for_the_one_that_ray_starts():
    workers = Workers(2)
    workers.ask("0a", "1a")
    workers.ask("0a")
    assert workers.answers["0a"]["gathers"]

    workers.ask("0a", "1b")

    assert workers.generation("1b") == (2, ["0a", "1b"])


def test_all_members_dead_are_replaced_by_spare_and_newcomer():
    workers = two_with_spares()
    workers.dead |= {"0a", "1a"}

    workers.ask("2a", "0b")

    assert sorted(workers.generation("2a")[1]) == ["0b", "2a"]


@pytest.mark.parametrize(("knowing", "taken"), [("0a", "3b"), ("2a", "2a")], ids=["survivor", "spare"])
def test_rendezvous_that_starts_anew_is_told_by_any_that_knows(knowing, taken):
    workers = two_with_spares(num_spares=2)
    workers.start_rendezvous()

    workers.ask(knowing, "3b")
    assert workers.generation("3b") == (1, ["0a", "1a"])

    workers.dead.add("1a")
    workers.ask("0a", "2a", "3b")
    assert workers.generation("0a") == (2, ["0a", taken])


def test_rendezvous_that_nobody_can_tell_anything_forms_no_second_group_of_newcomers():
    workers = two_with_spares(num_spares=2)
    workers.start_rendezvous()

    workers.ask("2b", "3b", rounds=50)

    assert workers.generation("2b") == (0, [])


def test_outcome_of_rank_0_reaches_all_and_spares_know_before_the_others_leave():
    workers = two_with_spares()

    assert workers.end("0a") == [{"number": 1, "is_broken": False}]
    assert workers.end("1a") == [{"number": 1, "is_broken": False}]  # the spare has to ask first
    workers.ask("2a", rounds=1)
    assert workers.answers["2a"]["outcome"] == b"outcome of 0"
    assert [answer["outcome"] for answer in workers.end("0a", "1a")] == [b"outcome of 0"] * 2

    workers.ask("1b", rounds=1)  # Ray has replaced one that died after that
    assert workers.answers["1b"]["outcome"] == b"outcome of 0"


def test_rank_that_is_done_comes_back_when_another_dies_before_it_is():
    workers = two_with_spares()
    assert not workers.end("1a")[0]["is_broken"]

    workers.dead.add("0a")
    assert workers.end("1a")[0]["is_broken"]

    workers.ask("1a", "2a")
    assert workers.generation("2a") == (2, ["2a", "1a"])
    assert [answer["is_broken"] for answer in workers.end("1a", "2a")] == [False, False]


def test_failures_are_told_by_the_rank_of_who_failed_whoever_has_it_now():
    workers = two_with_spares()
    workers.dead.add("1a")
    workers.ask("0a", "2a")

    assert workers.rendezvous.bury([1]) == {1: 1}
    workers.dead.add("2a")
    assert workers.rendezvous.bury([2]) == {2: 1}


def test_newcomer_that_dies_while_it_is_waited_for_is_missed():
    workers = Workers(2)
    workers.ask("0a", "1a")
    workers.dead.add("1a")
    workers.rendezvous.bury([1])
    workers.ask("0a")

    (missed,) = workers.rendezvous.bury([1]).values()

    assert missed is not None


def test_generation_is_over_once_a_member_is_dead_or_replaced_and_not_when_all_are_done():
    workers = Workers(2)
    workers.ask("1a", "0a")

    def over(number: int) -> bool:
        return workers.rendezvous.outlook(number)["is_over"]

    assert not over(1)

    workers.dead.add("1a")
    assert over(1)
    workers.dead.clear()
    workers.ask("1b")  # Ray knows that the node is lost, and the survivor does not
    assert over(1)
    assert not over(0)  # of another one

    workers.ask("0a", "1b")
    assert not over(2)
    workers.end("0a", "1b")
    workers.dead.add("0a")
    assert not over(2)


def test_meeting_point_that_starts_anew_while_all_train_learns_from_who_listens_that_one_was_replaced():
    workers = Workers(2)
    workers.ask("0a", "1a")
    number, members = workers.known["0a"]
    workers.start_rendezvous()
    workers.dead.add("1a")
    workers.ask("1b")

    assert not workers.rendezvous.outlook(number)["is_over"]
    assert workers.rendezvous.outlook(number)["number"] == 0  # so that the caller tells it
    workers.rendezvous.remember(number, members)
    assert workers.rendezvous.outlook(number) == {"number": number, "is_over": True, "may_grow": False}


def three_that_may_shrink(num_spares: int = 0) -> Workers:
    workers = Workers(3, num_spares, may_shrink=True)
    spares = [f"{3 + spare}a" for spare in range(num_spares)]
    workers.ask(*spares, "2a", "1a", "0a")
    workers.ask(*spares)
    assert workers.generation("0a") == (1, ["0a", "1a", "2a"])
    return workers


def test_survivors_go_on_without_the_dead_where_any_number_of_ranks_does():
    workers = three_that_may_shrink()
    workers.dead.add("1a")

    workers.ask("0a")
    assert workers.generation("0a")[0] == 1  # the other survivor has the state as well, or trains
    workers.ask("2a", "0a")

    assert workers.generation("0a") == workers.generation("2a") == (2, ["0a", "2a"])


def test_group_grows_once_a_newcomer_is_ready_and_not_before():
    workers = three_that_may_shrink()
    workers.dead.add("0a")
    workers.ask("1a", "2a")
    assert workers.rendezvous.outlook(2) == {"number": 2, "is_over": False, "may_grow": False}

    workers.ask("0b", rounds=1)  # learns that it is not waited for, and prepares itself
    assert not workers.answers["0b"]["gathers"]
    assert not workers.rendezvous.outlook(2)["may_grow"]

    workers.ask("0b")
    assert workers.rendezvous.outlook(2)["may_grow"]
    assert not workers.rendezvous.outlook(1)["may_grow"]
    workers.ask("2a", "1a", "0b")
    assert workers.generation("0b") == workers.generation("1a") == (3, ["1a", "2a", "0b"])
    assert not workers.rendezvous.outlook(3)["may_grow"]


def test_newcomer_that_dies_while_the_survivors_come_for_it_is_not_waited_for():
    workers = three_that_may_shrink()
    workers.dead.add("1a")
    workers.ask("2a", "0a")
    workers.ask("1b")
    workers.dead.add("1b")
    assert not workers.rendezvous.outlook(2)["may_grow"]

    workers.ask("0a", "2a")

    assert workers.generation("0a") == (3, ["0a", "2a"])


def test_short_group_ends_the_run_and_latecomers_learn_of_it():
    workers = three_that_may_shrink()
    workers.dead |= {"0a", "1a"}
    workers.ask("2a")
    assert workers.generation("2a") == (2, ["2a"])

    assert workers.end("2a")[0]["outcome"] == b"outcome of 0"
    workers.ask("1b", rounds=1)
    assert workers.answers["1b"]["outcome"] == b"outcome of 0"


def test_spare_keeps_the_group_from_shrinking_and_is_not_awaited_by_a_full_one():
    workers = three_that_may_shrink(num_spares=1)
    assert not workers.rendezvous.outlook(1)["may_grow"]
    workers.dead.add("1a")

    workers.ask("3a", "0a", "2a")

    assert workers.generation("0a") == (2, ["0a", "3a", "2a"])


def test_all_dead_wait_for_each_other_although_fewer_could_train():
    workers = three_that_may_shrink()
    workers.dead |= {"0a", "1a", "2a"}

    workers.ask("0b", "1b")
    assert workers.generation("0b") == (1, ["0a", "1a", "2a"])

    workers.ask("0b", "1b", "2b")
    assert workers.generation("0b") == (2, ["0b", "1b", "2b"])


def test_survivors_wait_for_nobody_once_the_run_is_to_stop_and_know_that_they_must_not_train():
    workers = Workers(3)
    workers.ask("0a", "1a", "2a")
    workers.dead.add("1a")
    workers.ask("0a", "2a")
    assert workers.generation("0a") == (1, ["0a", "1a", "2a"])

    workers.rendezvous.stop(2)
    workers.ask("0a", "2a")

    assert workers.generation("0a") == (2, ["0a", "2a"])
    assert [card["stop"] for card in workers.known["2a"][1].values()] == [2, 2]
    assert [answer["is_broken"] for answer in workers.end("0a", "2a")] == [False, False]
    assert workers.rendezvous.outcome() == b"outcome of 0"


def test_run_that_is_to_stop_and_is_complete_does_so_by_itself():
    workers = Workers(2)
    workers.rendezvous.stop(3)

    workers.ask("0a", "1a")

    assert not any("stop" in card for card in workers.known["0a"][1].values())


def test_fewer_that_may_train_do_so_until_they_hear_of_the_stop_themselves():
    workers = three_that_may_shrink()
    workers.rendezvous.stop(2)
    workers.dead.add("0a")

    workers.ask("1a", "2a")

    assert [card["stop"] for card in workers.known["1a"][1].values()] == [0, 0]
