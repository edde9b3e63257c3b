"""What one field of a section accepts, and the words for it.

Pydantic decides what fits and writes the JSON Schema; the words of an error are made from that schema. What
is checked, what is told and what an editor shows cannot differ.
"""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Ratio = Annotated[float, Field(ge=0, le=1)]
PositiveRatio = Annotated[float, Field(gt=0, le=1)]
RatioBelowOne = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]

Notation = Callable[[object], str]
"""How values are written in an error: `repr` in Python, `documents.as_yaml` for a run file."""

_STRICT = ConfigDict(strict=True, allow_inf_nan=False)
_WRONG_VALUE = {  # pydantic's names of errors in a value of the right type
    "greater_than",
    "greater_than_equal",
    "less_than",
    "less_than_equal",
    "literal_error",
    "string_pattern_mismatch",
    "string_too_long",
    "string_too_short",
}
_SWITCHES = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}
_NOTHING = ("none", "null", "nil", "~", "")
_MAX_LISTED = 12
_MAX_SHOWN = 80


def described(pattern: str, words: str) -> Any:
    """Field of text that matches a pattern, which the words describe; editors show them too."""
    return Field(pattern=pattern, json_schema_extra={"patternErrorMessage": words})


@dataclasses.dataclass(frozen=True)
class FieldCheck:
    """Decides about the values of one field, and says what is wrong with them."""

    adapter: TypeAdapter[Any]
    default: object
    """`dataclasses.MISSING` for a field that must be given."""

    @classmethod
    def of(cls, annotation: Any, default: object) -> "FieldCheck":
        """Check what the annotation says, without conversions: True is no number and 1.0 is no count."""
        return cls(TypeAdapter(annotation, config=_STRICT), default)

    @property
    def is_required(self) -> bool:
        """Whether there is no default."""
        return self.default is dataclasses.MISSING

    def accepts(self, value: object) -> bool:
        """Whether the value fits type and bounds."""
        return not self._errors(value)

    def kind(self, value: object) -> Literal["type", "value"]:
        """Whether a refused value is of a wrong type altogether, or of a right one and out of bounds."""
        return "type" if _WRONG_VALUE.isdisjoint(self._errors(value)) else "value"

    def allowed(self, write: Notation) -> str:
        """Words for what fits."""
        return describe(self.adapter.json_schema(), write)

    def complaint(self, value: object, write: Notation) -> str:
        """What must stand there instead of the value, and what to do."""
        told = f"must be {self.allowed(write)}"
        for candidate in self._candidates(value):
            if self.accepts(candidate):
                return f"{told}; did you mean {write(candidate)}?"
        return told if self.is_required else f"{told}; leave it out for the default, {write(self.default)}"

    def _errors(self, value: object) -> list[str]:
        try:
            self.adapter.validate_python(value)
        except ValidationError as error:
            return [detail["type"] for detail in error.errors(include_url=False, include_input=False)]
        return []

    def _candidates(self, value: object) -> Iterator[object]:
        """What may have been meant, most likely first."""
        if isinstance(value, str):
            yield from _values_in_text(value)
            yield from difflib.get_close_matches(value.lower(), self._choices(), n=1, cutoff=0.5)
        elif isinstance(value, float) and value.is_integer():
            yield int(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            yield str(value)
        if isinstance(value, int | float) and value in (0, -1):
            yield None  # other trainers write 0 or -1 for "off" or "no limit"

    def _choices(self) -> list[str]:
        schema = self.adapter.json_schema()
        return [choice for option in schema.get("anyOf", [schema]) for choice in option.get("enum", ())]


def did_you_mean(name: str, names: Iterable[str], meant: str | None = None) -> str:
    """End of a sentence: what was probably meant, else what there is, if that is a short list."""
    names = list(names)
    written = name.lower().replace("-", "_")
    close = [meant] if meant else difflib.get_close_matches(written, names, n=2, cutoff=0.6)
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    return f"; there is {', '.join(names)}" if 0 < len(names) <= _MAX_LISTED else ""


def shortened(text: str) -> str:
    """The value as it is shown in an error."""
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def describe(schema: Mapping[str, Any], write: Notation) -> str:
    """Say in words what a JSON Schema allows; knows the keywords that the fields of sections use."""
    if "patternErrorMessage" in schema:
        return str(schema["patternErrorMessage"])
    if "anyOf" in schema:
        *options, last = [describe(option, write) for option in schema["anyOf"]]
        return f"{', '.join(options)}, or {last}"
    if "enum" in schema:
        return "one of " + ", ".join(map(write, schema["enum"]))
    return _KINDS[schema["type"]](schema, write)


def _describe_number(noun: str, schema: Mapping[str, Any], _: Notation) -> str:
    bounds = {
        "exclusiveMinimum": "above {:.10g}",
        "minimum": "at least {:.10g}",
        "exclusiveMaximum": "below {:.10g}",
        "maximum": "at most {:.10g}",
    }
    if "minimum" in schema and "maximum" in schema:
        return f"{noun} from {schema['minimum']:.10g} to {schema['maximum']:.10g}"
    told = [words.format(schema[key]) for key, words in bounds.items() if key in schema]
    return " ".join([noun, *(["that is"] if told else []), " and ".join(told)]).strip()


def _describe_array(schema: Mapping[str, Any], write: Notation) -> str:
    items = schema["prefixItems"]
    return f"a list of {len(items)}, each {describe(items[0], write)}"


def _describe_object(schema: Mapping[str, Any], write: Notation) -> str:
    values = schema["additionalProperties"]
    told = describe(values, write) if isinstance(values, dict) else "values"
    return f"a mapping from names (text) to {told}"


_KINDS: dict[str, Callable[[Mapping[str, Any], Notation], str]] = {
    "null": lambda _, write: write(None),
    "boolean": lambda _, write: f"{write(True)} or {write(False)}",
    "string": lambda schema, _: "text that is not empty" if schema.get("minLength") else "text",
    "integer": functools.partial(_describe_number, "a whole number"),
    "number": functools.partial(_describe_number, "a number"),
    "array": _describe_array,
    "object": _describe_object,
}


def _values_in_text(text: str) -> Iterator[object]:
    """What is left of a text that has quotes too many, or that is another language's word."""
    if text.lower() in _SWITCHES:
        yield _SWITCHES[text.lower()]
    if text.lower() in _NOTHING:
        yield None
    for number in (int, float):
        try:
            yield number(text)
        except ValueError:
            continue
