"""Every command: help that ends with examples, which can be given as they stand; completion; `new`."""

import argparse
import shlex
import subprocess
import sys
from importlib.metadata import version

import pytest

from ray_trainer import Experiment
from ray_trainer.cli import _parser, main, plan
from ray_trainer.cli.experiment import load_experiment
from ray_trainer.cli.runfile import load_run_file
from ray_trainer.config.overrides import split_overrides
from ray_trainer.errors import (
    CheckpointCorruptError,
    CheckpointNotFoundError,
    ConfigError,
    DataError,
    LeaseHeldError,
    RunError,
    StateMismatchError,
)


def commands(parser: argparse.ArgumentParser, name: str = "") -> dict[str, argparse.ArgumentParser]:
    """All commands, those within commands as well, by what is typed."""
    found = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, command in action.choices.items():
                found[f"{name} {word}".strip()] = command
                found |= commands(command, f"{name} {word}".strip())
    return found


COMMANDS = commands(_parser())


def examples(parser: argparse.ArgumentParser) -> list[str]:
    return [line.strip() for line in (parser.epilog or "").splitlines() if line.startswith("  ")]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_examples_that_can_be_given(name):
    help_page = COMMANDS[name].format_help()
    lines = examples(COMMANDS[name])

    assert lines
    assert help_page.rstrip().endswith(lines[-1])
    for line in lines:
        words = shlex.split(line.replace('eval "$(', "").replace(')"', "").partition(" > ")[0])
        assert words[0] == "ray-trainer"
        _parser().parse_args(split_overrides(words[1:])[0])
    assert any(line.startswith(f"ray-trainer {name}") or f"(ray-trainer {name}" in line for line in lines)


def test_program_without_a_command_shows_what_there_is(capsys):
    assert main([]) == 2
    assert "submit" in capsys.readouterr().err


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.split() == ["ray-trainer", version("ray-trainer")]


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_is_a_script_that_knows_the_commands(shell, capsys):
    assert main(["completion", shell]) == 0

    script = capsys.readouterr().out
    for name in COMMANDS:
        assert name.rpartition(" ")[2] in script
    assert "--storage-path" in script
    if shell == "bash":
        assert subprocess.run(["bash", "-n"], input=script.encode(), check=False).returncode == 0


def test_bash_completes_a_command_and_its_options(tmp_path, capsys):
    main(["completion", "bash"])
    (tmp_path / "script").write_text(
        capsys.readouterr().out
        + 'COMP_WORDS=(ray-trainer chec); COMP_CWORD=1; _shtab_ray_trainer; echo "${COMPREPLY[@]}"\n'
        + 'COMP_WORDS=(ray-trainer status --js); COMP_CWORD=2; _shtab_ray_trainer; echo "${COMPREPLY[@]}"\n'
    )

    done = subprocess.run(["bash", tmp_path / "script"], capture_output=True, text=True, check=True)

    assert done.stdout.split() == ["checkpoints", "--json"]


def test_new_writes_an_experiment_that_loads_and_is_named_after_its_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["new", str(tmp_path / "My run")]) == 0

    run_path = tmp_path / "My run" / "run.yaml"
    run_file = load_run_file(run_path)
    assert run_file.cluster.name == "My-run"
    assert isinstance(load_experiment(run_file.experiment, run_path.parent), Experiment)
    assert str(run_path) in capsys.readouterr().out


def test_setting_without_a_value_is_told_how_settings_are_written(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", "run.yaml", "training.epochs"])

    assert caught.value.code == 2
    assert "training.epochs. Settings are written section.key=value." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("no"), 2),
        (DataError("no"), 2),
        (StateMismatchError("no"), 2),
        (CheckpointNotFoundError("no"), 2),
        (RunError("no"), 1),
        (CheckpointCorruptError("no"), 1),
        (LeaseHeldError("no"), 1),
        (OSError("no"), 1),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__,
)
def test_error_that_the_user_can_settle_in_the_run_file_ends_with_2_and_a_failed_run_with_1(
    error, code, capsys, monkeypatch
):
    def fail(args: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(plan, "run", fail)

    assert main(["plan", "--nodes", "1", "--node-mtbf-days", "1"]) == code
    assert ("ray-trainer: no" in capsys.readouterr().err) == (code != 130)


def test_new_overwrites_nothing(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("mine")

    assert main(["new", str(tmp_path)]) == 2

    assert "there already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
    assert (tmp_path / "run.yaml").read_text() == "mine"


def test_new_where_nobody_may_write_says_so(tmp_path, capsys):
    (tmp_path / "file").write_text("")

    assert main(["new", str(tmp_path / "file" / "inside")]) == 2

    assert "cannot be written" in capsys.readouterr().err
