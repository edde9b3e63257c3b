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
    innermost = str(error).split("\nThe above exception")[0].strip().splitlines()
    what = innermost[-1] if innermost else str(error.cause)
    return DataError(f"The pipeline of the Ray Dataset failed with {what}\n\n{error}")
