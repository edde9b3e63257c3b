"""Ray Datasets with one exact global order.

Ray Data reads and transforms; each row then has a place, and workers gather just the rows of their steps from
the object store. Only the driver owns blocks: a worker that is restarted finds them where they were.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from ray import ObjectRef
from ray.exceptions import RayError
from torch import Tensor

from ray_trainer.cluster.packs import Column, Digest, Pack, Segment, combined, finished, taken
from ray_trainer.cluster.pipeline import explained, order_preserved
from ray_trainer.cluster.strangers import Strangers
from ray_trainer.data.description import ColumnDescription, DataDescription
from ray_trainer.data.fingerprint import fingerprint
from ray_trainer.data.order import Indices
from ray_trainer.data.quarantine import KEEP, BadDataPolicy, Finding, LeftOut, without_empty_columns
from ray_trainer.errors import DataError

MiB = 1024 * 1024

#: Up to this size a dataset is shuffled row by row. It must not depend on the cluster: the order would.
FULL_SHUFFLE_BYTES = 2048 * MiB
WINDOW_PACK_BYTES = 32 * MiB
_FULL_PACK_BYTES = 512 * MiB
_KEPT_PACKS = 20  # two windows of SampleOrder and a few more: at a border rows come from both
_PACKING_AT_ONCE = 4


@dataclass
class RayBlocks:
    """A Ray Dataset as an `IndexedDataset`. Pickle it from the driver to workers; the driver must keep it.

    Attributes:
        packs: consecutive rows each, in the object store.
        rows_per_pack: in all packs but the last.
        num_rows: altogether.
        digests: of each pack when it was made.
        is_windowed: shuffled pack by pack, because it may exceed the memory of a node.
        findings: rows that cannot be trained on, where they were searched.
        left_out: what was bad and is not among the rows.
        packs_loaded: how often a pack was opened, for tests and diagnosis.
    """

    packs: "list[ObjectRef[Pack]]"
    rows_per_pack: int
    num_rows: int
    digests: list[Digest]
    is_windowed: bool
    findings: list[Finding] = field(default_factory=list)
    left_out: LeftOut | None = None
    packs_loaded: int = 0
    _open: "OrderedDict[int, Pack]" = field(default_factory=OrderedDict, repr=False)

    reads_in_processes = False  # a forked process cannot talk to Ray, and there is nothing to decode

    def __len__(self) -> int:
        return self.num_rows

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "packs_loaded": 0}

    @property
    def block_sizes(self) -> list[int] | None:
        """Rows of each pack if it is shuffled pack by pack."""
        if not self.is_windowed:
            return None
        starts = range(0, self.num_rows, self.rows_per_pack)
        return [min(self.rows_per_pack, self.num_rows - start) for start in starts]

    def fingerprint(self) -> str:
        """See `IndexedDataset`; of the whole content, however it was divided into blocks."""
        columns = {name: [column.form, column.content] for name, column in combined(self.digests).items()}
        return fingerprint(self.num_rows, self.rows_per_pack if self.is_windowed else None, columns)

    def describe(self) -> DataDescription:
        """See `IndexedDataset`."""
        columns = {
            name: ColumnDescription(column.form, f"{column.content:016x}")
            for name, column in combined(self.digests).items()
        }
        windows = f" in windows of {self.rows_per_pack:,} rows a pack" if self.is_windowed else ""
        return DataDescription(f"a Ray Dataset{windows}", self.num_rows, columns)

    def bad_rows(self, policy: BadDataPolicy) -> list[Finding]:
        """See `IndexedDataset`; of the columns that were searched when the rows were packed."""
        return [finding for finding in self.findings if policy.looks_at(finding.column)]

    def fetch(self, indices: Indices, epoch: int = 0) -> dict[str, Any]:
        """See `IndexedDataset`; a dict of columns."""
        if len(self.packs) == 1:
            return self._opened([0])[0].gather(indices)
        which, rows = np.divmod(indices, self.rows_per_pack)
        by_pack = np.argsort(which, kind="stable")
        numbers, starts = np.unique(which[by_pack], return_index=True)
        groups = np.split(by_pack, starts[1:])
        packs = self._opened([int(number) for number in numbers])
        return {
            name: _scattered(
                [(pack.columns[name], rows[group], group) for pack, group in zip(packs, groups, strict=True)]
            )
            for name in packs[0].columns
        }

    def column(self, key: int | str) -> Iterator[Tensor]:
        """All values of a column of numbers, in pieces; nothing where that would read data larger than memory."""
        for number in range(0 if self.is_windowed else len(self.packs)):
            values = self._opened([number])[0].columns.get(str(key))
            if isinstance(values, np.ndarray) and values.dtype != object:
                yield torch.from_numpy(values.copy())  # torch warns of memory that is read-only

    def announce(self, indices: Indices) -> None:
        """Let Ray bring packs to this node, from other nodes or from disk, while others are worked on."""
        wanted = np.unique(indices // self.rows_per_pack).tolist()
        missing = [self.packs[number] for number in wanted if number not in self._open]
        if missing:
            ray.wait(missing, num_returns=len(missing), timeout=0, fetch_local=True)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Single rows, for collators that want samples."""
        batch = self.fetch(np.asarray(indices, dtype=np.int64))
        return [{name: column[place] for name, column in batch.items()} for place in range(len(indices))]

    def _opened(self, numbers: list[int]) -> list[Pack]:
        missing = [number for number in numbers if number not in self._open]
        if missing:
            for number, pack in zip(missing, _got([self.packs[number] for number in missing]), strict=True):
                self._keep(number, pack)
        packs = [self._open[number] for number in numbers]
        if self.is_windowed:
            for number in numbers:
                self._open.move_to_end(number)
            while len(self._open) > max(_KEPT_PACKS, len(numbers)):
                self._open.popitem(last=False)
        return packs

    def _keep(self, number: int, pack: Pack) -> None:
        if pack.digest != self.digests[number]:
            first = number * self.rows_per_pack
            raise DataError(
                f"Rows {first} to {first + self.rows_per_pack} of the Ray Dataset were lost and computed again, and "
                "came out different. The pipeline must give the same rows each time: seed what is random in it, "
                "or write its result to storage and train from there."
            )
        self.packs_loaded += 1
        self._open[number] = pack


