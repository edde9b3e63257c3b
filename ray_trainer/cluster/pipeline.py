"""Running the pipeline of a Ray Dataset: in order, and with errors that say what happened in it."""

from collections.abc import Iterator
from contextlib import contextmanager

import ray.data
from ray.exceptions import RayError, RayTaskError

from ray_trainer.errors import DataError


@contextmanager
def order_preserved(dataset: "ray.data.Dataset") -> Iterator[None]:
    """Rows come out in the order of their source; Ray gives them as they are ready otherwise."""
    options = dataset.context.execution_options
    before = options.preserve_order
    options.preserve_order = True
    try:
        yield
    finally:
        options.preserve_order = before


def explained(error: RayError) -> DataError:
    """What a pipeline raised, out of what Ray has put around it."""
    if not isinstance(error, RayTaskError):
        return DataError(f"The Ray Dataset cannot be read: {type(error).__name__}: {error}")
    if isinstance(error.cause, DataError):
        return error.cause
    # Ray wraps what the user's code raised, and keeps the original in its traceback only
    what = _raised(str(error).split("\nThe above exception")[0]) or str(error.cause)
    return DataError(f"The pipeline of the Ray Dataset failed with {what}\n\n{error}")


def _raised(traceback: str) -> str:
    """The line of a traceback that names the error: the one after the last frame, before any notes."""
    lines = traceback.strip().splitlines()
    frames = [place for place, line in enumerate(lines) if line.startswith("  File ")]
    after = [line for line in lines[frames[-1] + 1 :] if not line.startswith(" ")] if frames else lines[-1:]
    return after[0] if after else ""
