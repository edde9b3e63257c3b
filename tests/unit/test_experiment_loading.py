"""Importing the experiment that a run file names."""

import sys
from pathlib import Path

import pytest

from ray_trainer.cli.experiment import experiment_module, load_experiment
from ray_trainer.errors import ConfigError
from ray_trainer.task import Experiment

GOOD = """\
from ray_trainer.task import Experiment
def build_model(model_config): ...
def build_datasets(model_config, training_config): ...
experiment = Experiment(build_model=build_model, build_datasets=build_datasets)
"""


@pytest.fixture(autouse=True)
def clean_imports(monkeypatch):
    """What is imported here is forgotten again."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(path: Path, text: str = GOOD) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refused(reference: str, base_dir: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_experiment(reference, base_dir)
    return str(caught.value)


def test_file_is_found_next_to_the_run_file(tmp_path):
    write(tmp_path / "code" / "digits.py")

    assert isinstance(load_experiment("code/digits.py:experiment", tmp_path), Experiment)


def test_file_is_found_in_the_current_directory_if_it_is_not_next_to_the_run_file(tmp_path, monkeypatch):
    write(tmp_path / "digits.py")
    monkeypatch.chdir(tmp_path)

    assert isinstance(load_experiment("digits.py:experiment", tmp_path / "runs"), Experiment)


def test_file_next_to_the_run_file_wins_over_the_current_directory(tmp_path, monkeypatch):
    write(tmp_path / "digits.py", GOOD + "where = 'here'")
    write(tmp_path / "a" / "digits.py", GOOD + "where = 'a'")
    monkeypatch.chdir(tmp_path)

    assert experiment_module("digits.py:experiment", tmp_path / "a").where == "a"


def test_package_is_found_next_to_the_run_file(tmp_path):
    write(tmp_path / "pack_a" / "__init__.py", "")
    write(tmp_path / "pack_a" / "digits.py")

    assert isinstance(load_experiment("pack_a.digits:experiment", tmp_path), Experiment)


def test_file_may_import_its_neighbours(tmp_path):
    write(tmp_path / "code" / "neighbour_a.py", "width = 3")
    write(tmp_path / "code" / "digits.py", "import neighbour_a\n" + GOOD)

    assert load_experiment("code/digits.py:experiment", tmp_path)


def test_module_of_a_file_is_registered_under_its_own_name_and_imported_once(tmp_path):
    write(tmp_path / "json.py")

    module = experiment_module("json.py:experiment", tmp_path)

    assert sys.modules[module.__name__] is module
    assert module.__name__.startswith("json_")
    assert experiment_module("json.py:experiment", tmp_path) is module
    assert load_experiment("json.py:experiment", tmp_path).build_model.__module__ == module.__name__


def test_missing_file_is_told_with_where_it_was_looked_for_and_a_close_name(tmp_path):
    write(tmp_path / "digits.py")

    told = refused("digts.py:experiment", tmp_path)

    assert f"no file 'digts.py' in {tmp_path}" in told
    assert "did you mean 'digits.py'?" in told


def test_missing_module_is_told(tmp_path):
    assert "there is no module 'absent_a.digits'" in refused("absent_a.digits:experiment", tmp_path)


def test_missing_attribute_is_told_with_the_experiment_that_there_is(tmp_path):
    write(tmp_path / "digits.py")

    assert refused("digits.py:main", tmp_path).endswith("has no attribute 'main'; did you mean 'experiment'?")


def test_file_without_an_experiment_is_told_how_to_write_one(tmp_path):
    write(tmp_path / "digits.py", "")

    assert "write experiment = Experiment(" in refused("digits.py:experiment", tmp_path)


@pytest.mark.parametrize(("name", "kind"), [("build_model", "a function"), ("Experiment", "the class Experiment")])
def test_attribute_that_is_no_experiment_is_told(tmp_path, name, kind):
    write(tmp_path / "digits.py")

    assert f"is {kind}, not an Experiment" in refused(f"digits.py:{name}", tmp_path)


@pytest.mark.parametrize(
    ("text", "told", "line"),
    [
        ("a = 1\nb = a / 0\n", "ZeroDivisionError: division by zero", "line 2: b = a / 0"),
        ("import absent_b\n", "ModuleNotFoundError: No module named 'absent_b'", "line 1"),
        ("def f(:\n", "SyntaxError", "line 1"),
        ("import json\njson.loads('x')\n", "JSONDecodeError", "line 2: json.loads('x')"),
        ("import sys\nsys.exit(3)\n", "SystemExit: 3", "if __name__ == '__main__':"),
    ],
)
def test_failing_import_is_told_with_error_and_line_and_without_traceback(tmp_path, text, told, line):
    path = write(tmp_path / "digits.py", text)
    known = set(sys.modules)

    message = refused("digits.py:experiment", tmp_path)

    assert told in message
    assert line in message
    assert str(path) in message
    assert "Traceback" not in message
    assert not any(name.startswith("digits_") for name in sys.modules.keys() - known)


def test_import_that_fails_inside_a_package_blames_the_line_and_not_the_name(tmp_path):
    write(tmp_path / "pack_b" / "__init__.py", "")
    write(tmp_path / "pack_b" / "digits.py", "import absent_c\n")

    told = refused("pack_b.digits:experiment", tmp_path)

    assert "No module named 'absent_c'" in told
    assert "digits.py, line 1" in told


@pytest.mark.parametrize("reference", ["digits.py", "digits.py:", ":experiment", "digits.py:1a"])
def test_reference_of_another_form_is_told(tmp_path, reference):
    assert "must be 'path/to/file.py:attribute'" in refused(reference, tmp_path)
