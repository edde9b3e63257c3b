"""Large files go to the disk past the page cache where that can be done, and come out the same where it can't."""

import errno
import fcntl
import mmap
import os
import random
import resource

import pytest

from ray_trainer.storage import Storage

MB = 1 << 20
SIZES = [MB, 3 * MB, MB + 1, 2 * MB + 4096, 2 * MB + 4095]


@pytest.fixture
def memory():
    """6 MB that begin at a page, as an arena does."""
    pages = mmap.mmap(-1, 6 * MB)
    pages[:] = random.Random(0).randbytes(6 * MB)
    return memoryview(pages)


@pytest.fixture
def refused(monkeypatch):
    """A file system that has only the page cache, as some network file systems have; returns what it refused."""
    real, asked = fcntl.fcntl, []

    def refusing(descriptor, command, argument=0):
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            asked.append(descriptor)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", refusing)
    return asked


def pieces(content):
    return [content[start : start + 2 * MB] for start in range(0, len(content), 2 * MB)]


@pytest.mark.parametrize("offset", [0, 1, 4096])
@pytest.mark.parametrize("size", SIZES)
def test_large_file_reads_back_wherever_it_lay_in_memory(tmp_path, memory, size, offset):
    content = memory[offset : offset + size]

    Storage.open(tmp_path).write_chunks("a", pieces(content))

    assert (tmp_path / "a").read_bytes() == content


def test_small_pieces_between_large_ones_keep_their_place(tmp_path, memory):
    parts = [memory[:3], memory[: 2 * MB], memory[MB : 2 * MB], b"", memory[5:7], memory[3 * MB : 5 * MB]]

    Storage.open(tmp_path).write_chunks("a", parts)

    assert (tmp_path / "a").read_bytes() == b"".join(parts)


def test_file_system_that_has_only_the_page_cache_gets_the_same_file(tmp_path, memory, refused):
    Storage.open(tmp_path).write_chunks("a", pieces(memory))

    assert refused
    assert (tmp_path / "a").read_bytes() == memory


def test_large_file_is_not_in_the_page_cache(tmp_path, memory):
    with (tmp_path / "probe").open("wb") as file:
        try:
            fcntl.fcntl(file.fileno(), fcntl.F_SETFL, os.O_DIRECT)
            os.write(file.fileno(), memory[:4096])
        except OSError:
            pytest.skip("this file system has only the page cache")
    Storage.open(tmp_path).write_chunks("a", pieces(memory))

    with (tmp_path / "a").open("rb") as file, pytest.raises(BlockingIOError):
        os.preadv(file.fileno(), [bytearray(4096)], 0, os.RWF_NOWAIT)


def test_large_file_for_which_there_is_no_room_leaves_nothing_behind(tmp_path, memory):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * MB + 100, before[1]))
    try:
        with pytest.raises(OSError, match="ulimit -f") as caught:
            Storage.open(tmp_path).write_chunks("a", pieces(memory))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert caught.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []
