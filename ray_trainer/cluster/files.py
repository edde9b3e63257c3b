"""Files for a Ray Dataset, of which some may be bad: found by reading parts, once reading all of them has failed."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.data
from pyarrow.fs import FileSelector, FileSystem, FileType
from ray.exceptions import RayError

from ray_trainer.cluster.pipeline import explained
from ray_trainer.cluster.shards import RayBlocks, index_ray_dataset
from ray_trainer.cluster.strangers import schema_difference
from ray_trainer.data.quarantine import BadDataPolicy, LeftOut, refuse_beyond
from ray_trainer.errors import DataError

logger = logging.getLogger(__name__)

_ATTEMPTS = 2
_PAUSE_S = 1.0
_TOLD_FILES = 20


@dataclass(frozen=True)
class DataFiles:
    """Files, how Ray Data reads them, and what becomes of their rows.

    Return it from ``build_datasets`` in place of a Ray Dataset where single files may be broken. While all of
    them can be read it is the same as ``transform(read(paths, **options))``. If that fails, parts of them are read
    to find the bad ones: those that cannot be read, and those with other columns than most, are named and refused,
    or left out where ``on_bad_data`` is ``quarantine``. Storage that fails for a moment is asked again; a file that
    was left out because of it is missed at the next start, when the data is no longer what it was.

    Attributes:
        read: a reader, such as ``ray.data.read_parquet``; called with a list of paths.
        paths: files or directories, or URIs that pyarrow opens.
        transform: the rest of the pipeline.
        options: further arguments of the reader.
    """

    read: Callable[..., "ray.data.Dataset"]
    paths: str | Sequence[str]
    transform: Callable[["ray.data.Dataset"], "ray.data.Dataset"] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def dataset(self, paths: Sequence[str] | None = None) -> "ray.data.Dataset":
        """The pipeline over all files, or over some of them."""
        dataset = self._read(paths or self.paths)
        return self.transform(dataset) if self.transform else dataset

    def index(self, policy: BadDataPolicy) -> RayBlocks:
        """Run the pipeline, without the files that are bad if the policy leaves them out.

        Raises:
            DataError: bad files are refused, or are too many; or the pipeline itself fails.
        """
        try:
            return index_ray_dataset(self.dataset(), policy=policy)
        except (DataError, OSError, pa.ArrowException) as error:
            names = list(self._names())
            bad = self._bad_files(names) if names else {}
            if not bad:
                raise
            left_out = LeftOut(0, len(bad), dict(Counter(bad.values())), _places(bad))
            refuse_beyond(policy, len(bad), len(names), "files", left_out)
            blocks = index_ray_dataset(self.dataset([name for name in names if name not in bad]), policy=policy)
            blocks.left_out = left_out + (blocks.left_out or LeftOut())
            logger.warning("%d of %d files are left out after: %s", len(bad), len(names), error)
            return blocks

    def _read(self, paths: str | Sequence[str]) -> "ray.data.Dataset":
        return self.read(paths, **self.options)

    def _bad_files(self, names: list[str]) -> dict[str, str]:
        """What is wrong with each file that is bad; none if all can be read together after all."""
        logger.warning("The pipeline over %d files failed; reading parts of them to find the bad ones.", len(names))
        bad = self._unreadable(names)
        good = [name for name in names if name not in bad]
        if good and isinstance(self._schema_of(good), Exception):
            bad |= _strangers({name: self._schema_of([name]) for name in good})
        return bad

    def _unreadable(self, names: list[str]) -> dict[str, str]:
        """Those among some files that fail alone, by halving what fails."""
        outcome = self._schema_of(names)
        if not isinstance(outcome, Exception):
            return {}
        if len(names) == 1:
            return {names[0]: _in_a_line(outcome)}
        half = len(names) // 2
        return self._unreadable(names[:half]) | self._unreadable(names[half:])

    def _schema_of(self, names: list[str]) -> Any:
        """The columns of files that can be read to their end, None without any row; or what reading them raised."""
        for attempt in range(_ATTEMPTS):
            try:
                bundles = list(self._read(names).iter_internal_ref_bundles())
                return next((bundle.schema for bundle in bundles if bundle.num_rows()), None)
            except (OSError, RayError, ValueError, TypeError, pa.ArrowException) as error:
                may_pass = len(names) == 1 and isinstance(getattr(error, "cause", error), OSError)
                if attempt + 1 == _ATTEMPTS or not may_pass:
                    return explained(error) if isinstance(error, RayError) else error
                time.sleep(_PAUSE_S)
        raise AssertionError

    def _names(self) -> Iterator[str]:
        """All files, without empty ones, in the order in which Ray reads them."""
        for path in [self.paths] if isinstance(self.paths, str) else self.paths:
            yield from _files_below(path, self.options.get("filesystem"))


def _strangers(schemas: Mapping[str, Any]) -> dict[str, str]:
    """Files whose columns are not those of most."""
    known = {name: schema for name, schema in schemas.items() if isinstance(schema, pa.Schema)}
    if not known:
        return {}
    usual = Counter(map(_key, known.values())).most_common(1)[0][0]
    model = next(schema for schema in known.values() if _key(schema) == usual)
    differences = {name: schema_difference(model, schema) for name, schema in known.items()}
    return {name: f"another schema, {difference}" for name, difference in differences.items() if difference}


def _files_below(path: str, filesystem: Any) -> Iterator[str]:
    """A file itself, or all in a directory, by name; URIs stay URIs."""
    place, prefix = path, ""
    if filesystem is None and "://" in path:
        filesystem, place = FileSystem.from_uri(path)
        prefix = path.split("://", 1)[0] + "://"
    elif filesystem is None:
        filesystem, place = FileSystem.from_uri(Path(path).absolute().as_uri())
    info = filesystem.get_file_info(place)
    found = [info]
    if info.type == FileType.Directory:
        found = filesystem.get_file_info(FileSelector(place, recursive=True))
    for entry in sorted(found, key=lambda each: str(each.path)):
        is_hidden = entry.base_name.startswith((".", "_"))
        if entry.type == FileType.File and entry.size and not is_hidden:
            yield f"{prefix}{entry.path}"


def _places(bad: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(f"{name}: {reason}" for name, reason in list(bad.items())[:_TOLD_FILES])


def _in_a_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].removeprefix("The pipeline of the Ray Dataset failed with ")


def _key(schema: Any) -> str:
    return "; ".join(sorted(f"{name}: {kind}" for name, kind in zip(schema.names, schema.types, strict=True)))
