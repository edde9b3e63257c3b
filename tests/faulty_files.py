"""A file system that fails as a test wants, over a directory of this machine."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs as pafs

from ray_trainer.storage import Storage


class FaultyFiles(pafs.FileSystemHandler):
    """Does what the local file system does, unless ``fault(operation, path)`` returns an error.

    Attributes:
        fault: asked before each operation: ``open``, ``read``, ``write``, ``info``, ``list``, ``delete``, ``create``.
        failures: how many operations failed.
    """

    def __init__(self, root: Path) -> None:
        self._inner = pafs.SubTreeFileSystem(str(root), pafs.LocalFileSystem())
        self.fault: Callable[[str, str], OSError | None] = lambda operation, path: None
        self.failures = 0
        root.mkdir(parents=True, exist_ok=True)

    def fail(self, operation: str, *errors: int, name: str = "") -> None:
        """Let the next operations of a kind fail with these numbers, on files whose name ends so."""
        left = list(errors)

        def fault(asked: str, path: str) -> OSError | None:
            if asked != operation or not path.endswith(name) or not left:
                return None
            return OSError(left[0], os.strerror(left.pop(0)))

        self.fault = fault

    def storage(self, path: str = "run") -> Storage:
        """A directory on it."""
        return Storage.of(pafs.PyFileSystem(self), path)

    def ask(self, operation: str, path: str) -> None:
        error = self.fault(operation, path)
        if error is not None:
            self.failures += 1
            raise error

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FaultyFiles) and self._inner == other._inner

    def get_type_name(self) -> str:
        return "faulty"

    def get_file_info(self, paths: list[str]) -> Any:
        for path in paths:
            self.ask("info", path)
        return self._inner.get_file_info(paths)

    def get_file_info_selector(self, selector: pafs.FileSelector) -> Any:
        self.ask("list", selector.base_dir)
        return self._inner.get_file_info(selector)

    def create_dir(self, path: str, recursive: bool) -> None:
        self.ask("create", path)
        self._inner.create_dir(path, recursive=recursive)

    def delete_dir(self, path: str) -> None:
        self.ask("delete", path)
        self._inner.delete_dir(path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self._inner.delete_dir_contents(path, missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self) -> None:
        raise PermissionError

    def delete_file(self, path: str) -> None:
        self.ask("delete", path)
        self._inner.delete_file(path)

    def move(self, src: str, dest: str) -> None:
        self._inner.move(src, dest)

    def copy_file(self, src: str, dest: str) -> None:
        self._inner.copy_file(src, dest)

    def open_input_stream(self, path: str) -> Any:
        self.ask("open", path)
        return pa.PythonFile(_FaultyFile(self, path, self._inner.open_input_file(path)), mode="r")

    def open_input_file(self, path: str) -> Any:
        return self.open_input_stream(path)

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        self.ask("write", path)
        return self._inner.open_output_stream(path)

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        raise NotImplementedError

    def normalize_path(self, path: str) -> str:
        return path


class _FaultyFile:
    def __init__(self, files: FaultyFiles, path: str, inner: Any) -> None:
        self._files = files
        self._path = path
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def read(self, num_bytes: int | None = None) -> bytes:
        self._files.ask("read", self._path)
        return bytes(self._inner.read(num_bytes))
