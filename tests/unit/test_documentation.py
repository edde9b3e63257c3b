"""Command lines in the README and in the examples: they can be given as they stand."""

import re
import shlex
from pathlib import Path

import pytest

from ray_trainer.cli import _parser
from ray_trainer.config.overrides import split_overrides

ROOT = Path(__file__).parents[2]
COMMAND = re.compile(r"(?:^|/| |`)(ray-trainer [a-z][^`&|\n]*)")
PAGES = [ROOT / "README.md", *sorted((ROOT / "examples").glob("*.*"))]


def command_lines(page: Path) -> list[str]:
    """Those that can be given: of Markdown, what stands in blocks; else what stands in comments and docstrings."""
    text = page.read_text()
    if page.suffix == ".md":
        text = "\n".join(re.findall(r"^```(?:bash|console)\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    return COMMAND.findall(text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_command_lines_can_be_given(page):
    for line in command_lines(page):
        words = shlex.split(line)
        arguments = vars(_parser().parse_args(split_overrides(words[1:])[0]))
        if "run_file" in arguments:
            assert (ROOT / arguments["run_file"]).is_file(), line


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
