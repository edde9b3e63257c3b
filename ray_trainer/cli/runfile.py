"""The run file: everything about one run, written down (design 2.3 calls it RUN.yaml)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from ray_trainer.cluster.config import ClusterConfig, useless_with
from ray_trainer.cluster.sweep_config import SweepConfig, cross_problems
from ray_trainer.config import TrainingConfig
from ray_trainer.config.documents import Document, as_yaml, read_document
from ray_trainer.config.fields import Notation, described, did_you_mean
from ray_trainer.config.overrides import apply_overrides, parse_overrides
from ray_trainer.config.schema import Problem, Section, refuse
from ray_trainer.errors import ConfigError

ExperimentReference = Annotated[
    str,
    described(
        r"^[^:\s][^:]*:[A-Za-z_][A-Za-z0-9_]*$",
        "'path/to/file.py:attribute' or 'package.module:attribute'",
    ),
]


@dataclass
class RunFile(Section):
    """Everything about one run: what is trained, how, and where."""

    experiment: ExperimentReference
    """The Experiment: path/to/file.py:attribute, as seen from the run file, or package.module:attribute."""
    model: dict[str, Any] = field(default_factory=dict)
    """The model's own configuration, free in form; reaches build_model as a SimpleNamespace."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How the model is trained."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where it is trained."""
    sweep: SweepConfig = field(default_factory=SweepConfig)
    """Search over settings; read by `ray-trainer sweep` only."""

    other_names: ClassVar[Mapping[str, str]] = {
        "trainer": "training",
        "train": "training",
        "ray": "cluster",
        "scaling": "cluster",
        "model_config": "model",
        "tune": "sweep",
    }

    def problems(self, write: Notation = repr) -> list[Problem]:
        """Also holds the sections against each other, where these are right."""
        found = super().problems(write)
        if found:
            return found
        spares = write(self.cluster.spare_workers)
        between = (
            Problem("cluster.spare_workers", spares, useless_with(self.training, self.cluster) or "", "value"),
            Problem("sweep.space", None, cross_problems(self.sweep, self.model, self.training) or "", "value"),
        )
        return [problem for problem in between if problem.message]

    @classmethod
    def hint(cls, name: str) -> str:
        """Also knows settings that stand outside of their section."""
        for section, part in (("training", TrainingConfig), ("cluster", ClusterConfig), ("sweep", SweepConfig)):
            if name in part.__dataclass_fields__:
                return f"no such section; did you mean '{section}.{name}'?"
        return super().hint(name).replace("no such setting", "no such section")


def load_run_file(path: str | Path, overrides: Sequence[str] = ()) -> RunFile:
    """Read a run file, change what the command line says, and check all of it.

    Args:
        path: the file; YAML, or JSON.
        overrides: ``section.key=value``, ``--section.key=value`` or ``--section.key value``; values are YAML.

    Raises:
        ConfigError: the file cannot be read, or lists every error of every section with its line.
    """
    path = Path(path)
    changes = parse_overrides(overrides)
    try:
        document = read_document(path)
    except FileNotFoundError as error:
        raise ConfigError(f"There is no run file {path}{_neighbours(path) or '.'}") from error
    values = apply_overrides(document.values, changes)
    given = {name: value for name, value in values.items() if value is not None}  # empty: its defaults
    run_file, problems = RunFile.examine(given, as_yaml)
    refuse(_placed(problems, document, changes), str(path))
    return run_file


def resolved(run_file: RunFile) -> dict[str, Any]:
    """All settings with their values, defaults included, as plain values; loads as a run file again."""
    values = run_file.to_dict()
    if run_file.sweep == SweepConfig():
        del values["sweep"]
    return values


def _placed(problems: Iterable[Problem], document: Document, changes: Mapping[str, Any]) -> list[str]:
    """Say where each problem stands: those of the file by line, then those of the command line."""
    placed: list[tuple[float, str]] = []
    for problem in problems:
        line = document.lines.get(problem.name)
        if any(_is_within(problem.name, name) or (not line and _is_within(name, problem.name)) for name in changes):
            placed.append((float("inf"), f"command line: {problem}"))
        else:
            placed.append((line or 0, f"line {line}: {problem}" if line else str(problem)))
    return [text for _, text in sorted(placed, key=lambda item: item[0])]


def _is_within(name: str, whole: str) -> bool:
    return name == whole or name.startswith(f"{whole}.")


def _neighbours(path: Path) -> str:
    files = path.parent.glob("*.y*ml") if path.parent.is_dir() else ()
    there = sorted(file.name for file in files if file.is_file())
    return did_you_mean(path.name, there)
