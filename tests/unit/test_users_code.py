"""Which line of whose code an error is told with."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.exceptions import RayTaskError

from ray_trainer.cluster.pipeline import explained
from ray_trainer.users_code import is_users, users_line


def test_line_is_the_users_and_not_that_of_a_compiled_library():
    with pytest.raises(pa.ArrowInvalid) as caught:
        pq.read_table(pa.BufferReader(b"garbage" * 9))

    assert users_line(caught.value).startswith(f" ({__file__}, line ")
    assert "pq.read_table" in users_line(caught.value)
    assert not is_users("pyarrow/error.pxi")
    assert not is_users("<string>")


def test_failed_pipeline_is_told_by_its_error_and_not_by_the_notes_that_ray_adds():
    traceback = (
        "ray::Read()\n    for block in blocks:\n"
        '  File "reader.py", line 7, in read\n    raise JSONDecodeError("Extra data", s, end)\n'
        "JSONDecodeError: Extra data: line 2\n"
        "Failed to read stream iteratively after 1/10 attempts.\nTo change retry attempts, configure"
    )
    error = RayTaskError("read", traceback, ValueError("Extra data"))

    assert str(explained(error)).startswith("The pipeline of the Ray Dataset failed with JSONDecodeError: Extra data")
