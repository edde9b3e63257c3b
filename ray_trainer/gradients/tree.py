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
    same to the bit for any number of ranks, as with the virtual workers of EasyScale (Li et al., SC'23). Every rank
    gets the whole subtrees of all others, which is as much as in a ring for two ranks, twice as much for four and so
    on, and it does so when its backward passes are done.

    Args:
        model: whose parameters have gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parameters: list[nn.Parameter] = []
        self._buckets: list[_Bucket] = []
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
        if not self._sums:
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
        if not self._sums:  # this rank had nothing to take
            self._find_parameters()
        used = [True] * len(self._parameters) if have_all else self._used_anywhere()
        nodes = [_nodes_over(of_rank) for of_rank in places]
        root = (max(max(of_rank) for of_rank in places if of_rank).bit_length(), 0)
        for bucket in self._buckets:
            total = _sum(root, bucket.gather(self._sums, nodes))
            assert total is not None  # there are leaves
            for index, gradient in zip(bucket.members, bucket.keep(total), strict=True):
                self._parameters[index].grad = gradient if used[index] else None
        self.discard()

    def discard(self) -> None:
        """Forget what was taken."""
        self._used, self._sums = [], {}

    def _find_parameters(self) -> None:
        parameters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        if list(map(id, parameters)) != list(map(id, self._parameters)):
            self._parameters, self._buckets = parameters, _buckets_of(parameters)
        self._used = [False] * len(parameters)

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


class _Bucket:
    """Parameters whose gradients are exchanged together, and memory for that which is used in each step.

    Args:
        members: their places among all parameters.
        parameters: all of one type, on one device.
    """

    def __init__(self, members: list[int], parameters: list[nn.Parameter]) -> None:
        self.members = members
        self._shapes = [parameter.shape for parameter in parameters]
        self._sizes = [parameter.numel() for parameter in parameters]
        self._sum = parameters[0].new_empty(sum(self._sizes))
        self._rows = self._sum.new_empty(0, len(self._sum))
        self._gathered: list[Tensor] = []

    def gather(self, sums: dict[Node, list[Tensor]], nodes: list[list[Node]]) -> dict[Node, list[Tensor]]:
        """What each rank has added up. Collective; on one rank the tensors as they are, else joined to one."""
        mine = {node: [gradients[index] for index in self.members] for node, gradients in sums.items()}
        if distributed.world_size() == 1:
            return mine
        most = max(map(len, nodes))
        if len(self._rows) != most:
            self._rows = self._sum.new_zeros(most, len(self._sum))
            self._gathered = [torch.zeros_like(self._rows) for _ in nodes]
        for row, node in zip(self._rows, nodes[distributed.rank()], strict=False):
            torch.cat([gradient.reshape(-1) for gradient in mine[node]], out=row)
        distributed.gather_into(self._gathered, self._rows)
        return {
            node: [row]
            for rows_of_rank, nodes_of_rank in zip(self._gathered, nodes, strict=True)
            for node, row in zip(nodes_of_rank, rows_of_rank, strict=False)
        }

    def keep(self, total: list[Tensor]) -> list[Tensor]:
        """The gradient of each member, until the next step."""
        torch.cat([part.reshape(-1) for part in total], out=self._sum)
        return [part.view(shape) for part, shape in zip(torch.split(self._sum, self._sizes), self._shapes, strict=True)]


def _buckets_of(parameters: list[nn.Parameter]) -> list[_Bucket]:
    """In the order of the parameters: each of one kind, and of not too many bytes."""
    members: list[list[int]] = []
    size_bytes, kind = 0, None
    for index, parameter in enumerate(parameters):
        if size_bytes >= _BUCKET_BYTES or kind != (parameter.device, parameter.dtype):
            members.append([])
            size_bytes, kind = 0, (parameter.device, parameter.dtype)
        members[-1].append(index)
        size_bytes += parameter.numel() * parameter.element_size()
    return [_Bucket(each, [parameters[index] for index in each]) for each in members]


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


def _sum(node: Node, sums: dict[Node, list[Tensor]]) -> list[Tensor] | None:
    """The sum over a node's leaves, of which some or all may be missing; changes what it is made of."""
    if node in sums or node[0] == 0:
        return sums.get(node)
    height, index = node
    left, right = _sum((height - 1, 2 * index), sums), _sum((height - 1, 2 * index + 1), sums)
    if left is None or right is None:
        return right if left is None else left
    torch._foreach_add_(left, right)
    return left
