"""Each example on less than it has: it must run as written, and it must learn."""

import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cluster_runs import ray_of_two_cpus
from experiments import assert_same, metric_rows

from ray_trainer import Trainer, load_weights
from ray_trainer.cli import main
from ray_trainer.cli.experiment import load_experiment
from ray_trainer.cli.runfile import load_run_file
from ray_trainer.seeding import set_random_seed

EXAMPLES = Path(__file__).parents[2] / "examples"
RUN_FILES = sorted(path.name for path in EXAMPLES.glob("*.yaml"))


@pytest.fixture(scope="module")
def ray_of_examples() -> Iterator[None]:
    with ray_of_two_cpus():
        yield


def last_epoch(example: str, directory: Path, *overrides: str) -> dict[str, Any]:
    """What is written down of the last epoch of an example that is trained here, without Ray."""
    run_file = load_run_file(EXAMPLES / f"{example}.yaml", [*overrides, f"training.checkpoint_dir={directory}"])
    experiment = load_experiment(run_file.experiment, EXAMPLES)
    model, training = SimpleNamespace(**run_file.model), run_file.training
    data = experiment.build_datasets(model, training)
    set_random_seed(training.random_seed)
    trainer = Trainer(
        experiment.build_model(model),
        model,
        training,
        experiment.task_spec,
        experiment.build_hooks() if experiment.build_hooks else None,
        data_collator=experiment.collate_fn,
    )
    results = trainer.train(data["train"], data["val"])
    return dict(results["metrics_summary"].iloc[-1])


def defined_in(example: str) -> dict[str, Any]:
    """What the file of an example defines."""
    return runpy.run_path(str(EXAMPLES / f"{example}.py"))


# ---- without Ray


@pytest.mark.parametrize("name", RUN_FILES)
def test_run_file_of_an_example_is_right(name, capsys):
    assert main(["config", "check", str(EXAMPLES / name)]) == 0, capsys.readouterr().err


def test_table_of_examples_names_each_file_and_no_other():
    named = re.findall(r"\]\((\w+\.(?:py|yaml))\)", (EXAMPLES / "README.md").read_text())

    assert sorted(set(named)) == sorted(path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".yaml"))


def test_sentences_are_told_apart_far_better_than_by_guessing(tmp_path):
    assert last_epoch("text_classification", tmp_path, "training.epochs=2")["val/accuracy"] > 0.5  # one in four


def test_progression_of_diabetes_is_told_better_than_by_its_mean(tmp_path):
    assert last_epoch("tabular_regression", tmp_path, "training.epochs=6")["val/mae"] < 0.65  # the mean: 0.83


def test_half_of_the_sounds_of_new_words_are_right_after_a_few_seconds(tmp_path, capsys):
    short = ("model.words=4000", "model.width=64", "training.epochs=2")

    assert last_epoch("seq2seq", tmp_path, *short)["val/accuracy"] > 0.5  # of 39 sounds
    assert "python: " in capsys.readouterr().out


def test_transformers_model_learns_bytes_of_python_and_loads_as_a_pretrained_one(tmp_path):
    from transformers import AutoModelForCausalLM  # only here: it takes seconds to import

    short = ("model.hidden_size=32", "model.megabytes=1", "training.max_steps=50", "training.limit_val_batches=2")

    assert last_epoch("transformers_from_config", tmp_path / "run", *short)["val/perplexity"] < 40  # of 256 bytes

    model = SimpleNamespace(**load_run_file(EXAMPLES / "transformers_from_config.yaml", short).model)
    pretrained = tmp_path / "my_llama"
    assert main(["export", str(tmp_path / "run"), "--output", str(pretrained / "model.safetensors")]) == 0
    defined_in("transformers_from_config")["huggingface_config"](model).save_pretrained(pretrained)
    assert_same(load_weights(tmp_path / "run"), dict(AutoModelForCausalLM.from_pretrained(pretrained).state_dict()))


def test_hooks_stop_a_run_that_is_good_enough(tmp_path, capsys):
    last = last_epoch("custom_hooks", tmp_path)

    assert last["val/accuracy"] >= 0.95
    assert last["epoch"] < 29
    assert "the end, after" in capsys.readouterr().out


def test_plain_python_learns_and_has_nothing_left_to_do_when_it_is_started_again(tmp_path):
    accuracy = defined_in("plain_python")["main"](str(tmp_path), epochs=5)

    assert accuracy > 0.9
    assert defined_in("plain_python")["main"](str(tmp_path), epochs=5) == accuracy
    assert {row["epoch"] for row in metric_rows(tmp_path)} == set(range(5))


def test_moving_over_learns(tmp_path):
    losses = defined_in("moving_over")["main"](str(tmp_path))

    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 3  # a byte that is guessed costs 5.5


# ---- on Ray: one of its own, then one for all the others


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_gpt_tells_bits_per_byte_and_writes_a_sample(tmp_path):
    small = ("model.layers=1", "model.heads=1", "model.width=16", "model.context=32")
    command = [sys.executable, "-m", "ray_trainer", "train", str(EXAMPLES / "gpt.yaml"), *small]
    command += ["training.max_steps=3", "training.limit_val_batches=2", f"cluster.storage_path={tmp_path}"]

    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "bits per byte. A sample:" in done.stdout
    assert "def " in done.stdout.partition("A sample:")[2]
    assert "val/perplexity" in done.stdout


@pytest.mark.parametrize(
    ("example", "short", "at_least"),
    [
        ("digits", ["training.epochs=3"], 0.7),
        ("seq2seq", ["model.words=4000", "model.width=64", "training.epochs=2"], 0.4),
    ],
)
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_example_learns_on_two_workers(example, short, at_least, tmp_path, ray_of_examples):
    run_file = str(EXAMPLES / f"{example}.yaml")

    assert main(["train", run_file, *short, f"cluster.storage_path={tmp_path}"]) == 0
    assert [row for row in metric_rows(tmp_path / example) if row["split"] == "val"][-1]["accuracy"] > at_least


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_killed_worker_leaves_no_trace_in_the_weights(tmp_path, ray_of_examples, capsys):
    assert defined_in("survive_faults")["main"](str(tmp_path))
    assert "killed process" in capsys.readouterr().out
    assert metric_rows(tmp_path / "killed")[-1]["accuracy"] > 0.8


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_run_on_fewer_workers_ends_with_the_same_bits(tmp_path, ray_of_examples):
    differences = defined_in("fewer_workers")["main"](str(tmp_path))

    assert differences == dict.fromkeys(["step", "epoch", "learning_rate", "loss", "weights"], 0)
