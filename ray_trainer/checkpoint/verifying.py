"""Whether the files of a checkpoint are what its manifest says."""

from collections.abc import Iterator
from contextlib import contextmanager

import xxhash

from ray_trainer.checkpoint.manifest import FileEntry, Manifest
from ray_trainer.errors import CheckpointCorruptError
from ray_trainer.storage import Storage


def size_problems(checkpoint: Storage, manifest: Manifest) -> list[str]:
    """What the names and sizes of the files already tell."""
    return [
        problem
        for name, entry in manifest.files.items()
        if (problem := _size_problem(name, entry, _size_of(checkpoint, name)))
    ]


def content_problem(checkpoint: Storage, name: str, entry: FileEntry) -> str | None:
    """What is wrong with a file; None if it is whole."""
    try:
        with checked(checkpoint, name, entry) as blocks:
            for _ in blocks:
                pass
    except CheckpointCorruptError as error:
        return str(error)
    return None


@contextmanager
def checked(checkpoint: Storage, name: str, entry: FileEntry) -> Iterator[Iterator[bytes | memoryview]]:
    """The content of a file, read once: what was read is what was checked when the block ends.

    Raises:
        CheckpointCorruptError: the file is missing or altered; stands over errors of what read it.
    """
    digest = xxhash.xxh3_128()

    def hashed() -> Iterator[bytes | memoryview]:
        for block in checkpoint.blocks(name):
            digest.update(block)
            yield block

    if problem := _size_problem(name, entry, _size_of(checkpoint, name)):
        raise CheckpointCorruptError(problem)
    blocks = hashed()
    try:
        yield blocks
    except CheckpointCorruptError as error:
        _check_rest(name, entry, blocks, digest)
        raise error
    except (FileNotFoundError, IsADirectoryError) as error:
        raise CheckpointCorruptError(f"{name} is missing") from error
    _check_rest(name, entry, blocks, digest)


def _check_rest(name: str, entry: FileEntry, blocks: Iterator[bytes | memoryview], digest: xxhash.xxh3_128) -> None:
    for _ in blocks:
        pass
    if digest.hexdigest() != entry.xxh3_128:
        raise CheckpointCorruptError(f"{name} was altered: its checksum is not the manifest's")


def _size_of(checkpoint: Storage, name: str) -> int | None:
    try:
        return checkpoint.size(name)
    except FileNotFoundError:
        return None


def _size_problem(name: str, entry: FileEntry, size: int | None) -> str | None:
    if size is None:
        return f"{name} is missing"
    return None if size == entry.size else f"{name} has {size} bytes instead of {entry.size}"
