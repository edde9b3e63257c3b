"""What holds for every field of every section: a field without a case here fails."""

import copy
import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter
from section_cases import CASES, FIELDS, REQUIRED

from ray_trainer.cluster.config import ClusterConfig
from ray_trainer.config import TrainingConfig
from ray_trainer.config.schema import Section, UnknownFieldError
from ray_trainer.errors import ConfigError


def section_with(section: type[Section], **values: object) -> Section:
    return section(**{**REQUIRED.get(section, {}), **values})


def only_problem(section: Section) -> str:
    with pytest.raises(ConfigError) as caught:
        section.validate()
    header, *lines = str(caught.value).splitlines()
    assert header == "Configuration validation failed:"
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(("section", "name"), FIELDS)
def test_wrong_type_is_told_with_field_value_and_what_is_allowed(section, name):
    for value in CASES[section][name][0]:
        line = only_problem(section_with(section, **{name: value}))
        stored = tuple(value) if isinstance(value, list) else value
        assert line.startswith(f"  - {name} = {stored!r}: must be ")


@pytest.mark.parametrize(("section", "name"), FIELDS)
def test_value_out_of_bounds_is_told_with_field_and_value(section, name):
    for value in CASES[section][name][1]:
        assert only_problem(section_with(section, **{name: value})).startswith(f"  - {name} = {value!r:.80}")


@pytest.mark.parametrize(("section", "name"), FIELDS)
def test_misspelt_name_is_refused_everywhere_with_the_right_one(section, name):
    misspelt = name[:-2] + name[-1] + name[-2] if name[-1] != name[-2] else name + "x"
    meant = repr(name)
    good = section_with(section)

    with pytest.raises(ConfigError) as keyword:
        section_with(section, **{misspelt: 1})
    with pytest.raises(AttributeError) as assignment:
        setattr(good, misspelt, 1)
    with pytest.raises(AttributeError) as reading:
        getattr(good, misspelt)
    with pytest.raises(ConfigError) as loading:
        section.from_dict({misspelt: 1})

    for caught in (keyword, assignment, reading, loading):
        assert "did you mean" in str(caught.value)
        assert meant in str(caught.value)


@pytest.mark.parametrize(("section", "name"), FIELDS)
def test_every_field_is_documented_with_what_none_means(section, name):
    field = TypeAdapter(section).json_schema()["properties"][name]

    assert len(field["description"]) > 10
    nullable = {"type": "null"} in field.get("anyOf", ())
    assert not nullable or name == "sweep" or "None:" in field["description"]


@pytest.mark.parametrize("section", CASES)
def test_defaults_are_valid_and_survive_dict_copy_and_pickle(section):
    good = section_with(section)

    assert good.validate() is True
    assert section.from_dict(good.to_dict()) == good
    assert copy.deepcopy(good) == good
    assert pickle.loads(pickle.dumps(good)) == good


@pytest.mark.parametrize("section", CASES)
def test_synonyms_lead_to_real_fields_and_hide_none(section):
    names = {field.name for field in dataclasses.fields(section)}

    assert names.isdisjoint(section.other_names)
    assert {ours for ours in section.other_names.values() if " " not in ours} <= names


def test_all_errors_are_told_at_once():
    config = TrainingConfig(epochs=0, learning_rate="3e-4", optimizer="lion", use_amp=False, precision="fp16-mixed")

    with pytest.raises(ValueError, match="Configuration validation failed") as caught:
        config.validate()

    for name in ("epochs", "learning_rate", "optimizer", "use_amp"):
        assert f"\n  - {name} = " in str(caught.value)
    assert len(str(caught.value).splitlines()) == 5


@pytest.mark.parametrize(
    ("values", "advice"),
    [
        ({"learning_rate": "3e-4"}, "did you mean 0.0003?"),
        ({"max_steps": 1e4}, "did you mean 10000?"),
        ({"max_steps": -1}, "did you mean None?"),
        ({"shuffle": "no"}, "did you mean False?"),
        ({"optimizer": "AdamW"}, "did you mean 'adamw'?"),
        ({"run_name": 7}, "did you mean '7'?"),
        ({"compile_mode": "none"}, "did you mean None?"),
        ({"batch_size": 0}, "leave it out for the default, 4"),
    ],
)
def test_what_was_probably_meant_is_proposed(values, advice):
    assert only_problem(TrainingConfig(**values)).endswith(advice)


def test_unknown_name_error_survives_pickling():
    with pytest.raises(UnknownFieldError) as caught:
        TrainingConfig(lr=1)

    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_all_unknown_keywords_are_told_at_once():
    with pytest.raises(ConfigError, match=r"'learning_rate'(?s:.)*'epochs'"):
        TrainingConfig(lr=1, max_epochs=3)


def test_numpy_values_paths_and_lists_are_kept_as_plain_values():
    config = TrainingConfig(
        learning_rate=np.float64(0.5), epochs=np.int64(3), checkpoint_dir=Path("a/b"), betas=[0.5, 0.9]
    )

    assert config.validate()
    assert type(config.learning_rate) is float
    assert type(config.epochs) is int
    assert (config.checkpoint_dir, config.betas) == ("a/b", (0.5, 0.9))


def test_values_of_a_wrong_type_are_refused_by_from_dict_and_others_left_to_validate():
    assert TrainingConfig.from_dict({"epochs": 0}).epochs == 0
    with pytest.raises(ConfigError, match="epochs = '3'"):
        TrainingConfig.from_dict({"epochs": "3"})


def test_copy_of_a_section_does_not_share_mutable_values():
    cluster = ClusterConfig(resources_per_worker={"CPU": 2})

    cluster.to_dict()["resources_per_worker"]["CPU"] = 4

    assert cluster.resources_per_worker == {"CPU": 2}
