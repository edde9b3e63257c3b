"""Reading and writing of YAML 1.2 and JSON files, with the lines on which settings stand.

PyYAML follows YAML 1.1: ``3e-4`` is text, ``01:30:00`` is 5400, ``no`` is False, and of two equal keys the
last one wins. Editors follow YAML 1.2, whose core schema (yaml.org/spec/1.2.2, section 10.3) is read here;
equal keys are an error.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ray_trainer.errors import ConfigError

_YAML_SUFFIXES = (".yaml", ".yml")
_LINE_DEPTH = 2  # section.setting: deeper, errors name the setting alone

_UNICODE_BREAKS = "\x85\u2028\u2029"  # PyYAML folds them unless they are escaped


class Document(NamedTuple):
    """What a file says."""

    values: Any
    """A mapping, when it comes from `read_document`."""
    lines: dict[str, int]
    """Line of each setting by its dotted name, counted from 1; empty for JSON."""


def read_document(path: Path) -> Document:
    """Read a mapping from a ``.yaml``, ``.yml`` or ``.json`` file; an empty YAML file is an empty mapping.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: the file is of another kind, malformed, or no mapping; names the file and the line.
    """
    suffix = _known_suffix(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}. Save it as UTF-8.") from error
    document = _parse_json(text, path) if suffix == ".json" else _parse_yaml(text, str(path))
    if document.values is None and suffix != ".json":
        return Document({}, {})
    if not isinstance(document.values, dict):
        raise ConfigError(
            f"{path} holds a {type(document.values).__name__}, not settings. Write one `name: value` a line."
        )
    return document


def write_document(path: Path, values: Mapping[str, Any]) -> None:
    """Write plain values as YAML or JSON, as the suffix says; missing directories are made."""
    suffix = _known_suffix(path)
    text = dump_yaml(values) if suffix != ".json" else json.dumps(values, indent=2, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def parse_value(text: str) -> Any:
    """Value of one setting as YAML: ``3e-4`` is a number, ``[1, 2]`` a list, nothing at all is None.

    Raises:
        ConfigError: the text is not YAML.
    """
    return _parse_yaml(text, repr(text)).values


def dump_yaml(values: Mapping[str, Any]) -> str:
    """Write plain values as YAML that readers of 1.1 and of 1.2 understand alike."""
    return yaml.dump(
        dict(values), Dumper=_Writer, sort_keys=False, allow_unicode=True, default_flow_style=False, width=100
    )


def as_yaml(value: object) -> str:
    """Write one value on one line, as it would stand in a run file."""
    text = yaml.dump(value, Dumper=_Writer, allow_unicode=True, default_flow_style=True, width=math.inf)
    return text.removesuffix("...\n").strip()


def _known_suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in (*_YAML_SUFFIXES, ".json"):
        raise ConfigError(f"{path} has the suffix {suffix!r}. Name the file .yaml, .yml or .json.")
    return suffix


def _parse_json(text: str, path: Path) -> Document:
    def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in pairs:
            if key in values:
                raise ConfigError(f"Invalid JSON in {path}: {key!r} stands twice. Remove one of them.")
            values[key] = value
        return values

    try:
        return Document(json.loads(text, object_pairs_hook=unique), {})
    except RecursionError as error:
        raise ConfigError(f"Invalid JSON in {path}: it is nested too deeply.") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"Invalid JSON in {path}, line {error.lineno}: {error.msg}.") from error


def _parse_yaml(text: str, source: str) -> Document:
    try:
        loader = _Reader(text)
        node = loader.get_single_node()
        if node is None:
            return Document(None, {})
        return Document(loader.construct_document(node), dict(_lines(node, "", _LINE_DEPTH)))
    except RecursionError as error:
        raise ConfigError(f"Invalid YAML in {source}: it is nested too deeply, or holds itself.") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"Invalid YAML in {source}{line}: {error.problem or error.context}.") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a tag that does not fit, such as !!int x
        raise ConfigError(f"Invalid YAML in {source}: {error}.") from error


def _lines(node: yaml.Node, prefix: str, depth: int) -> Iterable[tuple[str, int]]:
    if depth == 0 or not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        yield name, key.start_mark.line + 1
        yield from _lines(value, f"{name}.", depth - 1)


class _Reader(yaml.SafeLoader):
    """YAML 1.2 core schema, plus merge keys (``<<``) of 1.1."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  PyYAML's own declaration of it

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen and key.value != "<<":
                problem = f"{key.value!r} stands twice; remove one of them"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


class _Writer(yaml.SafeDumper):
    """Quotes what YAML 1.1 *or* 1.2 would take for something else than text."""

    yaml_implicit_resolvers = {  # noqa: RUF012  PyYAML's own declaration of it
        first: list(resolvers) for first, resolvers in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


_CORE_SCHEMA = (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", "-+0123456789"),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+0123456789.",
    ),
    ("null", r"^(?:~|null|Null|NULL|)$", "~nN\0"),
    ("merge", r"^(?:<<)$", "<"),
)


def _construct_int(_: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(node.value, 0) if node.value[:2] in ("0o", "0x") else int(node.value)


def _represent_sequence(writer: yaml.SafeDumper, values: Iterable[Any]) -> yaml.SequenceNode:
    values = list(values)
    nested = any(isinstance(value, Mapping | list | tuple) for value in values)
    return writer.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=not nested)


def _represent_text(writer: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    escaped = any(character in text for character in _UNICODE_BREAKS)
    return writer.represent_scalar("tag:yaml.org,2002:str", text, style='"' if escaped else None)


for _tag, _pattern, _first in _CORE_SCHEMA:
    _first_characters = [*_first.replace("\0", ""), ""] if "\0" in _first else list(_first)
    for _class in (_Reader, _Writer):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first_characters)
_Reader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Writer.add_representer(list, _represent_sequence)
_Writer.add_representer(str, _represent_text)
_Writer.add_representer(tuple, _represent_sequence)
