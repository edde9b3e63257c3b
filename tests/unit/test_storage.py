import errno
import io
import os
import pickle
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow import fs as pafs

from ray_trainer.errors import ConfigError
from ray_trainer.storage import Storage


@pytest.fixture(params=["local", "subtree", "memory"])
def storage(request, tmp_path):
    if request.param == "local":
        return Storage.open(tmp_path / "run")
    if request.param == "subtree":
        return Storage.of(pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()), "run")
    filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(MemoryFileSystem()))
    return Storage.of(filesystem, f"{tmp_path.name}/run")


def test_written_file_reads_back_and_replaces_the_one_before(storage):
    storage.write("a.bin", b"first")
    storage.write("a.bin", memoryview(b"second"))

    assert storage.read("a.bin") == b"second"
    assert storage.size("a.bin") == 6
    assert storage.list() == ["a.bin"]


def test_chunks_become_one_file_that_reads_back_in_blocks(storage):
    storage.write_chunks("a.bin", (bytes([value]) * 3 for value in range(4)))

    assert storage.read("a.bin") == b"\0\0\0\1\1\1\2\2\2\3\3\3"
    assert b"".join(storage.blocks("a.bin", block_bytes=5)) == storage.read("a.bin")


def test_empty_file_reads_back(storage):
    storage.write("empty", b"")

    assert storage.read("empty") == b""
    assert storage.size("empty") == 0


def test_child_is_a_directory_that_appears_with_its_first_file(storage):
    child = storage.child("one").child("two")

    assert not child.exists()
    assert child.list() == []
    child.write("a", b"x")

    assert storage.list() == ["one"]
    assert storage.child("one").list() == ["two"]
    assert child.exists()
    assert child.exists("a")


def test_missing_file_is_file_not_found_with_its_full_name(storage):
    with pytest.raises(FileNotFoundError) as reading:
        storage.read("nothing")
    with pytest.raises(FileNotFoundError) as sizing:
        storage.size("nothing")

    for caught in (reading, sizing):
        assert caught.value.errno == errno.ENOENT
        assert f"{storage.path}/nothing" in str(caught.value)


def test_delete_removes_files_and_directories_and_accepts_missing_ones(storage):
    storage.write("a", b"x")
    storage.child("sub").child("deep").write("b", b"y")

    storage.delete("a")
    storage.delete("sub")
    storage.delete("never-there")

    assert storage.list() == []
    storage.delete()
    assert not storage.exists("a")


def test_directory_moves_with_all_its_files_and_never_onto_another(storage):
    storage.child("old").write("a", b"x")
    storage.child("taken").write("a", b"y")

    with pytest.raises(FileExistsError):
        storage.move("old", "taken")
    storage.move("old", "new")

    assert storage.list() == ["new", "taken"]
    assert storage.child("new").read("a") == b"x"
    assert storage.child("taken").read("a") == b"y"


def test_content_that_fails_halfway_leaves_nothing_behind(storage):
    def chunks():
        yield b"half"
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        storage.write_chunks("a", chunks())

    assert storage.list() == []


def test_content_that_fails_halfway_leaves_the_local_file_before_it(tmp_path):
    def chunks():
        yield b"half"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    storage = Storage.open(tmp_path)
    storage.write("a", b"whole")

    with pytest.raises(OSError, match="No space") as caught:
        storage.write_chunks("a", chunks())

    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "a")
    assert storage.read("a") == b"whole"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_unfinished_file_of_a_killed_writer_is_not_listed(tmp_path):
    (tmp_path / f".a.{'0' * 32}.tmp").write_bytes(b"half")
    (tmp_path / ".hidden").write_bytes(b"a user's")

    assert Storage.open(tmp_path).list() == [".hidden"]


def test_write_syncs_the_file_before_its_name_and_the_directory_after(tmp_path, monkeypatch):
    storage = Storage.open(tmp_path / "run")
    synced = []
    real_fsync = os.fsync

    def recording_fsync(descriptor):
        synced.append((Path(f"/proc/self/fd/{descriptor}").resolve(), (tmp_path / "run" / "a").exists()))
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    storage.write("a", b"x")

    parent, file, directory = synced
    assert parent == (tmp_path, False)  # the new directory's own name
    assert file[0].name.startswith(".a.")
    assert not file[1]
    assert directory == (tmp_path / "run", True)


def test_append_adds_to_the_end_and_makes_the_directory(tmp_path):
    storage = Storage.open(tmp_path / "run")

    storage.append("events.jsonl", b"one\n")
    storage.append("events.jsonl", b"two\n")

    assert storage.read("events.jsonl") == b"one\ntwo\n"


def test_append_and_local_path_are_refused_where_there_are_none():
    storage = Storage.open("memory://bucket/run")

    assert not storage.is_local
    with pytest.raises(io.UnsupportedOperation, match="memory://bucket/run"):
        storage.append("events.jsonl", b"line")
    with pytest.raises(io.UnsupportedOperation):
        storage.local_path()


def test_relative_path_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    storage = Storage.open("runs/../runs/a")

    assert storage.uri == str(tmp_path / "runs" / "a")
    assert storage.local_path("f") == tmp_path / "runs" / "a" / "f"


def test_file_uri_is_local(tmp_path):
    storage = Storage.open(f"file://{tmp_path}/run")

    assert storage.is_local
    assert storage.uri == str(tmp_path / "run")


def test_uri_leads_back_to_the_same_directory():
    storage = Storage.open("memory://bucket/run").child("one")
    storage.write("a", b"x")

    assert storage.uri == "memory://bucket/run/one"
    assert Storage.open(storage.uri).read("a") == b"x"


@pytest.mark.parametrize(
    ("location", "shown"),
    [
        ("s3://bucket/run?region=us-east-1", "s3://bucket/run/child?region=us-east-1"),
        ("s3://key:secret@bucket/run?region=us-east-1", "s3://bucket/run/child?region=us-east-1"),
        ("gs://bucket/run/", "gs://bucket/run/child"),
    ],
)
def test_uri_of_a_child_keeps_options_and_loses_credentials(location, shown):
    assert Storage.open(location).child("child").uri == shown


def test_file_system_that_ray_passes_is_named_by_its_scheme():
    assert Storage.of(pafs.S3FileSystem(region="us-east-1"), "bucket/run").uri == "s3://bucket/run"


def test_unknown_scheme_is_refused_with_what_is_allowed():
    with pytest.raises(ConfigError, match=r"nosuch://.*s3://"):
        Storage.open("nosuch://bucket/run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_forbidden_directory_is_named(tmp_path):
    tmp_path.chmod(0o500)

    with pytest.raises(PermissionError) as caught:
        Storage.open(tmp_path).write("a", b"x")

    assert caught.value.filename == str(tmp_path / "a")


def test_directory_in_the_way_is_named(tmp_path):
    (tmp_path / "a").mkdir()

    with pytest.raises(IsADirectoryError) as caught:
        Storage.open(tmp_path).write("a", b"x")

    assert caught.value.filename == str(tmp_path / "a")


def test_storage_survives_pickling(storage):
    storage.write("a", b"x")

    assert pickle.loads(pickle.dumps(storage)).read("a") == b"x"
