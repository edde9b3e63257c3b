"""The gradients of a step added up in one order, whichever rank has computed which."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ray_trainer import distributed

Node = tuple[int, int]
"""Height and index in a binary tree: it covers the leaves from ``index * 2**height`` to the next node's first."""

_BUCKET_BYTES = 32 << 20


class GradientTree:
    """Adds up the gradients of micro-batches, the leaves of one binary tree over the global batch.

    A sum of floating-point numbers depends on the order of its additions. Here it is the tree's: each rank adds up
    the subtrees of which it has all leaves, gets those of the others, and finishes the tree. So the result is the
    same to the bit for any number of ranks, as with the virtual workers of EasyScale (Li et al., SC'23). Whole
    subtrees are exchanged, half as much again as a ring would on four ranks and ever more on many, and not while the
    backward pass still runs.

    Args:
        model: whose parameters have gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parameters: list[nn.Parameter] = []
        self._used: list[bool] = []
        self._sums: dict[Node, list[Tensor]] = {}

    @property
    def has_all(self) -> bool:
        """Whether each parameter got a gradient from the micro-batches that were taken."""
        return all(self._used)

    def take(self, place: int) -> None:
        """Take the gradients of a micro-batch off the parameters.

        Args:
            place: of the micro-batch in the global batch; greater than that of the one before.
        """
        if not self._parameters:
            self._find_parameters()
        node, gradients = (0, place), list(self._leaf())
        while node[1] % 2 and (left := (node[0], node[1] - 1)) in self._sums:
            total = self._sums.pop(left)
            torch._foreach_add_(total, gradients)
            node, gradients = (node[0] + 1, node[1] // 2), total
        self._sums[node] = gradients

    def combine(self, places: Sequence[Sequence[int]], have_all: bool) -> None:
        """Leave the sum over all micro-batches of all ranks in the parameters' gradients. Collective.

        Args:
            places: those that each rank has taken, in rank order; not all empty.
            have_all: what `has_all` says on all ranks together. A parameter that got no gradient from any
                micro-batch has none afterwards.
        """
        if not self._parameters:  # this rank had nothing to take
            self._find_parameters()
        used = [True] * len(self._parameters) if have_all else self._used_anywhere()
        nodes = [_nodes_over(of_rank) for of_rank in places]
        root = (max(max(of_rank) for of_rank in places if of_rank).bit_length(), 0)
        for bucket in _buckets(self._parameters):
            total = _sum(root, self._gather(bucket, nodes))
            assert total is not None  # there are leaves
            parameters = [self._parameters[index] for index in bucket]
            parts = torch.split(total, [parameter.numel() for parameter in parameters])
            for index, parameter, part in zip(bucket, parameters, parts, strict=True):
                parameter.grad = part.view_as(parameter) if used[index] else None
        self.discard()

    def discard(self) -> None:
        """Forget what was taken."""
        self._parameters, self._used, self._sums = [], [], {}

    def _find_parameters(self) -> None:
        self._parameters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._used = [False] * len(self._parameters)

    def _leaf(self) -> Iterator[Tensor]:
        for index, parameter in enumerate(self._parameters):
            gradient, parameter.grad = parameter.grad, None
            self._used[index] |= gradient is not None
            if gradient is None:
                yield torch.zeros_like(parameter)
            else:
                yield gradient.to_dense() if gradient.is_sparse else gradient

    def _used_anywhere(self) -> list[bool]:
        mine = torch.tensor([self._used], dtype=torch.float64)
        return [bool(value) for value in distributed.gather_rows(mine).amax(dim=(0, 1)).tolist()]

    def _gather(self, bucket: list[int], nodes: list[list[Node]]) -> dict[Node, Tensor]:
        """What each rank has added up, for some of the parameters, joined to one vector a node."""
        like = self._parameters[bucket[0]]
        size = sum(self._parameters[index].numel() for index in bucket)
        rows = torch.zeros(max(map(len, nodes)), size, dtype=like.dtype, device=like.device)
        for row, node in zip(rows, nodes[distributed.rank()], strict=False):
            torch.cat([self._sums[node][index].reshape(-1) for index in bucket], out=row)
        gathered = distributed.gather_tensors(rows)
        return {
            node: row
            for rows_of_rank, nodes_of_rank in zip(gathered, nodes, strict=True)
            for node, row in zip(nodes_of_rank, rows_of_rank, strict=False)
        }


def _buckets(parameters: list[nn.Parameter]) -> list[list[int]]:
    """Places of parameters whose gradients are exchanged together: of one kind, and not too many bytes."""
    buckets: list[list[int]] = []
    size_bytes, kind = 0, None
    for index, parameter in enumerate(parameters):
        if size_bytes >= _BUCKET_BYTES or kind != (parameter.device, parameter.dtype):
            buckets.append([])
            size_bytes, kind = 0, (parameter.device, parameter.dtype)
        buckets[-1].append(index)
        size_bytes += parameter.numel() * parameter.element_size()
    return buckets


def _nodes_over(places: Sequence[int]) -> list[Node]:
    """The nodes that are left where siblings are joined, in the order of their leaves."""
    nodes: list[Node] = []
    for place in places:
        node = (0, place)
        while node[1] % 2 and nodes and nodes[-1] == (node[0], node[1] - 1):
            nodes.pop()
            node = (node[0] + 1, node[1] // 2)
        nodes.append(node)
    return nodes


def _sum(node: Node, sums: dict[Node, Tensor]) -> Tensor | None:
    """The sum over a node's leaves, of which some or all may be missing; changes what it is made of."""
    if node in sums or node[0] == 0:
        return sums.get(node)
    height, index = node
    left, right = _sum((height - 1, 2 * index), sums), _sum((height - 1, 2 * index + 1), sums)
    if left is None or right is None:
        return right if left is None else left
    return left.add_(right)
