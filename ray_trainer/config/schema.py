"""Sections of the configuration: dataclasses that tell every mistake at once.

A section declares its fields with annotated types, from which `fields` decides what each accepts; its rules
say what several of them must fulfil together.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self, get_type_hints

import numpy as np
from pydantic import ConfigDict

from ray_trainer.config.fields import FieldCheck, Notation, did_you_mean, shortened
from ray_trainer.errors import ConfigError, UnknownFieldError


class Problem(NamedTuple):
    """One thing that is wrong with a section."""

    name: str
    """Dotted name of the field, seen from the section that was asked."""
    value: str | None
    message: str
    kind: Literal["name", "type", "value"]

    def __str__(self) -> str:
        """One line for the user."""
        given = self.name if self.value is None else f"{self.name} = {shortened(self.value)}"
        return f"{given}: {self.message}"

    def within(self, part: str) -> "Problem":
        """The same problem, seen from the section that holds this one."""
        return self._replace(name=f"{part}.{self.name}")


class Rule(NamedTuple):
    """What several fields must fulfil together; asked only when each of them is right by itself."""

    fields: tuple[str, ...]
    """The first one is named in the error."""
    broken: Callable[[Any], str | None]
    """Takes the section; says what is wrong and what to do, or None."""


@dataclasses.dataclass(init=False)
class Section:
    """What all sections of the configuration can do; a section is a dataclass that inherits from it.

    A field may be a section itself. Values that numpy computed are kept as Python's, paths as text and lists
    as tuples, so that a section can be written down and compared.
    """

    other_names: ClassVar[Mapping[str, str]] = {}
    """What other trainers call a field -> its name here, or a sentence on where it belongs."""
    rules: ClassVar[tuple[Rule, ...]] = ()
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    def __new__(cls, *_: Any, **values: Any) -> Self:
        """Refuse unknown keywords, all of them at once."""
        unknown = [f"{name}: {cls.hint(name)}" for name in values if name not in _fields(cls)]
        if unknown:
            raise UnknownFieldError("\n  - ".join([f"{cls.__name__} was given unknown settings:", *unknown]))
        return super().__new__(cls)

    if not TYPE_CHECKING:  # a type checker that sees these would accept any name

        def __setattr__(self, name: str, value: object) -> None:
            if name not in _fields(type(self)):
                raise UnknownFieldError(f"{type(self).__name__}.{name}: {self.hint(name)}")
            super().__setattr__(name, _plain(value))

        def __getattr__(self, name: str) -> object:
            raise UnknownFieldError(f"{type(self).__name__}.{name}: {self.hint(name)}")

    @classmethod
    def hint(cls, name: str) -> str:
        """What to tell a user who wrote a name that is no field."""
        meant = cls.other_names.get(name)
        if meant and " " in meant:
            return f"no such setting; {meant}"
        return "no such setting" + did_you_mean(name, _fields(cls), meant)

    def validate(self) -> bool:
        """Check types, ranges and what fields must fulfil together.

        Returns:
            True.

        Raises:
            ConfigError: lists every error.
        """
        refuse(self.problems())
        return True

    def problems(self, write: Notation = repr) -> list[Problem]:
        """Everything that is wrong, in the order of the fields; the rules come last."""
        found: list[Problem] = []
        parts = _parts(type(self))
        for name, field in _fields(type(self)).items():
            value = getattr(self, name)
            if name in parts and isinstance(value, parts[name]):
                found += (problem.within(name) for problem in value.problems(write))
            elif name in parts:
                found.append(Problem(name, write(value), "must be a mapping of settings", "type"))
            elif not field.accepts(value):
                found.append(Problem(name, write(value), field.complaint(value, write), field.kind(value)))
        return found + self._broken_rules({problem.name for problem in found}, write)

    @classmethod
    def examine(cls, values: Mapping[Any, Any], write: Notation = repr) -> tuple[Self, list[Problem]]:
        """Build a section from plain values; list what is wrong, unknown and missing names included."""
        section, problems = cls._build(values, write)
        told = {problem.name for problem in problems}  # what is missing is not of a wrong type as well
        problems += (problem for problem in section.problems(write) if problem.name not in told)
        return section, problems

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a section from plain values; whether they make sense is left to `validate`.

        Raises:
            ConfigError: lists every unknown or missing name and every value of a wrong type.
        """
        section, problems = cls.examine(values)
        refuse(problem for problem in problems if problem.kind != "value")
        return section

    def to_dict(self) -> dict[str, Any]:
        """Copy of all fields as plain values, in their order."""
        return dataclasses.asdict(self)

    @classmethod
    def _build(cls, values: Mapping[Any, Any], write: Notation) -> tuple[Self, list[Problem]]:
        fields = _fields(cls)
        problems = [Problem(str(name), None, cls.hint(str(name)), "name") for name in values if name not in fields]
        known = {name: values[name] for name in fields if name in values}
        for name, part in _parts(cls).items():
            if isinstance(known.get(name), Mapping):
                known[name], inner = part._build(known[name], write)
                problems += (problem.within(name) for problem in inner)
        for name in [name for name, field in fields.items() if field.is_required and name not in known]:
            known[name] = None
            problems.append(Problem(name, None, f"is missing; it must be {fields[name].allowed(write)}", "name"))
        return cls(**known), problems

    def _broken_rules(self, wrong: set[str], write: Notation) -> list[Problem]:
        found: list[Problem] = []
        for rule in self.rules:
            message = rule.broken(self) if wrong.isdisjoint(rule.fields) else None
            if message:
                name = rule.fields[0]
                found.append(Problem(name, write(getattr(self, name)), message, "value"))
        return found


def refuse(problems: Iterable[object], source: str = "") -> None:
    """Raise one ConfigError that lists the problems, one a line, if there are any.

    Args:
        problems: what `str` makes a line of.
        source: the file they are in.
    """
    lines = [str(problem) for problem in problems]
    if lines:
        place = f" in {source}" if source else ""
        raise ConfigError("\n  - ".join([f"Configuration validation failed{place}:", *lines]))


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return tuple(value) if isinstance(value, list) else value


def _fields(section: type[Section]) -> dict[str, FieldCheck]:
    """Check of each field, made once for each class."""
    if section not in _checks:
        hints = get_type_hints(section, include_extras=True)
        parts = _parts(section)
        _checks[section] = {
            field.name: FieldCheck.of(Any if field.name in parts else hints[field.name], _default(field))
            for field in dataclasses.fields(section)
        }
    return _checks[section]


def _parts(section: type[Section]) -> dict[str, type[Section]]:
    """Fields that are sections themselves."""
    return {
        name: hint
        for name, hint in get_type_hints(section).items()
        if isinstance(hint, type) and issubclass(hint, Section)
    }


def _default(field: dataclasses.Field[Any]) -> object:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


_checks: dict[type[Section], dict[str, FieldCheck]] = {}
