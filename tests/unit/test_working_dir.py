"""What goes along with a job."""

import zipfile

import pytest

from ray_trainer.cluster.working_dir import biggest, packed_files, write_package
from ray_trainer.errors import ConfigError


def fill(directory, *names, size=10):
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(b"x" * size)


def names(directory):
    return [file.name for file in packed_files(directory)]


def test_runs_environments_and_caches_stay_at_home(tmp_path):
    fill(tmp_path, "a.py", "b/c.py", "runs/a/model.bin", ".git/HEAD", "b/.venv/x.py", "b/__pycache__/c.pyc", "d.pyc")
    fill(tmp_path, ".mypy_cache/x", "b/checkpoint_epoch0000_step00000001/model.safetensors")

    assert names(tmp_path) == ["a.py", "b/c.py"]


def test_ignore_files_hold_for_their_directory_and_the_inner_one_wins(tmp_path):
    fill(tmp_path, "a.csv", "b/a.csv", "b/keep.csv", "b/big.bin", "c/big.bin", "deep/er/x.txt")
    (tmp_path / ".gitignore").write_text("*.csv\n/deep/er/\n")
    (tmp_path / "b" / ".gitignore").write_text("!keep.csv\nbig.bin\n")

    assert names(tmp_path) == [".gitignore", "b/.gitignore", "b/keep.csv", "c/big.bin"]


def test_rayignore_takes_back_what_is_ignored_by_default(tmp_path):
    fill(tmp_path, "runs/table.csv", "runs/other.csv")
    (tmp_path / ".rayignore").write_text("!runs/\nother.csv\n")

    assert names(tmp_path) == [".rayignore", "runs/table.csv"]


def test_links_to_files_are_followed_and_those_to_directories_are_not(tmp_path):
    fill(tmp_path, "project/a.py", "data/big.bin")
    (tmp_path / "project" / "link.py").symlink_to(tmp_path / "project" / "a.py")
    (tmp_path / "project" / "data").symlink_to(tmp_path / "data")
    (tmp_path / "project" / "gone").symlink_to(tmp_path / "nothing")

    assert names(tmp_path / "project") == ["a.py", "link.py"]


def test_same_files_give_the_same_package_whatever_their_dates(tmp_path):
    packages = []
    for copy in ("one", "two"):
        fill(tmp_path / copy, "b.py", "a/c.py") if copy == "one" else fill(tmp_path / copy, "a/c.py", "b.py")
        write_package(tmp_path / copy, tmp_path / f"{copy}.zip")
        packages.append((tmp_path / f"{copy}.zip").read_bytes())
    assert packages[0] == packages[1]

    fill(tmp_path / "two", "b.py", size=11)
    write_package(tmp_path / "two", tmp_path / "three.zip")
    assert (tmp_path / "three.zip").read_bytes() != packages[0]


def test_package_holds_the_contents_and_the_executable_bit(tmp_path):
    fill(tmp_path / "project", "run.sh", "a/b.txt")
    (tmp_path / "project" / "run.sh").chmod(0o700)
    (tmp_path / "project" / "a" / "b.txt").write_text("hello")

    write_package(tmp_path / "project", tmp_path / "package.zip")

    with zipfile.ZipFile(tmp_path / "package.zip") as package:
        assert package.read("a/b.txt") == b"hello"
        assert package.getinfo("run.sh").external_attr >> 16 & 0o111
        assert not package.getinfo("a/b.txt").external_attr >> 16 & 0o111


def test_directory_that_is_too_large_is_refused_with_its_largest_parts(tmp_path):
    fill(tmp_path / "project", "a.py", "few/x.bin")
    (tmp_path / "project" / "data").mkdir()
    noise = b"".join(hash_block(number) for number in range(200))
    (tmp_path / "project" / "data" / "noise.bin").write_bytes(noise)

    with pytest.raises(ConfigError, match=r"(?s)too large.*\n +6\.2 KiB  data/\n +10 B  a\.py.*\.rayignore"):
        write_package(tmp_path / "project", tmp_path / "package.zip", largest_bytes=4096)


def hash_block(number):
    import hashlib

    return hashlib.sha256(bytes([number])).digest()


def test_largest_parts_come_first(tmp_path):
    fill(tmp_path, "a/x", "a/y", "b/x", "c.txt", size=100)

    assert biggest(packed_files(tmp_path)) == [("a/", 200), ("b/", 100), ("c.txt", 100)]
