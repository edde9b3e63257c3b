"""The memory tier of checkpoints: snapshots in Ray's object store, owned by an actor that outlives the workers.

An object belongs to the process that put it there, and is lost with it. So the vault puts what it is sent into the
object store once more; two snapshots and one on its way are there at most, and Ray spills what does not fit.
"""

import pickle
from typing import Any, cast

import numpy as np
import ray
from numpy.typing import NDArray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_trainer.cluster.link import beside_driver
from ray_trainer.storage.snapshots import SnapshotPart

_ANSWERS_WITHIN_S = 30.0
_MOVES_WITHIN_S = 300.0

Key = tuple[int, int]


def open_keeper() -> ActorHandle:
    """Start who keeps the vault of a run, as long as this driver lives."""

    class Vault:  # in here both travel by value: their processes start without importing this package
        def __init__(self) -> None:
            self._snapshots: dict[Key, dict[int, tuple[bytes, ObjectRef[Any]]]] = {}
            self._newest: Key | None = None

        def put(self, key: Key, rank: int, num_parts: int, header: bytes, content: Any) -> None:
            """Keep a part; what it makes obsolete goes."""
            parts = self._snapshots.setdefault(key, {})
            parts[rank] = (header, ray.put(content))
            if len(parts) == num_parts:
                self._newest = key
            kept = (self._newest, key)
            self._snapshots = {key: parts for key, parts in self._snapshots.items() if key in kept}

        def newest(self) -> list[tuple[bytes, list[Any]]]:
            """Header and content of each part of the newest complete snapshot, in rank order."""
            parts = self._snapshots[self._newest] if self._newest is not None else {}
            return [(header, [content]) for _, (header, content) in sorted(parts.items())]

        def ping(self) -> None:
            """Answer."""

    class Keeper:
        def __init__(self) -> None:
            self._vault: Any = None

        def vault(self, node: str) -> Any:
            """The vault; made anew if it was lost, on another node than this one where there is one."""
            if self._vault is not None and self._is_lost():
                self._vault = None
            if self._vault is None:
                others = [other["NodeID"] for other in ray.nodes() if other["Alive"] and other["NodeID"] != node]
                place = NodeAffinitySchedulingStrategy(node_id=(others or [node])[0], soft=False)
                self._vault = ray.remote(num_cpus=0, scheduling_strategy=place)(Vault).remote()
            return self._vault

        def _is_lost(self) -> bool:
            try:
                ray.get(self._vault.ping.remote(), timeout=10)
            except ray.exceptions.RayError:
                return True
            return False

    return ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=beside_driver())(Keeper).remote()


class RayVault:
    """A worker's way to the vault: a `SnapshotStore`.

    Attributes:
        every_n_steps: see `SnapshotStore`.
    """

    def __init__(self, keeper: ActorHandle, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self._keeper = keeper
        self._vault: Any = None

    def put(self, part: SnapshotPart, content: NDArray[np.uint8]) -> None:
        """See `SnapshotStore`; the vault has copied the content when this returns."""
        header = pickle.dumps(part)
        self._ask("put", part.key, part.rank, part.num_parts, header, content, timeout_s=_MOVES_WITHIN_S)

    def newest(self) -> list[SnapshotPart] | None:
        """See `SnapshotStore`."""
        return [pickle.loads(header) for header, _ in self._ask("newest")] or None

    def content(self, part: SnapshotPart) -> NDArray[np.uint8]:
        """See `SnapshotStore`; moved to this node where it is on another one."""
        held = {pickle.loads(header).rank: (header, content) for header, [content] in self._ask("newest")}
        header, content = held.get(part.rank, (b"", None))
        if content is None or pickle.loads(header).key != part.key:
            raise ConnectionError(f"The snapshot of step {part.key[1]} is gone.")
        return cast(NDArray[np.uint8], self._got(content, _MOVES_WITHIN_S))

    def _ask(self, method: str, *arguments: Any, timeout_s: float = _ANSWERS_WITHIN_S) -> Any:
        if self._vault is None:
            node = ray.get_runtime_context().get_node_id()
            self._vault = self._got(self._keeper.vault.remote(node), _ANSWERS_WITHIN_S)
        try:
            return self._got(getattr(self._vault, method).remote(*arguments), timeout_s)
        except ConnectionError:
            self._vault = None  # found again, or made anew, next time
            raise

    def _got(self, ref: "ObjectRef[Any]", timeout_s: float) -> Any:
        try:
            return ray.get(ref, timeout=timeout_s)
        except GetTimeoutError as error:
            raise ConnectionError(f"Ray did not answer within {timeout_s:.0f} s.") from error
        except RayError as error:
            raise ConnectionError(f"{type(error).__name__}: {error}") from error