def index_ray_dataset(
    dataset: "ray.data.Dataset",
    full_shuffle_bytes: int = FULL_SHUFFLE_BYTES,
    window_pack_bytes: int = WINDOW_PACK_BYTES,
    policy: BadDataPolicy = KEEP,
) -> RayBlocks:
    """Run a dataset's pipeline, on the driver, and give each of its rows a place.

    The result is kept in the object store, where Ray spills what does not fit to disk.

    Args:
        dataset: its rows keep the order of their source.
        full_shuffle_bytes: larger datasets are shuffled within windows of packs.
        window_pack_bytes: the size of such a pack, about; up to 20 of them are in use at a time.
        policy: which columns are searched for bad rows, and whether blocks with other columns are left out.

    Raises:
        DataError: the pipeline fails, gives no rows, or not the same columns everywhere.
    """
    packer = _Packer(full_shuffle_bytes, window_pack_bytes, policy)
    strangers = Strangers(policy)
    try:
        with order_preserved(dataset):
            for bundle in dataset.iter_internal_ref_bundles():
                slices = bundle.slices or [None] * len(bundle.blocks)
                for entry, part in zip(bundle.blocks, slices, strict=True):
                    start, stop = (part.start_offset, part.end_offset) if part else (0, entry.metadata.num_rows)
                    if not strangers.take(entry.ref, stop - start):
                        packer.add(entry.ref, start, stop, entry.metadata.size_bytes)
        return packer.finish(strangers.left_out())
    except RayError as error:
        raise explained(error) from error


