"""Run files: sections, overrides, every error at once with its line."""

from pathlib import Path

import pytest

from ray_trainer.cli.runfile import load_run_file, resolved
from ray_trainer.cluster.config import ClusterConfig
from ray_trainer.cluster.sweep_config import SweepConfig
from ray_trainer.config import TrainingConfig
from ray_trainer.config.documents import dump_yaml
from ray_trainer.errors import ConfigError

RUN = """\
experiment: digits.py:experiment
model: {width: 128, inner: {a: 1}}
training:
  epochs: 5
  learning_rate: 3e-4
cluster: {num_workers: [1, 2], name: digits}
"""


@pytest.fixture
def write(tmp_path):
    def write_run(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write_run


def errors_of(path: Path, overrides: list[str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_run_file(path, overrides or [])
    header, *lines = str(caught.value).splitlines()
    assert header == f"Configuration validation failed in {path}:"
    return [line.removeprefix("  - ") for line in lines]


def test_run_file_fills_all_sections(write):
    run = load_run_file(write(RUN))

    assert run.experiment == "digits.py:experiment"
    assert run.model == {"width": 128, "inner": {"a": 1}}
    assert run.training == TrainingConfig(epochs=5, learning_rate=0.0003)
    assert run.cluster == ClusterConfig(num_workers=(1, 2), name="digits")
    assert run.sweep == SweepConfig()


@pytest.mark.parametrize("section", ["model", "training", "cluster", "sweep"])
def test_empty_section_has_its_defaults(write, section):
    run = load_run_file(write(f"experiment: digits.py:experiment\n{section}:\n  # epochs: 3\n"))

    assert run == load_run_file(write("experiment: digits.py:experiment\n"))


def test_overrides_of_all_forms_win_over_the_file(write):
    overrides = ["training.epochs=7", "--cluster.name=b", "--model.inner.b", "[1, 2]", "experiment=a.b:c"]

    run = load_run_file(write(RUN), overrides)

    assert (run.training.epochs, run.cluster.name, run.experiment) == (7, "b", "a.b:c")
    assert run.model == {"width": 128, "inner": {"a": 1, "b": [1, 2]}}


def test_errors_of_all_sections_are_told_in_the_order_of_the_file_with_lines(write):
    path = write(
        "experiment: digits.py\n"
        "modle: {}\n"
        "training:\n"
        "  learning_rate: -1\n"
        "  lr: 3\n"
        "cluster:\n"
        "  num_workers: [3, 2]\n"
        "epochs: 3\n"
    )

    lines = errors_of(path, ["training.batch_size=0", "clutser.name=a"])

    assert [line.split(":")[0] for line in lines] == [
        *(f"line {n}" for n in (1, 2, 4, 5, 7, 8)),
        *["command line"] * 2,
    ]
    for line, told in zip(
        lines,
        [
            "experiment = digits.py: must be 'path/to/file.py:attribute'",
            "modle: no such section; did you mean 'model'?",
            "training.learning_rate = -1: must be a number that is above 0",
            "training.lr: no such setting; did you mean 'learning_rate'?",
            "cluster.num_workers = [3, 2]: the least number",
            "epochs: no such section; did you mean 'training.epochs'?",
            "clutser: no such section; did you mean 'cluster'?",
            "training.batch_size = 0: must be a whole number that is at least 1",
        ],
        strict=True,
    ):
        assert told in line


def test_values_are_told_as_a_run_file_writes_them(write):
    path = write("experiment: a.py:b\ntraining: {max_steps: None, shuffle: no}\n")

    steps, shuffle = errors_of(path)

    assert steps.endswith("max_steps = None: must be a whole number that is at least 1, or null; did you mean null?")
    assert shuffle.endswith("shuffle = 'no': must be true or false; did you mean false?")


def test_missing_experiment_is_told_with_its_form(write):
    assert errors_of(write("training: {epochs: 3}\n")) == [
        "experiment: is missing; it must be 'path/to/file.py:attribute' or 'package.module:attribute'"
    ]


@pytest.mark.parametrize("section", ["training", "cluster", "model", "sweep"])
def test_section_that_is_no_mapping_is_told(write, section):
    (line,) = errors_of(write(f"experiment: a.py:b\n{section}: 3\n"))

    assert line.startswith(f"line 2: {section} = 3: must be a mapping")


def test_setting_of_the_model_without_a_textual_name_is_told(write):
    (line,) = errors_of(write("experiment: a.py:b\nmodel: {1: 2}\n"))

    assert line.startswith("line 2: model = {1: 2}: must be a mapping from names (text) to values")


def test_missing_run_file_is_told_with_one_that_is_close(write, tmp_path):
    write(RUN)

    with pytest.raises(ConfigError, match=r"no run file .*rnu\.yaml; did you mean 'run\.yaml'\?"):
        load_run_file(tmp_path / "rnu.yaml")


def test_resolved_run_names_every_setting_and_loads_again_equal(write):
    run = load_run_file(write(RUN))

    values = resolved(run)

    assert list(values) == ["experiment", "model", "training", "cluster"]
    assert values["training"].keys() == TrainingConfig().to_dict().keys()
    assert load_run_file(write(dump_yaml(values))) == run
