"""Replicas that differ: in which tensors, in which of their elements, and who is wrong."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch import distributed as dist

from ray_trainer import distributed
from ray_trainer.checkpoint.digests import as_bytes

#: A state that is so much closer to what would have been right than another one makes the other the wrong one.
_CLEARLY = 0.5


@dataclass(frozen=True)
class Suspicion:
    """What was found when replicas were not equal.

    Attributes:
        step: after which.
        names: of the tensors that differ.
        wrong: the ranks that a majority is against; empty where there is no majority.
        places: where each of the tensors differs, flat.
        mine: this rank's values there.
    """

    step: int
    names: list[str]
    wrong: list[int]
    places: dict[str, Tensor]
    mine: dict[str, Tensor]

    @classmethod
    def of(cls, step: int, tensors: Mapping[str, Tensor], names: list[str], wrong: list[int]) -> "Suspicion":
        """Compare the tensors that differ element by element. Collective.

        Args:
            step: after which.
            tensors: of this rank.
            names: which differ; some may be there on some ranks only, and are not looked into.
            wrong: what a majority says.
        """
        shapes = distributed.gather_objects({name: _kind(tensors[name]) for name in names if name in tensors})
        shared = [name for name in names if all(name in kinds and kinds[name] == shapes[0][name] for kinds in shapes)]
        places = {name: _places_of_differences(tensors[name]) for name in shared}
        mine = {name: tensors[name].detach().reshape(-1).cpu()[places[name]] for name in shared}
        return cls(step, names, wrong, places, mine)

    def without(self, names: Collection[str]) -> "Suspicion | None":
        """Without some of the tensors; None where none is left."""
        left = [name for name in self.names if name not in names]
        places = {name: self.places[name] for name in left if name in self.places}
        mine = {name: self.mine[name] for name in places}
        return replace(self, names=left, places=places, mine=mine) if left else None

    def compared(self, right: Mapping[str, Tensor]) -> list[int]:
        """Who was wrong, in view of what would have been right. Collective.

        What one rank had wrong reached the gradients of all, so nobody may have been right to the bit; but the
        one whose values are off where they differ at all is.

        Returns:
            The ranks; none where it does not show clearly.
        """
        distance = 0.0
        for name, values in self.mine.items():
            if name in right and right[name].numel() > int(self.places[name].max()):
                expected = right[name].detach().reshape(-1).cpu()[self.places[name]]
                distance += float((values.double() - expected.double()).abs().nan_to_num(torch.inf).sum())
        distances = distributed.gather_objects(distance)
        least = min(distances)
        return [rank for rank, other in enumerate(distances) if least < _CLEARLY * other]


def differing(everybody: Sequence[Mapping[str, int]]) -> list[str]:
    """The names whose digests are not equal on all ranks, or are not there on all."""
    names = dict.fromkeys(name for found in everybody for name in found)
    return [name for name in names if len({found.get(name) for found in everybody}) > 1]


def majority(rows: Sequence[Sequence[float]]) -> list[int]:
    """The ranks whose digest is not that of more than half of them; none where no digest is."""
    (most, count), *_ = Counter(tuple(row) for row in rows).most_common(1)
    return [rank for rank, row in enumerate(rows) if tuple(row) != most] if 2 * count > len(rows) else []


def _kind(tensor: Tensor) -> tuple[tuple[int, ...], str]:
    return tuple(tensor.shape), str(tensor.dtype)


def _places_of_differences(tensor: Tensor) -> Tensor:
    """Indices of the elements that are not equal on all ranks. Collective."""
    mine = as_bytes(tensor).cpu()
    theirs = [torch.empty_like(mine) for _ in range(distributed.world_size())]
    dist.all_gather(theirs, mine)
    differs = torch.stack([other != theirs[0] for other in theirs]).any(dim=0)
    return differs.view(-1, tensor.element_size()).any(dim=1).nonzero().flatten()
