"""Files that are not on this machine: object stores, HDFS, and what fsspec opens."""

import re
from collections.abc import Iterable
from contextlib import suppress

import pyarrow as pa
from pyarrow import fs as pafs

from ray_trainer.errors import ConfigError
from ray_trainer.storage.naming import naming

S3_REQUEST_TIMEOUT_S = 60.0
S3_CONNECT_TIMEOUT_S = 10.0

_SCHEMES = {"gcs": "gs"}  # where the scheme of URIs is not pyarrow's name for the file system


def filesystem_of(uri: str) -> tuple[pafs.FileSystem, str]:
    """Pyarrow's file system for a URI, else fsspec's."""
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri)
        filesystem = _with_time_limits(filesystem)
    except pa.ArrowInvalid:
        filesystem, path = _fsspec_of(uri)
    return filesystem, str(path)


def scheme_of(filesystem: pafs.FileSystem) -> str:
    """What a URI of this file system begins with."""
    name = str(filesystem.type_name)
    return _SCHEMES.get(name, name.removeprefix("py::").removeprefix("fsspec+"))


def without_secret(prefix: str) -> str:
    """``s3://key:secret@`` as ``s3://``: a URI ends up in logs and events."""
    return re.sub(r"://[^/@]*:[^/@]*@", "://", prefix)


def write(filesystem: pafs.FileSystem, path: str, chunks: Iterable[bytes | memoryview]) -> None:
    """Write one object; where that fails before its end or an object store refuses it, an earlier one stays.

    pyarrow offers no way to abandon an object that was begun: closing it, even in its destructor, makes it
    visible. One whose content broke off is therefore deleted again.
    """
    with naming(path):
        parent = path.rpartition("/")[0]
        if parent and not _is_object_store(filesystem):
            filesystem.create_dir(parent, recursive=True)
        stream = filesystem.open_output_stream(path)
        try:
            for chunk in chunks:
                stream.write(chunk)
        except BaseException:
            with suppress(OSError):
                stream.close()
            _delete_quietly(filesystem, path)
            raise
        try:
            stream.close()
        except OSError:
            if not _is_object_store(filesystem):
                _delete_quietly(filesystem, path)
            raise


def delete(filesystem: pafs.FileSystem, path: str) -> None:
    """Remove a file or a whole directory; one that is missing is fine."""
    kind = filesystem.get_file_info(path).type
    if kind == pafs.FileType.Directory:
        filesystem.delete_dir(path)
    elif kind != pafs.FileType.NotFound:
        filesystem.delete_file(path)


def move(filesystem: pafs.FileSystem, source: str, target: str) -> None:
    """Rename a file or directory; where names are all there is, copy its objects and delete them."""
    is_file = filesystem.get_file_info(source).type == pafs.FileType.File
    if is_file or not _is_object_store(filesystem):
        filesystem.move(source, target)
        return
    for file in filesystem.get_file_info(pafs.FileSelector(source, recursive=True)):
        if file.type == pafs.FileType.File:
            filesystem.copy_file(file.path, target + file.path.removeprefix(source))
    filesystem.delete_dir(source)


def _delete_quietly(filesystem: pafs.FileSystem, path: str) -> None:
    with suppress(OSError):
        filesystem.delete_file(path)


def _fsspec_of(uri: str) -> tuple[pafs.FileSystem, str]:
    try:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped] # comes with Ray Data

        filesystem, path = url_to_fs(uri)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"No file system is known for {uri!r} ({error}). Use a local path or a URI that pyarrow "
            f"(s3://, gs://, abfs://, hdfs://) or an installed fsspec package opens."
        ) from error
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path


def _with_time_limits(filesystem: pafs.FileSystem) -> pafs.FileSystem:
    """S3 with time to answer: out of the box it may think for 3 s, and a connection may take 1 s.

    URIs can't say so, hence the detour over the arguments that pickling uses. Small objects take one request
    instead of three with ``allow_delayed_open``.
    """
    if filesystem.type_name != "s3":
        return filesystem
    rebuild, (options,) = filesystem.__reduce__()
    limits = {"request_timeout": S3_REQUEST_TIMEOUT_S, "connect_timeout": S3_CONNECT_TIMEOUT_S}
    given = {name: options[name] for name in limits if options[name] > 0}
    return rebuild({**options, **limits, **given, "allow_delayed_open": True})


def _is_object_store(filesystem: pafs.FileSystem) -> bool:
    """Whether directories are mere prefixes of names: nothing to create, nothing to rename."""
    return filesystem.type_name in ("s3", "gcs")
