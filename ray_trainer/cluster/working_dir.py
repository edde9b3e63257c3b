"""The working directory of a job as one package: which files go along, and that the same files give the same package.

Does not import Ray.
"""

import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pathspec import GitIgnoreSpec

from ray_trainer.errors import ConfigError

#: Never needed by a job; a later ``!pattern`` in an ignore file takes one back.
DEFAULT_IGNORED = (
    *(".git/", ".hg/", ".svn/", ".venv/", "venv/", ".tox/", ".nox/", "node_modules/", "*.egg-info/"),
    *(
        "__pycache__/",
        "*.py[cod]",
        ".*_cache/",
        ".hypothesis/",
        ".ipynb_checkpoints/",
        ".idea/",
        ".vscode/",
        ".DS_Store",
    ),
    *("runs/", "checkpoints/", "checkpoint_epoch*/", "tensorboard/", "wandb/", "mlruns/"),
)
#: Read in every directory, the later one wins; the second is Ray's own.
IGNORE_FILES = (".gitignore", ".rayignore")
#: Ray's dashboard, which takes the package, refuses a larger one.
LARGEST_PACKAGE_BYTES = 100 * 2**20

_EPOCH = (1980, 1, 1, 0, 0, 0)  # of every file in the package: its name and content alone count
_SHOWN = 5


@dataclass(frozen=True)
class PackedFile:
    """A file of the package.

    Attributes:
        name: path within the working directory, with slashes.
        size_bytes: as it is on disk.
    """

    name: str
    size_bytes: int


def packed_files(directory: Path) -> list[PackedFile]:
    """The files that go along, sorted by name; what is ignored, linked directories and special files do not.

    Patterns are those of git: `DEFAULT_IGNORED`, then the ignore files of each directory, the innermost last.
    """
    return sorted(_walk(directory, directory, ()), key=lambda file: file.name)


def write_package(directory: Path, target: Path, largest_bytes: int = LARGEST_PACKAGE_BYTES) -> list[PackedFile]:
    """Write the package; the same files always give the same bytes, by which Ray knows them again.

    Returns:
        What is in it.

    Raises:
        ConfigError: it is larger than Ray takes; names what is biggest.
    """
    files = packed_files(directory)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as package:
        for file in files:
            _add(package, directory / file.name, file.name)
            if package.fp is not None and package.fp.tell() > largest_bytes:
                raise ConfigError(_too_large(directory, files, largest_bytes))
    if target.stat().st_size > largest_bytes:
        raise ConfigError(_too_large(directory, files, largest_bytes))
    return files


def biggest(files: Sequence[PackedFile]) -> list[tuple[str, int]]:
    """What takes most of the space, directories of the first level as one, the largest first."""
    sizes: dict[str, int] = {}
    for file in files:
        first, slash, _ = file.name.partition("/")
        sizes[first + slash] = sizes.get(first + slash, 0) + file.size_bytes
    return sorted(sizes.items(), key=lambda item: (-item[1], item[0]))


def readable_size(size_bytes: float) -> str:
    """A size for people."""
    for unit in ("B", "KiB", "MiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} GiB"


def _walk(root: Path, directory: Path, specs: tuple[tuple[str, GitIgnoreSpec], ...]) -> Iterator[PackedFile]:
    place = "" if directory == root else f"{directory.relative_to(root).as_posix()}/"
    specs = (*specs, (place, _patterns(directory, is_root=not place)))
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        name = f"{place}{entry.name}"
        is_directory = entry.is_dir(follow_symlinks=False)
        if _is_ignored(f"{name}/" if is_directory else name, specs):
            continue
        if is_directory:
            yield from _walk(root, Path(entry.path), specs)
        elif entry.is_file():
            yield PackedFile(name, entry.stat().st_size)


def _patterns(directory: Path, is_root: bool) -> GitIgnoreSpec:
    lines = list(DEFAULT_IGNORED) if is_root else []
    for name in IGNORE_FILES:
        if (directory / name).is_file():
            lines += (directory / name).read_text(errors="replace").splitlines()
    return GitIgnoreSpec.from_lines(lines)


def _is_ignored(name: str, specs: Sequence[tuple[str, GitIgnoreSpec]]) -> bool:
    """The innermost directory whose patterns know the name decides."""
    for place, spec in reversed(specs):
        decision = spec.check_file(name.removeprefix(place)).include
        if decision is not None:
            return decision
    return False


def _add(package: zipfile.ZipFile, path: Path, name: str) -> None:
    entry = zipfile.ZipInfo(name, date_time=_EPOCH)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = (0o755 if os.access(path, os.X_OK) else 0o644) << 16
    entry.file_size = path.stat().st_size  # tells zipfile whether 64-bit sizes are needed
    with path.open("rb") as source, package.open(entry, "w") as target:
        while block := source.read(1 << 20):
            target.write(block)


def _too_large(directory: Path, files: Sequence[PackedFile], largest_bytes: int) -> str:
    parts = biggest(files)
    listed = [f"  {readable_size(size):>10}  {name}" for name, size in parts[:_SHOWN]]
    if len(parts) > _SHOWN:
        listed.append(f"  {readable_size(sum(size for _, size in parts[_SHOWN:])):>10}  {len(parts) - _SHOWN} more")
    total = readable_size(sum(file.size_bytes for file in files))
    return "\n".join(
        [
            f"The working directory {directory} is too large to send: {len(files)} files of {total}, of which a "
            f"package may hold {readable_size(largest_bytes)} once compressed, the most that Ray's dashboard takes. "
            "The largest parts:",
            *listed,
            f"List what the job does not need in {directory / '.rayignore'} (patterns as in .gitignore), keep data on "
            "shared storage, or send a smaller directory with --working-dir.",
        ]
    )
