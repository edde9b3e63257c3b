"""Every error that a caller may want to handle.

::

    RayTrainerError
    ├── ConfigError (ValueError)               the configuration is wrong; lists every error
    │   └── UnknownFieldError (AttributeError) a setting that does not exist; says which was probably meant
    ├── DataError (ValueError)                 the data cannot be trained on
    ├── CheckpointError (RuntimeError)
    │   ├── CheckpointNotFoundError (FileNotFoundError)
    │   ├── CheckpointCorruptError             files are missing or differ from the manifest
    │   ├── LeaseLostError                     this run's directory belongs to another process now
    │   ├── NewerFormatError                   a later version of ray_trainer wrote it
    │   └── StateMismatchError (ValueError)    the checkpoint belongs to something else
    ├── DivergenceError (RuntimeError)         gradients or losses stopped being numbers
    ├── CorruptionError (RuntimeError)         memory or a processor fails: replicas are not equal
    ├── MemoryShortageError (MemoryError)      memory did not suffice; says what took it and what to change
    ├── LeaseHeldError (RuntimeError)          another process is at work on the run; says which
    └── RunError (RuntimeError)                a run on the cluster failed; says how to go on
        └── RepeatedFailureError               it would fail again in the same way

All of them survive pickling between processes: the message is the only argument.
"""


class RayTrainerError(Exception):
    """Root of all errors that this package raises on purpose.

    Attributes:
        on_all_ranks: every rank raises the same, so each may end in its own time and none waits for another.
    """

    on_all_ranks = False


class ConfigError(RayTrainerError, ValueError):
    """A configuration cannot be used; the message lists every error, one a line."""


class UnknownFieldError(ConfigError, AttributeError):
    """A section of the configuration has no field of that name; says which one was probably meant."""


class DataError(RayTrainerError, ValueError):
    """A dataset cannot be trained on: empty, of the wrong form, or with values out of range.

    Attributes:
        is_transient: storage could not deliver a sample at the moment, so another attempt may succeed.
    """

    is_transient = False


class CheckpointError(RayTrainerError, RuntimeError):
    """A checkpoint could not be written, read or used."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint at the place that was named."""


class CheckpointCorruptError(CheckpointError):
    """The files of a checkpoint are missing or differ from its manifest."""


class NewerFormatError(CheckpointError):
    """A later version of ray_trainer wrote this checkpoint; it may be whole, but this version can't tell."""


class StateMismatchError(CheckpointError, ValueError):
    """A checkpoint is whole, but holds the state of another model, run or set of parts."""


class LeaseLostError(CheckpointError):
    """Another process has taken over the run: this one may not write to its directory any more, and has to end."""


class LeaseHeldError(RayTrainerError, RuntimeError):
    """Another process is at work on the run; the message says which, since when, and how to take over."""


class DivergenceError(RayTrainerError, RuntimeError):
    """Training stopped because its numbers went wrong too many times in a row."""


class CorruptionError(RayTrainerError, RuntimeError):
    """Replicas of the model that must be equal are not, and stay so; the message says which."""


class MemoryShortageError(RayTrainerError, MemoryError):
    """Memory of the host or of a GPU did not suffice; the message says what took it and what to change."""


class RunError(RayTrainerError, RuntimeError):
    """A run on the cluster ended in failure; the message says why and how to go on."""


class RepeatedFailureError(RunError):
    """The same failure came again at the same place, or again and again without progress: no restart helps."""
