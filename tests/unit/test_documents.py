"""YAML 1.2 as users and editors write it."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_trainer.config.documents import as_yaml, dump_yaml, parse_value, read_document
from ray_trainer.errors import ConfigError

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1e5", 1e5),
        ("-.5", -0.5),
        ("5.", 5.0),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("+3", 3),
        ("true", True),
        ("no", "no"),
        ("on", "on"),
        ("01:30:00", "01:30:00"),
        ("2026-01-31", "2026-01-31"),
        ("1_000", "1_000"),
        ("None", "None"),
        ("null", None),
        ("~", None),
        ("", None),
        ("'3'", "3"),
        ("[1, 2e0]", [1, 2.0]),
        ("{a: 1e-3}", {"a": 1e-3}),
    ],
)
def test_scalars_are_read_as_yaml_1_2_says(text, value):
    read = parse_value(text)

    assert read == value
    assert type(read) is type(value)


@settings(deadline=None, max_examples=20)  # the machine may be busy
@given(PLAIN)
def test_what_is_written_reads_the_same_in_both_versions_of_yaml(value):
    assert parse_value(as_yaml(value)) == value
    text = dump_yaml({"value": value})
    assert parse_value(text) == {"value": value}
    assert yaml.safe_load(text) == {"value": value}


def test_lines_are_known_for_sections_and_settings(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("# comment\ntraining:\n  epochs: 3\n\n  shuffle: false\nmodel: {width: {a: 1}}\n")

    document = read_document(path)

    assert document.values == {"training": {"epochs": 3, "shuffle": False}, "model": {"width": {"a": 1}}}
    assert document.lines == {
        "training": 2,
        "training.epochs": 3,
        "training.shuffle": 5,
        "model": 6,
        "model.width": 6,
    }


def test_merge_keys_share_settings(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  y: 3\n")

    assert read_document(path).values["b"] == {"x": 1, "y": 3}


@pytest.mark.parametrize(
    "text",
    [
        "a: [1",
        "a: !!python/object/apply:os.getcwd []",
        "a: *missing",
        "? [1]\n: 2",
        "!!int x",
        "\x00",
        "a: 1\n b: 2",
    ],
)
def test_text_that_is_no_safe_yaml_is_a_config_error(text):
    with pytest.raises(ConfigError, match="Invalid YAML"):
        parse_value(text)


def test_file_that_is_no_utf8_is_a_config_error(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"a: \xff")

    with pytest.raises(ConfigError, match="not UTF-8"):
        read_document(tmp_path / "run.yaml")


def test_empty_file_has_no_settings(tmp_path):
    (tmp_path / "run.yaml").write_text("# nothing yet\n")

    assert read_document(tmp_path / "run.yaml").values == {}