class _Packer:
    """Turns the stream of a dataset's blocks into packs, some at a time."""

    def __init__(self, full_shuffle_bytes: int, window_pack_bytes: int, policy: BadDataPolicy) -> None:
        self._full_shuffle_bytes = full_shuffle_bytes
        self._window_pack_bytes = window_pack_bytes
        self._policy = policy
        self._pending: deque[tuple[ObjectRef[Any], int, int]] = deque()
        self._pending_rows = 0
        self._num_rows = 0
        self._num_bytes = 0
        self._rows_per_pack: int | None = None  # known once it is known that the data is large
        self._packs: list[ObjectRef[Pack]] = []
        self._facts: list[ObjectRef[tuple[Digest, list[Finding]]]] = []

    def add(self, block: "ObjectRef[Any]", start: int, stop: int, size_bytes: int | None) -> None:
        """Take the next rows of the dataset."""
        if stop == start:
            return
        self._pending.append((block, start, stop))
        self._pending_rows += stop - start
        self._num_rows += stop - start
        self._num_bytes += size_bytes or 0
        if self._rows_per_pack is None and self._num_bytes > self._full_shuffle_bytes:
            self._rows_per_pack = self._rows_for(self._window_pack_bytes)
        while self._rows_per_pack is not None and self._pending_rows >= self._rows_per_pack:
            self._pack(self._rows_per_pack)

    def finish(self, left_out: LeftOut | None) -> RayBlocks:
        """Pack the rest."""
        if not self._num_rows:
            raise DataError("The Ray Dataset has no rows. There must be at least 1 to train on.")
        is_windowed = self._rows_per_pack is not None
        rows_per_pack = self._rows_per_pack or self._rows_for(_FULL_PACK_BYTES)
        while self._pending_rows:
            self._pack(min(rows_per_pack, self._pending_rows))
        facts = ray.get(self._facts)
        digests = [digest for digest, _ in facts]
        combined(digests, allows_nothing=self._policy.looks)
        findings = without_empty_columns([finding for _, found in facts for finding in found], self._num_rows)
        return RayBlocks(self._packs, rows_per_pack, self._num_rows, digests, is_windowed, findings, left_out)

    def _rows_for(self, num_bytes: int) -> int:
        """A power of two, so that a slightly different estimate of a row's size changes nothing."""
        bytes_per_row = max(1.0, self._num_bytes / self._num_rows)
        return 1 << max(0, int(num_bytes / bytes_per_row).bit_length() - 1)

    def _pack(self, num_rows: int) -> None:
        blocks: list[ObjectRef[Any]] = []
        segments: list[Segment] = []
        missing = num_rows
        while missing:
            block, start, stop = self._pending.popleft()
            end = min(stop, start + missing)
            blocks.append(block)
            segments.append(Segment(start, end))
            missing -= end - start
            if end < stop:
                self._pending.appendleft((block, end, stop))
        self._pending_rows -= num_rows
        first_row = self._num_rows - self._pending_rows - num_rows
        pack, facts = _make_pack.remote(first_row, segments, self._policy, *blocks)
        self._packs.append(pack)
        self._facts.append(facts)
        if len(self._facts) > _PACKING_AT_ONCE:  # else all blocks would be kept until their packs are made
            ray.wait([self._facts[-1 - _PACKING_AT_ONCE]], fetch_local=False)


# "DEFAULT" is not the default: without it, a trial's tasks have to fit into the group of the trial, which has no CPU
@ray.remote(num_returns=2, scheduling_strategy="DEFAULT")  # type: ignore[untyped-decorator]
def _make_pack(
    first_row: int, segments: list[Segment], policy: BadDataPolicy, *blocks: Any
) -> tuple[Pack, tuple[Digest, list[Finding]]]:
    pack = Pack.of(list(blocks), segments, first_row, policy)
    return pack, (pack.digest, pack.findings)


def _scattered(pieces: list[tuple[Column, Indices, Indices]]) -> Any:
    """Rows of one column from several packs, each piece with where its rows go in the batch."""
    first = pieces[0][0]
    if isinstance(first, np.ndarray):
        result = np.empty((sum(len(places) for _, _, places in pieces), *first.shape[1:]), first.dtype)
        for column, rows, places in pieces:
            result[places] = column.take(rows, axis=0)
        return finished(result)
    places = np.concatenate([piece[2] for piece in pieces])
    joined = pa.concat_arrays([taken(column, rows) for column, rows, _ in pieces])
    return finished(taken(joined, np.argsort(places)))


def _got(refs: "list[ObjectRef[Pack]]") -> list[Pack]:
    try:
        return cast(list[Pack], ray.get(refs))
    except RayError as error:
        raise explained(error) from error
