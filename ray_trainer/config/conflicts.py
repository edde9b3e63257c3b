"""Settings of a training that contradict each other: each function says what is wrong and what to do, or None."""

from typing import Any


def no_time(config: Any) -> str | None:
    """`max_time` leaves none."""
    if config.max_time_s == 0:
        return "no time at all; write a longer one, or leave it out to train without a limit"
    return None


def amp_contradicts(config: Any) -> str | None:
    """`use_amp` and `precision` say different things."""
    if config.use_amp is False and config.precision != "fp32":
        return f"contradicts precision = {config.precision!r}; leave use_amp out, or set precision to 'fp32'"
    return None


def compiles_shards(config: Any) -> str | None:
    """What `compile_mode` cannot do."""
    if config.compile_mode is not None and config.parallelism == "fsdp":
        return "does not go together with parallelism = 'fsdp'; leave one of them out"
    return None


def no_replicas(config: Any) -> str | None:
    """What shards cannot do."""
    if config.compare_replicas_every_n_steps is not None and config.parallelism == "fsdp":
        return "has nothing to compare with parallelism = 'fsdp', where no two workers have the same; leave it out"
    return None


def not_elastic(config: Any) -> str | None:
    """What depends on the number of workers."""
    if config.determinism != "elastic":
        return None
    if config.parallelism == "fsdp":
        return "= 'elastic' needs the whole model on each worker; set parallelism to 'ddp', or leave determinism out"
    limits = [name for name in ("limit_train_batches", "limit_val_batches") if getattr(config, name) is not None]
    if limits:
        return f"= 'elastic' does not go together with {' and '.join(limits)}, of which each worker takes its own part"
    return None


def wrong_mode(config: Any) -> str | None:
    """The worst would be taken for the best."""
    quantity = config.monitor.replace("/", "_").rpartition("_")[2]
    better = {"loss": "min", "perplexity": "min", "accuracy": "max"}.get(quantity, config.mode)
    if config.mode != better:
        return f"takes the worst for the best, since monitor is {config.monitor!r}; set mode to {better!r}"
    return None


def never_validates(config: Any) -> str | None:
    """Early stopping has nothing to look at."""
    validates = config.validate_every_n_epochs or config.validate_every_n_steps
    if config.early_stopping_patience and not validates and config.monitor.startswith("val"):
        return (
            f"never stops anything, since monitor is {config.monitor!r} and validation is off; "
            "set validate_every_n_epochs or validate_every_n_steps"
        )
    return None


def phases_overlap(config: Any) -> str | None:
    """Warm-up and decay do not fit into one run."""
    warmup = config.warmup_ratio if config.warmup_steps is None else 0.0
    if config.lr_scheduler_type == "wsd" and warmup + config.decay_ratio > 1:
        return f"and warmup_ratio = {warmup} are together more than the whole run; their sum must be at most 1"
    return None
