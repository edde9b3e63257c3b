"""What all tests share."""

from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch

# no test passes or fails on a duration
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")
torch.set_num_threads(1)  # tiny tensors: threads cost more than they bring, and bits depend on their number


@pytest.fixture(scope="session")
def running_s3_server() -> Iterator[Any]:
    """One server for all tests of a session; tests take `s3_server`."""
    from s3_server import S3Server  # only here: moto takes a second to import

    server = S3Server()
    yield server
    server.close()


@pytest.fixture
def s3_server(running_s3_server: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An S3 server without faults, and the environment set so that ``s3://`` means it."""
    for name, value in running_s3_server.environment.items():
        monkeypatch.setenv(name, value)
    yield running_s3_server
    running_s3_server.recover()
