"""Blocks of a Ray Dataset whose columns are not those of the others."""

from typing import Any

import pyarrow as pa
import ray
from ray import ObjectRef
from ray.data.block import BlockAccessor

from ray_trainer.cluster.packs import path_of
from ray_trainer.data.quarantine import BadDataPolicy, LeftOut, refuse_beyond

_TOLD_BLOCKS = 20


@ray.remote  # type: ignore[untyped-decorator]
def _look_at(block: Any) -> tuple[Any, str | None]:
    """Columns and types of a block, and the file of its first row if it is known."""
    table = BlockAccessor.for_block(block).to_arrow()
    paths = table["path"].combine_chunks() if "path" in table.column_names else None
    return table.schema, path_of(paths, 0)


class Strangers:
    """Blocks whose columns are not those of the first one; they are left out where that is wanted."""

    def __init__(self, policy: BadDataPolicy) -> None:
        self._policy = policy
        self._model: Any = None
        self._num_rows = 0
        self._found: list[tuple[int, str]] = []

    def take(self, block: "ObjectRef[Any]", num_rows: int) -> bool:
        """Keep the block here if it is a stranger. A bundle's own schema is not that of each of its blocks."""
        first_row, self._num_rows = self._num_rows, self._num_rows + num_rows
        if self._policy.action != "quarantine" or not num_rows:
            return False
        schema, path = ray.get(_look_at.remote(block))
        self._model = self._model or schema
        difference = schema_difference(self._model, schema)
        if difference:
            of_file = f" (file {path})" if path else ""
            told = f"{num_rows} rows from row {first_row} on{of_file}: another schema, {difference}"
            self._found.append((num_rows, told))
        return bool(difference)

    def left_out(self) -> LeftOut | None:
        """What was kept here.

        Raises:
            DataError: it is more than the policy allows.
        """
        if not self._found:
            return None
        num_rows = sum(count for count, _ in self._found)
        places = tuple(told for _, told in self._found[:_TOLD_BLOCKS])
        left_out = LeftOut(num_rows, 0, {"another schema": num_rows}, places)
        refuse_beyond(self._policy, num_rows, self._num_rows, "rows", left_out)
        return left_out


def schema_difference(model: Any, schema: Any) -> str:
    """Columns that differ, in words; a column without any value is not of another type."""
    forms = [dict(zip(each.names, each.types, strict=True)) for each in (model, schema)]
    differing = [
        name
        for name in sorted(forms[0].keys() | forms[1].keys())
        if forms[0].get(name) != forms[1].get(name)
        and not any(pa.types.is_null(form[name]) for form in forms if name in form)
    ]
    return "; ".join(f"{name}: {forms[0].get(name, 'missing')} / {forms[1].get(name, 'missing')}" for name in differing)
