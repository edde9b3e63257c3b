"""Command lines in the README, in the examples and in `--help`: they can be given as they stand."""

import re
import shlex
from pathlib import Path

import pytest
from test_cli_commands import COMMANDS, examples

from ray_trainer.cli import _parser
from ray_trainer.cli.runfile import load_run_file
from ray_trainer.config.overrides import split_overrides

ROOT = Path(__file__).parents[2]
COMMAND = re.compile(r"(?:^|/| |`)(ray-trainer [a-z][^`&|#\n]*)")
PAGES = [ROOT / "README.md", ROOT / "cluster/README.md", *sorted((ROOT / "examples").glob("*.*"))]
FILES = re.compile(r"\b(?:cluster|examples|tests)/[\w./-]*\w\.(?:ya?ml|py|sbatch|sh|txt|json)")


def command_lines(page: Path) -> list[str]:
    """Those that can be given: of Markdown, what stands in blocks; else what stands in comments and docstrings."""
    text = page.read_text()
    if page.suffix == ".md":
        text = "\n".join(re.findall(r"^```(?:bash|console)\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    return COMMAND.findall(text)


def assert_can_be_given(line: str) -> None:
    """Its options are known, its run file is there, and what it changes in it is right."""
    others, overrides = split_overrides(shlex.split(line)[1:])
    run_file = vars(_parser().parse_args(others)).get("run_file")
    if run_file is not None and run_file.parts[0] == "examples":
        load_run_file(ROOT / run_file, overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_command_lines_can_be_given(page):
    for line in command_lines(page):
        assert_can_be_given(line)


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if examples(command)])
def test_examples_of_a_help_page_can_be_given(name):
    for line in examples(COMMANDS[name]):
        if line.startswith("ray-trainer"):
            assert_can_be_given(line.partition(" > ")[0])


@pytest.mark.parametrize("page", ["README.md", "cluster/README.md", "CONTRIBUTING.md"])
def test_files_that_are_named_are_there(page):
    assert [name for name in FILES.findall((ROOT / page).read_text()) if not (ROOT / name).exists()] == []


def test_readme_has_commands_in_blocks():
    assert len(command_lines(ROOT / "README.md")) >= 4


@pytest.mark.parametrize("page", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda page: page.name)
def test_run_file_begins_with_the_command_that_runs_it(page):
    assert re.fullmatch(
        rf"# ray-trainer (train|sweep) examples/{re.escape(page.name)}", page.read_text().partition("\n")[0]
    )


def test_readme_tells_of_every_command():
    readme = (ROOT / "README.md").read_text()
    commands = next(action.choices for action in _parser()._actions if isinstance(action.choices, dict))

    assert [name for name in commands if f"`ray-trainer {name}" not in readme] == []
