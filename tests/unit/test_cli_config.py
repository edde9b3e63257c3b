"""``config check`` and ``config schema``: the schema accepts what is accepted and refuses what is refused."""

import argparse
import dataclasses
import functools
import json
import math
import sys

import jsonschema
import pytest
from section_cases import CASES, FIELDS

from ray_trainer.cli.config import add_parser, run_file_schema
from ray_trainer.cli.runfile import RunFile, load_run_file
from ray_trainer.cluster.config import ClusterConfig
from ray_trainer.cluster.sweep_config import SweepConfig
from ray_trainer.config import TrainingConfig
from ray_trainer.config.documents import parse_value
from ray_trainer.config.overrides import split_overrides
from ray_trainer.errors import ConfigError

EXPERIMENT = """\
from ray_trainer.task import Experiment
def build_model(model_config): ...
def build_datasets(model_config, training_config): ...
experiment = Experiment(build_model=build_model, build_datasets=build_datasets)
"""
RUN = "experiment: config_case.py:experiment\n"
SECTIONS = {TrainingConfig: "training", ClusterConfig: "cluster", SweepConfig: "sweep"}
# Rules over several values, and 2.0, which is an integer to JSON Schema.
BEYOND_SCHEMA = [(3, 2), {"cpu": 1}, {"GPU": 1}, {"": 1}, 2.0]


@pytest.fixture
def run_path(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "config_case.py").write_text(EXPERIMENT)
    (tmp_path / "run.yaml").write_text(RUN)
    return tmp_path / "run.yaml"


def call(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    rest, overrides = split_overrides([str(argument) for argument in arguments])
    args = parser.parse_args(rest, argparse.Namespace(overrides=overrides))
    return int(args.run(args))


def accepted_by_schema(values: dict[str, object]) -> bool:
    return validator().is_valid(json.loads(json.dumps(values)))


@functools.cache
def validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(run_file_schema())


def with_value(section: type, name: str, value: object) -> dict[str, object]:
    values: dict[str, object] = {"experiment": "a.py:b"}
    if section is RunFile:
        return {**values, name: value}
    return {**values, SECTIONS[section]: {name: value}}


def test_check_prints_the_resolved_run_with_overrides(run_path, capsys):
    assert call("config", "check", run_path, "training.epochs=3", "--cluster.name", "b") == 0

    printed = parse_value(capsys.readouterr().out)
    assert printed["training"]["epochs"] == 3
    assert printed["cluster"]["name"] == "b"
    assert printed["training"]["learning_rate"] == 5e-5


def test_check_refuses_a_wrong_setting_and_writes_nothing(run_path, capsys):
    before = sorted(run_path.parent.iterdir())

    with pytest.raises(ConfigError, match=r"training\.epochs = 0"):
        call("config", "check", run_path, "training.epochs=0")

    assert capsys.readouterr().out == ""
    assert sorted(run_path.parent.iterdir()) == before


def test_check_refuses_an_experiment_that_cannot_be_imported(run_path):
    with pytest.raises(ConfigError, match=r"no file 'absent\.py'"):
        call("config", "check", run_path, "experiment=absent.py:experiment")


def test_schema_is_printed_as_valid_draft_2020_12(capsys):
    assert call("config", "schema") == 0

    schema = json.loads(capsys.readouterr().out)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema.Draft202012Validator.check_schema(schema)


def test_schema_describes_and_closes_every_section():
    schema = run_file_schema()

    assert schema["additionalProperties"] is False
    for name in ("TrainingConfig", "ClusterConfig", "SweepConfig"):
        section = schema["$defs"][name]
        assert section["additionalProperties"] is False
        assert all(field["description"] for field in section["properties"].values())
    assert schema["$defs"]["TrainingConfig"]["properties"]["validation_split"]["maximum"] == 0.5


@pytest.mark.parametrize(("section", "name"), FIELDS)
def test_schema_refuses_what_is_refused(section, name):
    wrong_types, wrong_values = CASES[section][name]
    for value in [*wrong_types, *wrong_values]:
        if value in BEYOND_SCHEMA and not isinstance(value, bool):
            continue
        if value is None and section is RunFile and name != "experiment":
            continue  # an empty section of a file has its defaults
        if isinstance(value, dict) and 1 in value:
            continue  # JSON has only textual names
        if isinstance(value, float) and not math.isfinite(value):
            continue  # JSON has no NaN and no infinity
        assert not accepted_by_schema(with_value(section, name, value)), value


@pytest.mark.parametrize(("section", "name"), FIELDS)
def test_schema_refuses_misspelt_names(section, name):
    assert not accepted_by_schema(with_value(section, f"{name}x", 1))


def test_schema_accepts_every_resolved_run(run_path, capsys):
    for overrides in (
        [],
        ["training.max_time=01:00:00"],
        ["cluster.num_workers=[1,2]", "cluster.address=a.b:6379"],
    ):
        call("config", "check", run_path, *overrides)
        assert accepted_by_schema(parse_value(capsys.readouterr().out))


@pytest.mark.parametrize(
    "text", ["model:", "training:", "cluster:", "sweep:", "training: {betas: [0, 0.5]}", "model: {a: [1]}"]
)
def test_schema_accepts_what_is_accepted(run_path, text):
    run_path.write_text(RUN + text)

    assert load_run_file(run_path)
    assert accepted_by_schema(parse_value(run_path.read_text()))


def test_every_field_stands_in_the_schema():
    schema = run_file_schema()
    sections = {**schema["$defs"], "RunFile": schema}

    for section in CASES:
        names = [field.name for field in dataclasses.fields(section)]
        assert list(sections[section.__name__]["properties"]) == names
