"""Doing something on all ranks so that either all of them go on, or all raise the same error."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from ray_trainer import distributed
from ray_trainer.errors import CheckpointError

T = TypeVar("T")


class _Failure(NamedTuple):
    kind: type[CheckpointError]
    message: str


def on_all_ranks(action: Callable[[], T]) -> list[T]:
    """Run an action on every rank and share the results. Collective.

    Args:
        action: calls no collectives; its result is plain.

    Returns:
        The results in rank order.

    Raises:
        CheckpointError: on every rank, if it failed on any; of the first failure's type if that is one.
    """
    result: T | None = None
    failure, cause = None, None
    try:
        result = action()
    except Exception as error:  # raised below, on all ranks: the others would wait for ever
        failure, cause = _describe(error), error
    outcomes = distributed.gather_objects((result, failure))
    failures = [(rank, failed) for rank, (_, failed) in enumerate(outcomes) if failed]
    if failures:
        if isinstance(cause, CheckpointError) and len(outcomes) == 1:
            cause.on_all_ranks = True
            raise cause
        agreed = failures[0][1].kind(_message(failures))
        agreed.on_all_ranks = True
        raise agreed from cause
    return [value for value, _ in outcomes]  # type: ignore[misc] # None only where there is a failure


def on_rank_zero(action: Callable[[], T]) -> T:
    """As `on_all_ranks`, but only rank 0 acts, and all get its result. Collective."""
    results = on_all_ranks(action if distributed.rank() == 0 else lambda: None)
    return results[0]  # type: ignore[return-value] # that of the action


def _describe(error: Exception) -> _Failure:
    if isinstance(error, CheckpointError):
        return _Failure(type(error), str(error))
    message = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    return _Failure(CheckpointError, message)


def _message(failures: list[tuple[int, _Failure]]) -> str:
    if distributed.world_size() == 1:
        return failures[0][1].message
    return "\n".join(f"rank {rank}: {failure.message}" for rank, failure in failures)
