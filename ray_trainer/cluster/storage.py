"""The file system that Ray Train writes through, so that what it keeps there cannot end a run.

Ray keeps a list of checkpoints of its own beside ours. By itself it writes that list in place, dies of one failed
write (`ControllerError`, whatever ``max_failures`` says), and refuses to start where the list is torn or names a
directory that is gone. The manifests are the truth here, and the list a mirror of them.
"""

import io
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pyarrow as pa
import ray
from pyarrow import fs as pafs

from ray_trainer.checkpoint import CheckpointRecord
from ray_trainer.config import TrainingConfig
from ray_trainer.errors import LeaseLostError
from ray_trainer.storage import NO_FENCE, Storage
from ray_trainer.storage.lease import holding
from ray_trainer.storage.patience import PATIENT, Patience

T = TypeVar("T")

logger = logging.getLogger(__name__)

#: Ray's list of checkpoints in the run's directory.
SNAPSHOT = "checkpoint_manager_snapshot.json"
_MIRROR_PATIENCE = Patience(limit_s=1.0)
_MIRROR_PAUSE_S = 60.0


class RunFiles(pafs.FileSystemHandler):
    """A file system that tries again what may pass, and changes nothing of a run that belongs to others.

    Ray's list is written whole or not at all, and a list that can't be written is told and forgotten. Equal where
    file system and directory are: Ray compares file systems to find out whose a checkpoint is.

    Args:
        run: the run's directory, fenced.
    """

    def __init__(self, run: Storage) -> None:
        self._run = run
        self._inner: Any = run.filesystem
        self._mirror_again_at_s = float("-inf")

    def __eq__(self, other: object) -> bool:
        """See the class."""
        if not isinstance(other, RunFiles):
            return NotImplemented
        return bool(self._inner == other._inner) and self._run.path == other._run.path

    def __hash__(self) -> int:
        """Of what is compared; pyarrow's file systems have none."""
        return hash((self._inner.type_name, self._run.path))

    def storage(self) -> Storage:
        """The run's directory as it was opened, with nothing in between."""
        return self._run

    def get_type_name(self) -> str:
        """See `pyarrow.fs.FileSystemHandler`, here and below."""
        return f"ray_trainer+{self._inner.type_name}"

    def get_file_info(self, paths: list[str]) -> Any:  # noqa: D102
        return self._try(lambda: self._inner.get_file_info(paths), "looking for files")

    def get_file_info_selector(self, selector: pafs.FileSelector) -> Any:  # noqa: D102
        return self._try(lambda: self._inner.get_file_info(selector), selector.base_dir)

    def create_dir(self, path: str, recursive: bool) -> None:  # noqa: D102
        self._try(lambda: self._inner.create_dir(path, recursive=recursive), path)

    def delete_dir(self, path: str) -> None:  # noqa: D102
        self._change(lambda: self._inner.delete_dir(path), path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:  # noqa: D102
        self._change(lambda: self._inner.delete_dir_contents(path, missing_dir_ok=missing_dir_ok), path)

    def delete_root_dir_contents(self) -> None:  # noqa: D102
        raise PermissionError("Nobody deletes all of a storage through the file system of one run.")

    def delete_file(self, path: str) -> None:  # noqa: D102
        self._change(lambda: self._inner.delete_file(path), path)

    def move(self, src: str, dest: str) -> None:  # noqa: D102
        self._change(lambda: self._inner.move(src, dest), src)

    def copy_file(self, src: str, dest: str) -> None:  # noqa: D102
        self._change(lambda: self._inner.copy_file(src, dest), src)

    def open_input_stream(self, path: str) -> Any:  # noqa: D102
        return self._try(lambda: self._inner.open_input_stream(path), path)

    def open_input_file(self, path: str) -> Any:  # noqa: D102
        return self._try(lambda: self._inner.open_input_file(path), path)

    def open_output_stream(self, path: str, metadata: Any) -> Any:  # noqa: D102
        if path == f"{self._run.path.rstrip('/')}/{SNAPSHOT}":
            return pa.PythonFile(_Mirror(self._write_mirror), mode="w")
        return self._change(lambda: self._inner.open_output_stream(path, metadata=metadata), path)

    def open_append_stream(self, path: str, metadata: Any) -> Any:  # noqa: D102
        return self._change(lambda: self._inner.open_append_stream(path, metadata=metadata), path)

    def normalize_path(self, path: str) -> str:  # noqa: D102
        return str(self._inner.normalize_path(path))

    def _write_mirror(self, data: bytes) -> None:
        """Write Ray's list, unless that failed a moment ago: the controller has better things to wait for."""
        if time.monotonic() < self._mirror_again_at_s:
            return
        try:
            self._run.with_patience(_MIRROR_PATIENCE).write(SNAPSHOT, data)
        except (OSError, LeaseLostError) as error:
            self._mirror_again_at_s = time.monotonic() + _MIRROR_PAUSE_S
            logger.warning("Ray's list of checkpoints can't be written; the next start rebuilds it: %s", error)

    def __getstate__(self) -> dict[str, Any]:
        """Without what has a meaning on this machine only."""
        return {**self.__dict__, "_mirror_again_at_s": float("-inf")}

    def _try(self, action: Callable[[], T], what: str) -> T:
        return PATIENT.attempt(action, what)

    def _change(self, action: Callable[[], T], what: str) -> T:
        self._run.fence.check()
        return self._try(action, what)


@contextmanager
def owned(run: Storage, training: TrainingConfig, take_over: bool) -> Iterator[Storage]:
    """The run's directory, for this driver alone; fenced, unless nothing is going to be written there.

    Raises:
        LeaseHeldError: another driver is at work on the run. Nothing was written.
    """
    if training.fast_dev_run:
        yield run
        return
    with holding(run, take_over=take_over) as lease:
        yield run.fenced(lease.fence)


def filesystem_for_ray(run: Storage) -> pafs.FileSystem:
    """What `ray.train.RunConfig` takes as ``storage_filesystem``.

    Args:
        run: the run's directory, fenced; its parent's path is the ``storage_path`` that goes with it.
    """
    return pafs.PyFileSystem(RunFiles(run))


def storage_of(filesystem: pafs.FileSystem, path: str) -> Storage:
    """The run's directory, on whatever file system Ray was given; whoever writes there claims it first."""
    if isinstance(filesystem, pafs.PyFileSystem) and isinstance(filesystem.handler, RunFiles):
        return filesystem.handler.storage().fenced(NO_FENCE)
    return Storage.of(filesystem, path)


def mirror(run: Storage, records: list[CheckpointRecord]) -> None:
    """Bring Ray's list of checkpoints in line with ours, or remove it if this Ray would not take it.

    A list that is torn, or names checkpoints although there are none, is set aside.

    Args:
        run: the run's directory; not while Ray is at work on it.
        records: old to new.
    """
    try:
        if not records or _is_torn(run):
            _set_aside(run)
        if not records:
            return
        run.write(SNAPSHOT, json.dumps(_snapshot(records)).encode())
        if not _is_accepted(run):
            run.delete(SNAPSHOT)
    except (OSError, LeaseLostError) as error:
        logger.warning("Ray's list of checkpoints in %s could not be renewed: %s", run.uri, error)


def _is_torn(run: Storage) -> bool:
    try:
        return not isinstance(json.loads(run.read(SNAPSHOT)), dict)
    except FileNotFoundError:
        return False
    except ValueError:
        return True


def _set_aside(run: Storage) -> None:
    """Keep the list under another name, in place of the last one that was set aside."""
    if run.exists(SNAPSHOT):
        run.delete(f"{SNAPSHOT}.broken")
        run.move(SNAPSHOT, f"{SNAPSHOT}.broken")
        logger.warning("Ray's list of checkpoints in %s can't be used; it is kept as %s.broken.", run.uri, SNAPSHOT)


def _snapshot(records: list[CheckpointRecord]) -> dict[str, Any]:
    """The list as Ray 2.60 writes it (`ray.train.v2._internal.execution.checkpoint.checkpoint_manager`)."""
    results = [
        {
            "version": 0,
            "checkpoint_dir_name": record.name,
            "metrics": {name: value for name, value in record.metrics.items() if math.isfinite(value)},
        }
        for record in records
    ]
    return {
        "ray_version": ray.__version__,
        "checkpoint_results": results,
        "checkpoint_report_indices": list(range(len(results))),
        "latest_checkpoint_result": results[-1],
        "pending_training_results": [],
        "pending_validation_specs": [],
        "current_report_index": len(results),
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }


def _is_accepted(run: Storage) -> bool:
    """Whether this Ray starts with the list that lies there: its own reader is asked, and tells nobody."""
    rays_logger = logging.getLogger("ray.train")
    level_before = rays_logger.level
    rays_logger.setLevel(logging.ERROR)
    try:
        ray.train.Result.from_path(run.path, storage_filesystem=run.filesystem)
    except Exception as error:  # another version of Ray may object in any way
        logger.info("This Ray does not read a list of checkpoints that was made for it: %s", error)
        return False
    finally:
        rays_logger.setLevel(level_before)
    return True


class _Mirror(io.BytesIO):
    """Ray's list on its way: what becomes of it is known when it is whole."""

    def __init__(self, write: Callable[[bytes], None]) -> None:
        super().__init__()
        self._write = write

    def close(self) -> None:
        """Pass it on, once."""
        if not self.closed:
            data = self.getvalue()
            super().close()
            self._write(data)
