"""`doctor`: what is wrong is called wrong, with what to do, and what is right is not."""

import json
from importlib import metadata

import pytest

from ray_trainer.cli import diagnosis, main
from ray_trainer.cluster.nodes import NodeFacts
from ray_trainer.storage import Storage


def states(findings) -> list[str]:
    return [finding.state for finding in findings]


def versions(**installed: str):
    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    return version


def test_missing_and_too_old_packages_are_wrong_and_extras_are_not_asked_for():
    needs = ["torch>=2.6", "xxhash>=3", "numpy>=1", 'optuna>=4; extra == "hpo"']

    found = list(diagnosis.packages(needs, versions(torch="2.5.1", numpy="2.0")))

    assert [(finding.state, finding.text) for finding in found] == [
        ("wrong", "torch: installed is 2.5.1"),
        ("wrong", "xxhash: not installed"),
    ]
    assert found[0].advice == "pip install 'torch>=2.6'"


def test_fewer_cpus_than_the_machine_has_are_worth_a_note():
    assert states(diagnosis.processors(8, 8, None, {})) == ["ok"]
    (note,) = diagnosis.processors(8, 8, 2.0, {})
    assert (note.state, "--num-cpus=2" in note.advice) == ("note", True)
    assert states(diagnosis.processors(8, 4, None, {"OMP_NUM_THREADS": "16"})) == ["note", "note"]


def test_small_shared_memory_is_wrong():
    assert diagnosis.shared_memory("here", 4 << 30, 8 << 30).state == "ok"
    small = diagnosis.shared_memory("here", 64 << 20, 8 << 30)
    assert (small.state, "--shm-size=3g" in small.advice) == ("wrong", True)


def test_full_disk_is_wrong():
    assert diagnosis.temporary_space("/tmp", 1000, 60).state == "ok"
    assert diagnosis.temporary_space("/tmp", 1000, 40).state == "wrong"


def test_token_that_is_asked_for_and_not_there_is_wrong(tmp_path):
    assert diagnosis.authentication({}, tmp_path).state == "ok"
    assert diagnosis.authentication({"RAY_AUTH_MODE": "token"}, tmp_path).state == "wrong"
    assert diagnosis.authentication({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x"}, tmp_path).state == "ok"


def test_token_of_this_machine_that_would_not_be_shown_is_worth_a_note(tmp_path):
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("x")

    assert diagnosis.authentication({}, tmp_path).state == "note"
    assert diagnosis.authentication({"RAY_AUTH_MODE": "token"}, tmp_path).state == "ok"
    assert diagnosis.authentication({"RAY_AUTH_MODE": "disabled"}, tmp_path).state == "ok"


def test_clocks_further_apart_than_the_error_explains_are_wrong():
    assert diagnosis.clocks("a", 0.3, 0.1).state == "ok"
    assert diagnosis.clocks("a", -1.5, 1.0).state == "ok"
    assert diagnosis.clocks("a", -30.0, 1.0).state == "wrong"


def test_writable_storage_is_fine_and_left_as_it_was(tmp_path):
    assert states(diagnosis.storage(str(tmp_path / "runs" / "deep")))[:2] == ["ok", "ok"]
    assert list(tmp_path.iterdir()) == []


def test_clock_of_the_storage_is_compared(tmp_path):
    found = {finding.subject: finding.state for finding in diagnosis.storage(str(tmp_path), clock=lambda: 1000.0)}

    assert found["clock"] == "wrong"


def test_storage_that_is_a_file_or_of_no_known_kind_is_wrong(tmp_path):
    (tmp_path / "file").write_text("")

    assert "wrong" in states(diagnosis.storage(str(tmp_path / "file")))
    assert states(diagnosis.storage("nosuchscheme://bucket/runs")) == ["wrong"]


def test_storage_that_replaces_files_in_two_steps_is_wrong(tmp_path, monkeypatch):
    def in_two_steps(self: Storage, name: str, data: bytes) -> None:
        path = self.local_path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for start in range(0, len(data), 4096):
                file.write(data[start : start + 4096])
                file.flush()

    monkeypatch.setattr(Storage, "write", in_two_steps)

    assert states(diagnosis.storage(str(tmp_path)))[0] == "wrong"


def node(**changes) -> list[str]:
    facts = NodeFacts(
        **{"host": "b", "versions": {"torch": "2.13"}, "memory_bytes": 8, "shared_memory_bytes": 8} | changes
    )
    return [
        finding.subject for finding in diagnosis.node(facts, True, lambda package: "2.13") if finding.state == "wrong"
    ]


def test_node_with_other_versions_clock_or_storage_is_wrong():
    assert node() == []
    assert node(versions={"torch": "2.12"}) == ["node"]
    assert node(versions={"torch": None}) == ["node"]
    assert node(clock_offset_s=20.0) == ["clock"]
    assert node(storage_problem="FileNotFoundError: runs/.doctor-1/driver") == ["storage"]
    assert node(problem="it died") == ["node"]


def test_node_whose_file_is_not_seen_here_does_not_share_the_storage():
    facts = NodeFacts("b", versions={}, memory_bytes=8, shared_memory_bytes=8)

    found = {finding.subject: finding.state for finding in diagnosis.node(facts, is_seen=False, installed=str)}

    assert found["storage"] == "wrong"


def test_command_ends_with_1_if_something_is_wrong_and_prints_json(tmp_path, capsys):
    (tmp_path / "file").write_text("")

    assert main(["doctor", "--json", "--storage-path", str(tmp_path / "file")]) == 1

    found = json.loads(capsys.readouterr().out)
    wrong = [finding for finding in found if finding["state"] == "wrong"]
    assert "storage" in {finding["subject"] for finding in wrong}
    assert all(finding["advice"] for finding in wrong)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "http://127.0.0.1:1"])
def test_address_where_nobody_listens_is_told_at_once(tmp_path, capsys, address):
    assert main(["doctor", "--address", address, "--storage-path", str(tmp_path)]) == 1

    assert "127.0.0.1:1" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
