"""TrainingConfig: rules over several settings, derived values, files, comparison."""

import json
import math

import pytest

from ray_trainer.config import TrainingConfig, compare_configs
from ray_trainer.errors import ConfigError


def test_construction_accepts_values_that_validate_refuses():
    config = TrainingConfig(learning_rate=-0.001, batch_size=0)

    with pytest.raises(ValueError, match="Configuration validation failed"):
        config.validate()


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("lr", "learning_rate"),
        ("max_epochs", "epochs"),
        ("num_epochs", "epochs"),
        ("num_train_epochs", "epochs"),
        ("gradient_clip_val", "max_grad_norm"),
        ("accumulate_grad_batches", "gradient_accumulation_steps"),
        ("per_device_train_batch_size", "batch_size"),
        ("seed", "random_seed"),
        ("output_dir", "checkpoint_dir"),
        ("save_total_limit", "keep_last_n"),
        ("num_warmup_steps", "warmup_steps"),
        ("check_val_every_n_epoch", "validate_every_n_epochs"),
        ("logging_steps", "log_every_n_steps"),
    ],
)
def test_name_of_another_trainer_is_refused_with_ours(theirs, ours):
    with pytest.raises(ConfigError, match=f"did you mean '{ours}'"):
        TrainingConfig(**{theirs: 1})


def test_settings_of_the_cluster_and_the_model_are_sent_there():
    with pytest.raises(ConfigError, match="cluster"):
        TrainingConfig(devices=2)
    with pytest.raises(ConfigError, match="model's own configuration"):
        TrainingConfig(vocab_size=100)


@pytest.mark.parametrize(
    ("values", "named", "told"),
    [
        ({"use_amp": False, "precision": "bf16-mixed"}, "use_amp", "set precision to 'fp32'"),
        ({"max_time": "00:00:00"}, "max_time", "no time at all"),
        ({"determinism": "elastic", "parallelism": "fsdp"}, "determinism", "set parallelism to 'ddp'"),
        ({"determinism": "elastic", "limit_val_batches": 2}, "determinism", "together with limit_val_batches"),
        ({"monitor": "val_accuracy"}, "mode", "set mode to 'max'"),
        ({"monitor": "train_loss", "mode": "max"}, "mode", "set mode to 'min'"),
        (
            {"early_stopping_patience": 2, "validate_every_n_epochs": None},
            "early_stopping_patience",
            "validation is off",
        ),
        ({"lr_scheduler_type": "wsd", "warmup_ratio": 0.5, "decay_ratio": 0.6}, "decay_ratio", "at most 1"),
    ],
)
def test_settings_that_contradict_each_other_are_told(values, named, told):
    with pytest.raises(ConfigError, match=rf"- {named} = .*{told}"):
        TrainingConfig(**values).validate()


@pytest.mark.parametrize(
    "values",
    [
        {"use_amp": False},
        {"use_amp": True, "precision": "fp16-mixed"},
        {"monitor": "val_accuracy", "mode": "max"},
        {"monitor": "val_reward", "mode": "max"},
        {"early_stopping_patience": 1, "validate_every_n_epochs": None, "validate_every_n_steps": 5},
        {"early_stopping_patience": 1, "validate_every_n_epochs": None, "monitor": "train_loss"},
        {"lr_scheduler_type": "wsd", "warmup_ratio": 0.5, "decay_ratio": 0.6, "warmup_steps": 3},
        {"lr_scheduler_type": "cosine", "warmup_ratio": 0.5, "decay_ratio": 0.6},
        {"learning_rate": 1, "warmup_steps": 0, "save_every_n_epochs": None, "keep_best_k": 0},
        {"validation_split": 0.5, "max_grad_norm": None, "betas": (0, 0.0)},
    ],
)
def test_settings_that_agree_are_accepted(values):
    assert TrainingConfig(**values).validate() is True


def test_rule_is_silent_while_one_of_its_settings_is_wrong_by_itself():
    with pytest.raises(ConfigError) as caught:
        TrainingConfig(use_amp=False, precision="half").validate()

    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("00:00:30", 30),
        ("01:30:00", 5400),
        ("2:00:00", 7200),
        ("72:00:00", 259200),
        ("01:02:03:04", 93784),
        (90, 90),
    ],
)
def test_max_time_is_read_in_seconds(text, seconds):
    config = TrainingConfig(max_time=text)

    assert config.validate()
    assert config.max_time_s == seconds


def test_without_a_time_limit_there_are_no_seconds():
    assert TrainingConfig().max_time_s is None


@pytest.mark.parametrize(
    ("precision", "use_amp", "dtype"),
    [
        ("fp32", None, None),
        ("fp32", False, None),
        ("fp32", True, "bfloat16"),
        ("bf16-mixed", None, "bfloat16"),
        ("fp16-mixed", None, "float16"),
        ("fp16-mixed", True, "float16"),
    ],
)
def test_autocast_dtype_follows_precision_and_use_amp(precision, use_amp, dtype):
    assert TrainingConfig(precision=precision, use_amp=use_amp).autocast_dtype == dtype


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json"])
def test_saved_config_loads_equal(tmp_path, suffix):
    config = TrainingConfig(
        learning_rate=3e-4,
        max_time="01:30:00",
        betas=(0.5, 0.75),
        run_name="1e5",
        notes="no\n- ü: #",
        use_amp=True,
    )
    path = config.save(tmp_path / "new" / f"config{suffix}")

    assert TrainingConfig.load(path) == config


def test_loading_a_missing_file_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.yaml"):
        TrainingConfig.load(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.json", '{"epochs": 3,\n oops', "Invalid JSON in .*a.json, line 2"),
        ("a.json", '{"epochs": 3, "epochs": 4}', "a.json: 'epochs' stands twice"),
        ("a.json", "null", "a.json holds a NoneType"),
        ("a.yaml", "epochs: 3\nbetas: [1", "Invalid YAML in .*a.yaml, line"),
        ("a.yaml", "epochs: 3\nepochs: 4", "a.yaml, line 2: 'epochs' stands twice"),
        ("a.yaml", "- 3", "a.yaml holds a list"),
        ("a.yaml", "lr: 3\nepochs: x", "a.yaml:(?s:.)*'learning_rate'(?s:.)*epochs = 'x'"),
        ("a.toml", "epochs = 3", "a.toml has the suffix '.toml'"),
    ],
)
def test_malformed_file_is_refused_with_its_name_and_line(tmp_path, name, text, told):
    (tmp_path / name).write_text(text)

    with pytest.raises(ConfigError, match=told):
        TrainingConfig.load(tmp_path / name)


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    with pytest.raises(ConfigError, match="learning_rate = nan"):
        TrainingConfig(learning_rate=math.nan).save(tmp_path / "config.json")

    assert list(tmp_path.iterdir()) == []


def test_json_holds_every_setting(tmp_path):
    path = TrainingConfig().save(tmp_path / "config.json")

    assert json.loads(path.read_text()).keys() == TrainingConfig().to_dict().keys()


def test_comparison_tells_what_changed_but_for_the_run_name():
    old, new = TrainingConfig(), TrainingConfig(learning_rate=1e-3, run_name="b")

    assert compare_configs(old, new) == {
        "changed": {"learning_rate": (5e-5, 1e-3)},
        "added": {},
        "removed": {},
    }


def test_comparison_with_settings_of_another_version_tells_what_came_and_went():
    assert compare_configs({"epochs": 3, "gone": 1}, {"epochs": 3, "came": 2}) == {
        "changed": {},
        "added": {"came": 2},
        "removed": {"gone": 1},
    }
