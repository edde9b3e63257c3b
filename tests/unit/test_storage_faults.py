import errno
import os
import pickle
import random

import numpy as np
import pytest
import torch
from faulty_files import FaultyFiles

from ray_trainer.storage import Storage
from ray_trainer.storage.faults import advice, is_transient
from ray_trainer.storage.patience import Patience

PASSES = ["EIO", "EAGAIN", "EBUSY", "ESTALE", "ETIMEDOUT", "ECONNRESET", "EHOSTUNREACH", "ENOTCONN"]
STAYS = ["ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "ENOENT", "ENOTDIR", "EFBIG", "ENAMETOOLONG"]
OF_S3 = "When initiating multiple part upload for key 'k' in bucket 'b': AWS Error {} during PutObject operation: no"


@pytest.fixture
def files(tmp_path):
    return FaultyFiles(tmp_path)


@pytest.fixture
def storage(files):
    return files.storage().with_patience(Patience(limit_s=10, first_s=0.001))


@pytest.mark.parametrize("name", PASSES)
def test_error_of_a_disk_or_network_that_is_busy_is_transient(name):
    assert is_transient(OSError(getattr(errno, name), "x"))


@pytest.mark.parametrize("name", STAYS)
def test_error_that_only_a_human_can_mend_is_not_transient(name):
    assert not is_transient(OSError(getattr(errno, name), "x"))


@pytest.mark.parametrize(
    "text",
    [
        OF_S3.format("SERVICE_UNAVAILABLE"),
        OF_S3.format("SLOW_DOWN"),
        OF_S3.format("NETWORK_CONNECTION"),
        OF_S3.format("UNKNOWN (HTTP status 503)"),
        "google::cloud::Status(UNAVAILABLE: try later)",
    ],
)
def test_object_store_that_does_not_answer_is_transient(text):
    assert is_transient(OSError(text))


@pytest.mark.parametrize(
    "code", ["ACCESS_DENIED", "NO_SUCH_BUCKET", "INVALID_ACCESS_KEY_ID", "UNKNOWN (HTTP status 400)"]
)
def test_object_store_that_refuses_is_not_transient(code):
    assert not is_transient(OSError(OF_S3.format(code)))


@pytest.mark.parametrize(
    ("operation", "act"),
    [
        ("write", lambda storage: storage.write("a", b"xyz")),
        ("open", lambda storage: storage.read("a")),
        ("read", lambda storage: storage.read("a")),
        ("list", lambda storage: storage.list()),
        ("info", lambda storage: storage.exists("a")),
        ("info", lambda storage: storage.size("a")),
        ("delete", lambda storage: storage.delete("a")),
    ],
)
def test_failure_that_passes_is_not_noticed(files, storage, operation, act, caplog):
    storage.write("a", b"xyz")
    expected = act(storage)
    storage.write("a", b"xyz")
    files.fail(operation, errno.EIO, errno.ETIMEDOUT)

    assert act(storage) == expected
    assert files.failures == 2
    assert "Trying again" in caplog.text
    assert "succeeded after 2 failures" in caplog.text


def test_read_goes_on_where_it_failed(files, storage):
    content = os.urandom(1000)
    storage.write("a", content)
    reads = iter(range(100))
    files.fault = lambda operation, path: (
        OSError(errno.EIO, "x") if operation == "read" and next(reads) in (2, 3, 7) else None
    )

    assert b"".join(storage.blocks("a", block_bytes=100)) == content
    assert files.failures == 3


def test_failure_that_stays_is_raised_after_the_limit_with_the_name_of_the_file(files):
    storage = files.storage().with_patience(Patience(limit_s=0.05, first_s=0.01))
    storage.write("a", b"xyz")
    files.fail("write", *[errno.EIO] * 1000)

    with pytest.raises(OSError, match="run/a") as caught:
        storage.write("a", b"new")

    assert caught.value.errno == errno.EIO
    assert files.failures > 1
    assert storage.read("a") == b"xyz"


def test_full_disk_is_raised_at_once(files, storage):
    files.fail("write", errno.ENOSPC, errno.ENOSPC)

    with pytest.raises(OSError, match="MB are free"):
        storage.write("a", b"xyz")
    assert files.failures == 1


def test_impatient_storage_raises_at_once(files, storage):
    files.fail("list", errno.EIO)

    with pytest.raises(OSError, match="Input/output error"):
        storage.impatient().list()
    assert storage.list() == []


def test_pieces_from_a_generator_are_not_tried_again_because_they_are_gone(files, storage):
    files.fail("write", errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        storage.write_chunks("a", (piece for piece in (b"x", b"y")))

    files.fail("write", errno.EIO)
    storage.write_chunks("a", [b"x", b"y"])

    assert storage.read("a") == b"xy"


def test_trying_again_leaves_the_random_generators_of_the_training_alone(files, storage):
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    files.fail("write", errno.EIO, errno.EIO, errno.EIO)

    storage.write("a", b"xyz")

    assert files.failures == 3
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EROFS, "read-only"),
        (errno.EACCES, "change the permissions"),
        (errno.EDQUOT, "quota"),
        (errno.ENOTCONN, "mount it anew"),
    ],
)
def test_error_says_what_to_do_and_survives_pickling(files, storage, number, words):
    files.fail("write", *[number] * 50)

    with pytest.raises(OSError, match=words) as caught:
        storage.with_patience(Patience(limit_s=0)).write("a", b"xyz")

    assert type(pickle.loads(pickle.dumps(caught.value))) is type(OSError(number, ""))
    assert words in str(pickle.loads(pickle.dumps(caught.value)))


def test_advice_for_a_bucket_that_is_missing_names_the_bucket_as_the_cause():
    assert "no such bucket" in advice(OSError(OF_S3.format("NO_SUCH_BUCKET")), "b/k")
    assert advice(OSError(errno.ENOENT, "x"), "a") == ""


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_directory_without_permission_is_told_with_advice(tmp_path):
    tmp_path.chmod(0o500)

    with pytest.raises(PermissionError, match="change the permissions"):
        Storage.open(tmp_path / "run").write("a", b"x")
