"""Finding the experiment that a run file names."""

import importlib
import importlib.util
import sys
import sysconfig
import zlib
from pathlib import Path
from types import ModuleType

from ray_trainer.config.fields import did_you_mean
from ray_trainer.errors import ConfigError
from ray_trainer.task import Experiment
from ray_trainer.users_code import is_users, users_line

_EXAMPLE = "write experiment = Experiment(build_model=..., build_datasets=...) there"


def load_experiment(reference: str, base_dir: str | Path) -> Experiment:
    """Import the experiment that ``path/to/file.py:attribute`` or ``package.module:attribute`` names.

    Args:
        reference: paths and packages are looked for in `base_dir` first, then in the current directory.
        base_dir: directory of the run file.

    Raises:
        ConfigError: there is no such file, module or attribute, its import fails, or it is no Experiment.
    """
    module = experiment_module(reference, base_dir)
    name = reference.rpartition(":")[2]
    if not hasattr(module, name):
        experiments = [key for key, value in vars(module).items() if isinstance(value, Experiment)]
        public = [key for key in vars(module) if not key.startswith("_")]
        there = did_you_mean(name, experiments, experiments[0] if len(experiments) == 1 else None)
        hint = there or did_you_mean(name, public) or f"; {_EXAMPLE}"
        raise ConfigError(f"experiment: {_origin(module)} has no attribute {name!r}{hint}")
    experiment = getattr(module, name)
    if not isinstance(experiment, Experiment):
        kind = f"the class {name}" if isinstance(experiment, type) else f"a {type(experiment).__name__}"
        raise ConfigError(f"experiment: {name!r} of {_origin(module)} is {kind}, not an Experiment; {_EXAMPLE}")
    return experiment


def experiment_module(reference: str, base_dir: str | Path) -> ModuleType:
    """Import the module of an experiment; a second call returns the same module.

    A file becomes a module of a name made from its own name and path, registered in `sys.modules`, so that
    cloudpickle can send it to workers by value. The directory of the file, or of the run file, comes first on
    `sys.path`, as it does with ``python file.py`` and ``python -m``.

    Raises:
        ConfigError: there is no such file or module, or its import fails.
    """
    source, separator, name = reference.rpartition(":")
    if not separator or not source or not name.isidentifier():
        raise ConfigError(
            f"experiment = {reference!r}: must be 'path/to/file.py:attribute' or 'package.module:attribute'"
        )
    roots = [Path(base_dir).resolve(), Path.cwd()]
    if source.endswith(".py") or "/" in source:
        return _import_file(_find(source, roots))
    return _import_named(source, roots)


def modules_beside(experiment: ModuleType, base_dir: str | Path) -> list[ModuleType]:
    """The experiment's module, and all imported ones that lie in its directory or in the run file's."""
    places = {Path(base_dir).resolve()}
    if getattr(experiment, "__file__", None):
        places.add(Path(str(experiment.__file__)).resolve().parent)
    library = Path(sysconfig.get_paths()["stdlib"]).resolve()
    found = [experiment]
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if module is experiment or name.partition(".")[0] in ("__main__", "ray_trainer") or not isinstance(file, str):
            continue
        parents = set(Path(file).resolve().parents)
        if places & parents and library not in parents and is_users(file):
            found.append(module)
    return found


def _find(source: str, roots: list[Path]) -> Path:
    for root in roots:
        if (root / source).is_file():
            return (root / source).resolve()
    wanted = roots[0] / source
    there = sorted(file.name for file in wanted.parent.glob("*.py")) if wanted.parent.is_dir() else []
    looked = " or ".join(str(root) for root in dict.fromkeys(roots))
    raise ConfigError(f"experiment: there is no file {source!r} in {looked}{did_you_mean(wanted.name, there)}")


def _import_file(path: Path) -> ModuleType:
    name = f"{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"experiment: {path} is no Python file; name one that ends in .py")
    module = importlib.util.module_from_spec(spec)
    _search_first([path.parent])
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _import_failure(str(path), error) from error
    return module


def _import_named(name: str, roots: list[Path]) -> ModuleType:
    _search_first(roots)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            looked = " or ".join(str(root) for root in dict.fromkeys(roots))
            raise ConfigError(
                f"experiment: there is no module {name!r}; it is neither in {looked} nor installed"
            ) from error
        raise _import_failure(name, error) from error
    except (Exception, SystemExit) as error:
        raise _import_failure(name, error) from error


def _search_first(directories: list[Path]) -> None:
    for directory in reversed(directories):
        if str(directory) not in sys.path:
            sys.path.insert(0, str(directory))


def _import_failure(source: str, error: BaseException) -> ConfigError:
    """Say what went wrong in the user's words: the error and the line, without a traceback."""
    place, message = users_line(error), str(error)
    if isinstance(error, SyntaxError):
        message = error.msg
        place = f" ({error.filename}, line {error.lineno})" if error.filename else place
    advice = ""
    if isinstance(error, SystemExit):
        advice = "; put what runs as a program under if __name__ == '__main__':"
    return ConfigError(f"experiment: importing {source} failed with {type(error).__name__}: {message}{place}{advice}")


def _origin(module: ModuleType) -> str:
    return getattr(module, "__file__", None) or module.__name__
