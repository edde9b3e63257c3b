"""``ray-trainer config``: check a run file without training, and its JSON Schema."""

import argparse
import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from ray_trainer.cli.commands import Subparsers, add_command
from ray_trainer.cli.experiment import load_experiment
from ray_trainer.cli.runfile import RunFile, load_run_file, resolved
from ray_trainer.config.documents import dump_yaml

_CHECK = "ray-trainer config check examples/digits.yaml"
_SCHEMA = "ray-trainer config schema > run-file.schema.json"
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def add_parser(subparsers: "Subparsers[argparse.ArgumentParser]") -> None:
    """Add ``config check`` and ``config schema``.

    The caller takes the overrides out of the command line with `overrides.split_overrides`, parses the rest,
    and puts them into the namespace as ``overrides``.
    """
    config = add_command(
        subparsers, "config", help="check a run file, or print its JSON Schema", examples=f"{_CHECK}\n{_SCHEMA}"
    )
    commands = config.add_subparsers(dest="config_command", required=True, metavar="COMMAND")
    check = add_command(
        commands,
        "check",
        help="check everything without training, and print the resolved run",
        examples=f"{_CHECK}\n{_CHECK} training.epochs=2",
        usage="RUN.yaml [section.key=value ...]",
    )
    check.add_argument("run_file", metavar="RUN.yaml", type=Path, help="the run file")
    check.set_defaults(run=run)
    schema = add_command(commands, "schema", help="print the JSON Schema of run files, for editors", examples=_SCHEMA)
    schema.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out ``config check`` or ``config schema``.

    Raises:
        ConfigError: what is checked is wrong.
    """
    if args.config_command == "schema":
        print(json.dumps(run_file_schema(), indent=2))
        return 0
    run_file = load_run_file(args.run_file, getattr(args, "overrides", ()))
    load_experiment(run_file.experiment, args.run_file.parent)
    print(dump_yaml(resolved(run_file)), end="")
    return 0


def run_file_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of run files.

    It says what `load_run_file` accepts, but for rules over several settings, and for 2.0 where a count
    belongs. A section that is empty, as when all of it is commented out, is null; it has its defaults.
    """
    schema = TypeAdapter(RunFile).json_schema(schema_generator=_Untitled)
    for name, section in schema["properties"].items():
        if name not in schema["required"] and {"type": "null"} not in section.get("anyOf", ()):
            told = {"description": section.pop("description")}
            schema["properties"][name] = {**told, "anyOf": [section, {"type": "null"}]}
    return {"$schema": DIALECT, **schema, "title": "Run file of ray-trainer"}


class _Untitled(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: Any) -> bool:
        return False  # editors show names and descriptions; "Num Workers" adds nothing
