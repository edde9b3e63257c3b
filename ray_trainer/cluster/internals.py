"""What this package uses of Ray Train though Ray keeps it for itself: looked for before it is used.

Another version of Ray may have it elsewhere. What rests on it is then left out, and the rest works.
"""

import inspect
import logging
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup

logger = logging.getLogger(__name__)

T = TypeVar("T")

try:
    from ray.train.v2._internal.execution.callback import ControllerCallback as ControllerCallback
    from ray.train.v2._internal.execution.callback import WorkerCallback as WorkerCallback
    from ray.train.v2._internal.execution.callback import WorkerGroupCallback as WorkerGroupCallback
except ImportError:  # nothing that derives from them is made then
    ControllerCallback, WorkerCallback, WorkerGroupCallback = (type("Missing", (), {}) for _ in range(3))

#: An owner, the name of its function, and how many arguments it is called with.
Call = tuple[Any, str, int]


def unless_missing(missing: str | None, consequence: str, make: Callable[[], T]) -> list[T]:
    """What is made, if this Ray has what it rests on; else nothing, and the user is told what comes of that.

    Args:
        missing: what is not there.
        consequence: of it, as a clause.
        make: only called if nothing is missing.
    """
    if missing is None:
        return [make()]
    logger.warning("%s, because of another version of Ray: %s.", consequence, missing)
    return []


def missing_groups() -> str | None:
    """What this Ray lacks of what tells in which placement group the workers are; None if nothing."""
    try:
        from ray.train.v2._internal.execution.worker_group import WorkerGroup
        from ray.train.v2._internal.execution.worker_group.placement_group_handle import PlacementGroupHandle
        from ray.train.v2._internal.execution.worker_group.state import WorkerGroupState
    except ImportError as error:
        return str(error)
    for owner, name in ((WorkerGroupState, "placement_group_handle"), (PlacementGroupHandle, "placement_group")):
        if name not in owner.__annotations__ and not hasattr(owner, name):
            return f"{owner.__name__} has no {name}"
    calls = ((WorkerGroupCallback, "after_worker_group_start", 1), (WorkerGroup, "get_worker_group_state", 0))
    return missing_call(calls)


def missing_creators() -> str | None:
    """What this Ray lacks of what `groups_created_by` rests on; None if nothing."""
    try:
        from ray._private.state import GlobalState
        from ray.core.generated.gcs_pb2 import PlacementGroupTableData
    except ImportError as error:
        return str(error)
    if "creator_actor_id" not in PlacementGroupTableData.DESCRIPTOR.fields_by_name:
        return "PlacementGroupTableData has no creator_actor_id"
    return missing_call([(GlobalState, "_connect_and_get_accessor", 0)])


def groups_created_by(actor: ActorHandle) -> list[PlacementGroup]:
    """The placement groups of an actor, whether they are placed or not; public is only whose job they are."""
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData

    accessor = state._connect_and_get_accessor()
    found = map(PlacementGroupTableData.FromString, accessor.get_placement_group_table())
    creator = actor._actor_id.binary()
    ids = (group.placement_group_id for group in found if group.creator_actor_id == creator)
    return [PlacementGroup(ray.PlacementGroupID(group)) for group in ids]


def missing_call(calls: Iterable[Call]) -> str | None:
    """The first method that is not there, or is called otherwise; None if all are as expected."""
    for owner, name, count in calls:
        method = getattr(owner, name, None)
        if not inspect.isfunction(method):
            return f"{owner.__name__} has no {name}"
        try:
            inspect.signature(method).bind(*range(1 + count))
        except TypeError:
            return f"{owner.__name__}.{name} can't be called with {count} arguments"
    return None


def mentions(function: Any, name: str) -> bool:
    """Whether a function written in Python gets, sets or calls an attribute of this name."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code is not None and name in code.co_names
