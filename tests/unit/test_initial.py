"""A run that starts with the weights of another one."""

import pytest
import torch
from experiments import Network, assert_same, carry_out, events, prepare, run, settings

from ray_trainer import load_weights
from ray_trainer.errors import CheckpointError, ConfigError
from ray_trainer.initial import initialise


def test_new_run_starts_with_the_weights_of_another_one_and_tells_so_once(tmp_path):
    source = run(tmp_path / "source")
    changes = {"init_from": str(tmp_path / "source" / "checkpoint_epoch0001_step00000010"), "epochs": 1}
    prepared = prepare(tmp_path / "new", **changes)
    started_with = {}
    prepared.diary.on_call = lambda name, count: (
        started_with.update({key: value.clone() for key, value in prepared.model.state_dict().items()})
        if name == "on_epoch_start"
        else None
    )
    carry_out(prepared)

    assert_same(started_with, source.weights)
    (told,) = events(tmp_path / "new", "initialised")
    assert told["loaded"] == len(source.weights)
    assert told["missing"] == told["unexpected"] == told["mismatched"] == []


def test_run_that_is_resumed_keeps_its_own_weights(tmp_path):
    run(tmp_path / "source")
    whole = run(tmp_path / "whole", init_from=str(tmp_path / "source"))
    for_five_steps = prepare(tmp_path / "broken", init_from=str(tmp_path / "source"), max_steps=5)
    carry_out(for_five_steps)

    resumed = run(tmp_path / "broken", init_from=str(tmp_path / "source"))

    assert resumed.step == whole.step
    assert len(events(tmp_path / "broken", "initialised")) == 1
    assert len(events(tmp_path / "broken", "resumed")) == 1


def test_weights_that_do_not_fit_are_refused_with_what_differs_before_anything_is_written(tmp_path):
    run(tmp_path / "source", norm=True)
    prepared = prepare(tmp_path / "new", init_from=str(tmp_path / "source"))

    with pytest.raises(ConfigError, match=r"not in this model .*layers\.1") as caught:
        carry_out(prepared)

    assert "init_partial" in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_what_fits_is_taken_over_on_request(tmp_path):
    run(tmp_path / "source", norm=True)
    source = load_weights(tmp_path / "source")
    config = settings(tmp_path, init_from=str(tmp_path / "source"), init_partial=True)
    model = Network(norm=False)
    model.layers[3] = torch.nn.Linear(8, 4)

    found = initialise(model, config)

    assert torch.equal(model.layers[0].weight, source["layers.0.weight"])
    assert found.loaded == 2
    assert found.mismatched[0] == "layers.3.weight: (3, 8) there, (4, 8) here"
    assert any(name.startswith("layers.1.running_mean") for name in found.unexpected)


def test_nothing_that_fits_is_refused_even_on_request(tmp_path):
    run(tmp_path / "source")
    config = settings(tmp_path, init_from=str(tmp_path / "source"), init_partial=True)

    with pytest.raises(ConfigError, match="does not fit"):
        initialise(torch.nn.Bilinear(2, 2, 2), config)


def test_place_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        initialise(Network(), settings(tmp_path, init_from=str(tmp_path / "nowhere")))
