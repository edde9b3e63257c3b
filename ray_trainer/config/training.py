"""How a model is trained: `TrainingConfig`."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from ray_trainer.config import conflicts
from ray_trainer.config.documents import read_document, write_document
from ray_trainer.config.fields import (
    Count,
    CountOrZero,
    NotNegative,
    Positive,
    PositiveRatio,
    Ratio,
    RatioBelowOne,
    Text,
    described,
)
from ray_trainer.config.schema import Rule, Section, refuse
from ray_trainer.config.synonyms import TRAINING_SYNONYMS

Duration = Annotated[
    str,
    described(
        r"^([0-9]+:([01]?[0-9]|2[0-3])|[0-9]+):[0-5][0-9]:[0-5][0-9]$",
        "a time 'HH:MM:SS' or 'DD:HH:MM:SS'",
    ),
]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
ValidationRatio = Annotated[float, Field(ge=0, le=0.5)]
CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]

_LABELS = frozenset({"run_name"})  # say which run it is, not how it trains


def _seconds(text: str) -> float:
    parts = [int(part) for part in text.split(":")]
    return float(sum(part * unit for part, unit in zip(reversed(parts), (1, 60, 3600, 86400), strict=False)))


@dataclass
class TrainingConfig(Section):
    """How a model is trained; every setting has a default.

    `validate` tells everything that is wrong at once; nothing else looks at values.
    """

    epochs: Count = 10
    """Passes over the training data."""
    max_steps: Count | None = None
    """Optimizer steps after which training ends, even within an epoch. None: `epochs` decides."""
    max_time: Positive | Duration | None = None
    """Time after which training ends, in seconds or as "HH:MM:SS" or "DD:HH:MM:SS". None: no limit."""

    learning_rate: Positive = 5e-5
    """Highest learning rate, reached after the warm-up."""
    batch_size: Count = 4
    """Samples that a worker processes at once (the micro-batch); bounds the memory needed."""
    global_batch_size: Count | None = None
    """Samples of a step, over all workers. None: batch_size x gradient_accumulation_steps x workers."""
    gradient_accumulation_steps: Count = 1
    """Micro-batches of a worker whose gradients are added up before an optimizer step."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """Optimizer that is built when none is passed."""
    weight_decay: NotNegative = 0.01
    """Weight decay of the optimizer."""
    betas: tuple[RatioBelowOne, RatioBelowOne] = (0.9, 0.999)
    """Decay rates of the two moments (adamw, adam)."""
    momentum: RatioBelowOne = 0.9
    """Momentum (sgd)."""
    max_grad_norm: Positive | None = 1.0
    """L2 norm to which gradients are clipped. None: they are not clipped."""

    lr_scheduler_type: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    """Course of the learning rate after the warm-up; "wsd" stays at the top and falls at the end."""
    warmup_ratio: Ratio = 0.1
    """Part of all steps in which the learning rate rises from zero."""
    warmup_steps: CountOrZero | None = None
    """Steps in which the learning rate rises from zero. None: `warmup_ratio` decides."""
    decay_ratio: Ratio = 0.1
    """Part of all steps, at the end, in which the learning rate falls (wsd)."""
    min_lr_ratio: Ratio = 0.0
    """Learning rate at the end, as a part of `learning_rate`."""

    precision: Literal["fp32", "bf16-mixed", "fp16-mixed"] = "fp32"
    """Number format of the forward pass; weights stay in 32 bits."""
    use_amp: bool | None = None
    """True: mixed precision, bf16 unless `precision` says fp16. None: `precision` decides."""
    parallelism: Literal["ddp", "fsdp"] = "ddp"
    """What several workers keep: each the whole model (ddp), or a shard of model and optimizer (fsdp)."""
    compile_mode: CompileMode | None = None
    """Mode of torch.compile. None: the model is not compiled."""
    compile_fullgraph: bool = False
    """Whether torch.compile must fail where it cannot compile the model as one graph."""
    compile_dynamic: bool | None = None
    """Whether torch.compile expects changing shapes. None: it finds out."""

    random_seed: Seed = 42
    """Start of all randomness: weights, order of samples, dropout, augmentation."""
    deterministic: bool = False
    """Whether torch must use deterministic algorithms and fail where it has none."""

    determinism: Literal["world", "elastic"] = "world"
    """For what the result of a run is the same to the last bit: "world": the same number of workers; "elastic": any
    number, because micro-batches are dealt out whole and added up in one order. That exchanges gradients only after
    the backward pass, and keeps at most global_batch_size / batch_size workers busy. Workers do not wait for one that
    is replaced: they train on with fewer."""
    shuffle: bool = True
    """Whether each epoch has an order of its own, drawn from `random_seed`."""
    drop_last: bool = False
    """Whether an incomplete last global batch of an epoch is left out."""
    num_loader_workers: CountOrZero = 0
    """Processes that load data for each worker. 0: the worker loads it itself."""
    validation_split: ValidationRatio = 0.0
    """Part of the training data that is held out for validation when no validation data is given."""
    on_data_change: Literal["refuse", "restart_epoch", "continue"] = "refuse"
    """What a run does if its training data has changed: "restart_epoch" begins the epoch in progress again with
    the new data, "continue" goes on at the same place of its new order."""
    on_bad_data: Literal["refuse", "quarantine", "keep"] = "refuse"
    """What is done with rows that hold NaN, infinity or a missing number, and with files that cannot be read:
    "quarantine" leaves them out, and so it does with samples at which training has failed twice; "keep" does not
    look."""
    max_bad_ratio: Ratio = 0.01
    """Part of the rows, or of the files, above which bad ones are refused rather than left out."""
    limit_train_batches: Count | None = None
    """Micro-batches of training that a worker processes in an epoch at most. None: all."""
    limit_val_batches: Count | None = None
    """Micro-batches that a worker processes in a validation at most. None: all."""
    fast_dev_run: bool = False
    """Whether to try everything once, on one batch, to see that it works."""

    validate_every_n_epochs: Count | None = 1
    """Epochs between validations. None: not by epochs."""
    validate_every_n_steps: Count | None = None
    """Optimizer steps between validations. None: not by steps."""
    early_stopping_patience: Count | None = None
    """Validations in a row without improvement after which training ends. None: never."""
    early_stopping_min_delta: NotNegative = 0.0
    """Change of the monitored metric that counts as an improvement must exceed this."""
    monitor: Text = "val_loss"
    """Metric that decides which checkpoint is best and when to stop early."""
    mode: Literal["min", "max"] = "min"
    """Whether a small or a large value of `monitor` is better."""

    init_from: Text | None = None
    """Checkpoint or run, path or URI, whose weights a new run starts with. None: those that the model has."""
    init_partial: bool = False
    """Whether `init_from` may fit the model in part only; what does not fit is told and left as it is."""
    checkpoint_dir: Text = "checkpoints"
    """Directory, or URI, of the checkpoints; a run on a cluster uses its own run directory instead."""
    save_every_n_epochs: Count | None = 1
    """Epochs between checkpoints. None: not by epochs."""
    save_every_n_steps: Count | None = None
    """Optimizer steps between checkpoints. None: not by steps."""
    save_every_minutes: Positive | None = None
    """Minutes between checkpoints. None: not by time."""
    save_interval: Literal["auto"] | None = None
    """Time between checkpoints; "auto": as `save_budget` allows, or by the rate of failures once there are any.
    None: the other intervals decide alone."""
    save_budget: PositiveRatio = 0.01
    """Part of the time of training that checkpoints may cost where `save_interval` is "auto"."""
    overlapping_saves: Literal["skip", "wait"] = "skip"
    """What is done when a checkpoint within an epoch is due and the one before is still being written."""
    max_failed_saves: Count = 8
    """Checkpoints in a row that could not be written, after which training fails; the pause between attempts
    grows from 5 s to 5 minutes."""
    keep_last_n: Count = 5
    """Newest checkpoints that are kept."""
    keep_best_k: CountOrZero = 3
    """Best checkpoints by `monitor` that are kept besides."""

    on_bad_gradients: Literal["skip", "rollback", "raise"] = "skip"
    """What is done at a step with a loss or gradients that are NaN or infinite: "skip" leaves the weights alone,
    "rollback" also goes back to an earlier state and past the batches since then, "raise" ends the run."""
    max_consecutive_bad_steps: Count = 3
    """Steps in a row that are skipped, for bad gradients or a spike, after which training fails."""
    gradient_explosion_threshold: Positive | None = None
    """Gradient norm above which gradients are bad as well. None: any finite norm is accepted."""
    on_spike: Literal["skip", "rollback", "raise"] | None = None
    """The same for a step whose loss or gradient norm jumps above what it usually is. None: any is accepted."""
    spike_threshold: Positive = 8.0
    """How far above the median of the steps before counts as a spike, in robust standard deviations (1.48 times
    the median absolute deviation, but at least 5 % of the median)."""
    spike_window: Annotated[int, Field(ge=8)] = 100
    """Accepted steps that a step is compared with; before there are so many, nothing is a spike."""
    rollback_points_every_n_steps: Count = 100
    """Steps between states that are kept in memory to go back to, where anything is set to "rollback"."""
    num_rollback_points: Count = 2
    """How many of those states are kept, the newest ones; each is as large as model and optimizer."""
    max_rollbacks: Count = 3
    """Rollbacks without a new state to go back to in between, after which training fails."""
    on_out_of_memory: Literal["raise", "halve"] = "raise"
    """What is done when memory does not suffice for a step: "halve" processes half as many samples at once from
    then on, with the same global batch; several workers start again for that."""
    compare_replicas_every_n_steps: Count | None = None
    """Steps between comparisons of the workers' models and optimizers, which must be equal to the bit; where memory
    or a processor went wrong, the steps since the last comparison are done again. What is saved is compared as well.
    None: they are not compared. Needs memory for one more copy of model and optimizer."""

    log_every_n_steps: Count = 50
    """Optimizer steps between two lines of metrics."""
    tensorboard: bool = True
    """Whether metrics are written for TensorBoard as well."""
    run_name: Text | None = None
    """Name of the run in logs. None: none is shown."""
    notes: str = ""
    """Free text that is kept with the run."""

    other_names: ClassVar[Mapping[str, str]] = TRAINING_SYNONYMS
    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(("max_time",), conflicts.no_time),
        Rule(("use_amp", "precision"), conflicts.amp_contradicts),
        Rule(("compile_mode", "parallelism"), conflicts.compiles_shards),
        Rule(("compare_replicas_every_n_steps", "parallelism"), conflicts.no_replicas),
        Rule(("determinism", "parallelism", "limit_train_batches", "limit_val_batches"), conflicts.not_elastic),
        Rule(("mode", "monitor"), conflicts.wrong_mode),
        Rule(
            ("early_stopping_patience", "validate_every_n_epochs", "validate_every_n_steps", "monitor"),
            conflicts.never_validates,
        ),
        Rule(("decay_ratio", "warmup_ratio", "warmup_steps", "lr_scheduler_type"), conflicts.phases_overlap),
    )

    @property
    def max_time_s(self) -> float | None:
        """`max_time` in seconds."""
        return _seconds(self.max_time) if isinstance(self.max_time, str) else self.max_time

    @property
    def autocast_dtype(self) -> Literal["bfloat16", "float16"] | None:
        """Name of the torch dtype for autocast, or None without mixed precision."""
        if self.precision == "fp16-mixed":
            return "float16"
        return "bfloat16" if self.precision == "bf16-mixed" or self.use_amp else None

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the settings as YAML or JSON, as the suffix says; missing directories are made.

        Raises:
            ConfigError: a value has a type that could not be loaded again.
        """
        refuse(problem for problem in self.problems() if problem.kind == "type")
        write_document(Path(path), self.to_dict())
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read settings that `save`, or a user, wrote; settings that are left out have their defaults.

        Raises:
            FileNotFoundError: there is no such file.
            ConfigError: the file is malformed, or holds unknown settings or wrong types; names the file.
        """
        document = read_document(Path(path))
        config, problems = cls.examine(document.values)
        refuse((problem for problem in problems if problem.kind != "value"), str(path))
        return config


def compare_configs(
    old: TrainingConfig | Mapping[str, Any], new: TrainingConfig | Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Tell two configurations apart; `run_name` says nothing about the training and is passed over.

    Returns:
        "changed": setting -> (old, new); "added" and "removed": setting -> value, of those that only one has.
    """
    before, after = (
        {name: value for name, value in _as_dict(config).items() if name not in _LABELS} for config in (old, new)
    )
    both = [name for name in before if name in after]
    return {
        "changed": {name: (before[name], after[name]) for name in both if before[name] != after[name]},
        "added": {name: value for name, value in after.items() if name not in before},
        "removed": {name: value for name, value in before.items() if name not in after},
    }


def _as_dict(config: TrainingConfig | Mapping[str, Any]) -> dict[str, Any]:
    return config.to_dict() if isinstance(config, TrainingConfig) else dict(config)
