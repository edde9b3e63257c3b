"""Values that each field of each section must refuse: (of a wrong type, out of bounds)."""

import dataclasses
import math

from ray_trainer.cli.runfile import RunFile
from ray_trainer.cluster.config import ClusterConfig
from ray_trainer.cluster.sweep_config import SweepConfig
from ray_trainer.config import TrainingConfig
from ray_trainer.config.schema import Section

COUNT = ([True, 2.5, 2.0, "3", math.nan, (1,)], [0, -1])
COUNT_OR_ZERO = ([True, 2.5, "3", None], [-1])
OPTIONAL_COUNT = ([True, 2.5, "3", math.inf], [0, -1])
POSITIVE = ([True, "3e-4", math.nan, math.inf, None], [0, -1.0])
OPTIONAL_POSITIVE = ([True, "1", math.nan, math.inf], [0.0, -1])
NOT_NEGATIVE = ([False, "0.1", math.nan, None], [-1e-9])
RATIO = ([True, "0.1", math.nan, None], [-0.1, 1.1, 10])
FLAG = ([0, 1, "true", None], [])
OPTIONAL_FLAG = ([0, 1, "yes"], [])
CHOICE = ([True, 3, None], ["no such choice", ""])
TEXT = ([3, True, None], [""])

CASES: dict[type[Section], dict[str, tuple[list[object], list[object]]]] = {
    TrainingConfig: {
        **dict.fromkeys(
            [
                "epochs",
                "batch_size",
                "gradient_accumulation_steps",
                "keep_last_n",
                "max_consecutive_bad_steps",
                "rollback_points_every_n_steps",
                "num_rollback_points",
                "max_rollbacks",
                "max_failed_saves",
                "log_every_n_steps",
            ],
            COUNT,
        ),
        **dict.fromkeys(
            [
                "max_steps",
                "global_batch_size",
                "limit_train_batches",
                "limit_val_batches",
                "validate_every_n_epochs",
                "validate_every_n_steps",
                "early_stopping_patience",
                "compare_replicas_every_n_steps",
                "save_every_n_epochs",
                "save_every_n_steps",
            ],
            OPTIONAL_COUNT,
        ),
        **dict.fromkeys(["num_loader_workers", "keep_best_k"], COUNT_OR_ZERO),
        "warmup_steps": ([True, 0.5, "3"], [-1]),
        "max_time": ([True, math.nan, [1]], [0, -1.0, "90", "1:2", "00:60:00", "1:24:00:00", "-1:00:00"]),
        **dict.fromkeys(["learning_rate", "spike_threshold"], POSITIVE),
        "spike_window": ([True, 2.5, "100", None], [0, 7]),
        "on_spike": ([True, 3], ["ignore", ""]),
        **dict.fromkeys(["weight_decay", "early_stopping_min_delta"], NOT_NEGATIVE),
        "betas": ([0.9, "0.9", (0.9,), (0.9, 0.9, 0.9), (True, 0.9), None], [(0.9, 1.0), (-0.1, 0.9)]),
        "momentum": ([True, "0.9", None], [1, -0.1]),
        **dict.fromkeys(["max_grad_norm", "gradient_explosion_threshold", "save_every_minutes"], OPTIONAL_POSITIVE),
        **dict.fromkeys(["warmup_ratio", "decay_ratio", "min_lr_ratio", "max_bad_ratio"], RATIO),
        "validation_split": ([True, "0.1", math.nan, None], [-0.1, 0.51]),
        **dict.fromkeys(
            [
                "optimizer",
                "lr_scheduler_type",
                "precision",
                "mode",
                "on_data_change",
                "on_bad_data",
                "on_bad_gradients",
                "on_out_of_memory",
                "overlapping_saves",
                "parallelism",
                "determinism",
            ],
            CHOICE,
        ),
        "save_interval": ([True, 3], ["often", ""]),
        "save_budget": ([True, "0.1", math.nan, None], [0, -0.1, 1.1]),
        "compile_mode": ([True, 3], ["fast", ""]),
        **dict.fromkeys(["use_amp", "compile_dynamic"], OPTIONAL_FLAG),
        **dict.fromkeys(
            [
                "compile_fullgraph",
                "deterministic",
                "shuffle",
                "drop_last",
                "fast_dev_run",
                "tensorboard",
                "init_partial",
            ],
            FLAG,
        ),
        "random_seed": ([True, 1.5, "42", None], [-1, 2**32]),
        **dict.fromkeys(["monitor", "checkpoint_dir"], TEXT),
        **dict.fromkeys(["run_name", "init_from"], ([3, True], [""])),
        "notes": ([3, None], []),
    },
    ClusterConfig: {
        "num_workers": ([True, "2", 2.5, (1,), (1, 2, 3), None], [0, -1, (0, 2), (3, 2)]),
        "use_gpu": FLAG,
        "resources_per_worker": (
            [2, ["CPU"], {"CPU": "2"}, {1: 2}],
            [{"CPU": -1}, {"cpu": 1}, {"GPU": 1}, {"": 1}],
        ),
        "name": (
            [3, True],
            ["", ".", "..", ".hidden", "a/b", "a\\b", "a b ", " a", "a\nb", "a?b", "x" * 201],
        ),
        "storage_path": TEXT,
        "max_failures": ([True, 1.5, "3", None], [-2]),
        "address": ([3, True], ["", "here", "ray://head:10001", "http://head:8265", "head:", "head:port"]),
        "placement_strategy": CHOICE,
        "torch_threads_per_worker": OPTIONAL_COUNT,
        "snapshot_every_n_steps": OPTIONAL_COUNT,
        "in_job_recovery": FLAG,
        "spare_workers": COUNT_OR_ZERO,
        "collective_timeout_s": POSITIVE,
        "hang_floor_s": OPTIONAL_POSITIVE,
    },
    RunFile: {
        "experiment": ([3, None], ["", "digits.py", "digits.py:", ":experiment", "a:b:c", "digits.py:1a"]),
        "model": ([3, "a", None, ["a"]], []),
        "training": ([3, "a", None, ["a"]], []),
        "cluster": ([3, "a", None, ["a"]], []),
        "sweep": ([3, "a", None, ["a"]], []),
    },
    SweepConfig: {
        "space": (
            [3, "a", None, ["a"]],
            [
                {"learning_rate": {"uniform": [0, 1]}},
                {"model.width": {"choise": [1]}},
                {"model.width": {"choice": []}},
                {"model.width": {"choice": [1], "grid": [1]}},
            ],
        ),
        **dict.fromkeys(["search", "scheduler"], CHOICE),
        "mode": ([True, 3], ["no such choice", ""]),
        **dict.fromkeys(["num_samples", "grace_period", "min_trials", "perturbation_interval"], COUNT),
        "metric": ([3, True], [""]),
        "reduction_factor": ([True, "3", math.nan, None], [1, 0.5]),
        "quantile_fraction": ([True, "0.1", math.nan, None], [0, 0.51]),
        "resample_probability": RATIO,
        "max_concurrent_trials": OPTIONAL_COUNT,
        "time_budget": ([True, math.nan, [1]], [0, -1.0, "90", "1:2", "00:60:00"]),
        "seed": COUNT_OR_ZERO,
    },
}
REQUIRED = {RunFile: {"experiment": "digits.py:experiment"}}
FIELDS = [(section, field.name) for section in CASES for field in dataclasses.fields(section)]
