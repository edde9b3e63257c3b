"""Overrides: one function for the command line and for Ray Tune."""

import pytest

from ray_trainer.config.overrides import apply_overrides, parse_overrides, split_overrides
from ray_trainer.errors import ConfigError


@pytest.mark.parametrize(
    "arguments",
    [["training.lr=3e-4"], ["--training.lr=3e-4"], ["--training.lr", "3e-4"]],
)
def test_three_ways_to_write_an_override_mean_the_same(arguments):
    assert parse_overrides(arguments) == {"training.lr": 3e-4}


def test_negative_and_empty_values_are_values():
    assert parse_overrides(["--a.b", "-1", "a.c=", "a.d=x=y"]) == {"a.b": -1, "a.c": None, "a.d": "x=y"}


@pytest.mark.parametrize("argument", ["training.epochs", "--training.epochs", "3", "=3", "a..b=3", ".a=3", "a.=3"])
def test_argument_that_is_no_override_is_refused_with_the_form(argument):
    with pytest.raises(ConfigError, match=r"write section\.key=value"):
        parse_overrides([argument])


def test_all_arguments_that_cannot_be_read_are_told_at_once():
    with pytest.raises(ConfigError, match=r"oops(?s:.)*model.a: Invalid YAML"):
        parse_overrides(["oops", "model.a=[1", "b.c=1"])


def test_nested_values_are_made_and_replaced_without_touching_the_original():
    original = {"model": {"width": 1, "inner": {"a": 1}}, "training": None}

    changed = apply_overrides(original, {"model.inner.b": 2, "model.width": 3, "training.epochs": 4, "cluster.x.y": 5})

    assert changed == {
        "model": {"width": 3, "inner": {"a": 1, "b": 2}},
        "training": {"epochs": 4},
        "cluster": {"x": {"y": 5}},
    }
    assert original == {"model": {"width": 1, "inner": {"a": 1}}, "training": None}


def test_path_through_a_plain_value_is_refused():
    with pytest.raises(ConfigError, match=r"model.width is 128.*Override model.width itself"):
        apply_overrides({"model": {"width": 128}}, {"model.width.x": 1})


def test_overrides_are_taken_out_of_a_command_line_wherever_they_stand():
    line = "train --a.b 3 run.v2.yaml --dry-run c.d=4 --output out.yaml --e.f=-1 --json"

    rest, overrides = split_overrides(line.split())

    assert rest == ["train", "run.v2.yaml", "--dry-run", "--output", "out.yaml", "--json"]
    assert parse_overrides(overrides) == {"a.b": 3, "c.d": 4, "e.f": -1}
