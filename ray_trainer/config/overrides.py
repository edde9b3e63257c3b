"""Changing single settings by their dotted names: the same for the command line and for Ray Tune."""

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ray_trainer.config.documents import parse_value
from ray_trainer.errors import ConfigError

_ASSIGNMENT = re.compile(r"(?:--)?[A-Za-z_][\w-]*(?:\.[\w-]+)*=.*", re.DOTALL)
_OPTION = re.compile(r"--[A-Za-z_][\w-]*(?:\.[\w-]+)+(?:=.*)?", re.DOTALL)


def apply_overrides(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Set values by dotted names, such as ``{"training.learning_rate": 1e-3, "model.layers.0": {}}``.

    Args:
        values: nested mappings; left as they are.
        overrides: later ones win. Mappings on the way are made where they are missing.

    Raises:
        ConfigError: a name leads through something that is not a mapping.
    """
    changed: dict[str, Any] = copy.deepcopy(dict(values))
    for name, value in overrides.items():
        *parents, last = name.split(".")
        place = changed
        for depth, parent in enumerate(parents, start=1):
            if place.get(parent) is None:
                place[parent] = {}
            if not isinstance(place[parent], dict):
                reached = ".".join(parents[:depth])
                raise ConfigError(
                    f"{name} cannot be set: {reached} is {place[parent]!r}, which has no settings. "
                    f"Override {reached} itself."
                )
            place = place[parent]
        place[last] = copy.deepcopy(value)
    return changed


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Read ``section.key=value``, ``--section.key=value`` and ``--section.key value``; values are YAML.

    Raises:
        ConfigError: lists every argument that is none of these.
    """
    overrides: dict[str, Any] = {}
    errors: list[str] = []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        name, has_value, text = argument.removeprefix("--").partition("=")
        if not has_value and _OPTION.fullmatch(argument) and remaining and _is_value(remaining[0]):
            has_value, text = "=", remaining.pop(0)
        if not has_value or not _ASSIGNMENT.fullmatch(f"{name}={text}"):
            errors.append(f"{argument}: is no override; write section.key=value, such as training.epochs=3")
            continue
        try:
            overrides[name] = parse_value(text)
        except ConfigError as error:
            errors.append(f"{name}: {error}")
    if errors:
        raise ConfigError("\n  - ".join(["The command line cannot be read:", *errors]))
    return overrides


def split_overrides(arguments: Iterable[str]) -> tuple[list[str], list[str]]:
    """Take the overrides out of a command line, wherever they stand.

    Returns:
        The arguments that are left, for argparse, and the overrides, for `parse_overrides`.
    """
    others: list[str] = []
    overrides: list[str] = []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if not (_OPTION.fullmatch(argument) or (argument[:1] != "-" and _ASSIGNMENT.fullmatch(argument))):
            others.append(argument)
            continue
        overrides.append(argument)
        if "=" not in argument and remaining and _is_value(remaining[0]):
            overrides.append(remaining.pop(0))
    return others, overrides


def _is_value(argument: str) -> bool:
    return not argument.startswith("--")
