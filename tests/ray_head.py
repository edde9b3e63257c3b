"""A Ray of its own with a dashboard, as ``ray start --head`` makes it: for jobs and for metrics.

It asks for a token, on ports of its own, so that neither another Ray on this machine nor its settings matter.
"""

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cluster_runs import short_directory
from ports import free_ports

from ray_trainer.chaos import processes

PATIENCE_S = 120
PORTS = ("port", "dashboard-port", "dashboard-agent-listen-port", "metrics-export-port", "ray-client-server-port")


@dataclass(frozen=True)
class RayHead:
    """A head that is up.

    Attributes:
        address: of its dashboard.
        gcs: what `ray.init` takes.
        metrics_url: where Prometheus would read.
        environment: for whoever wants to talk to it.
    """

    address: str
    gcs: str
    metrics_url: str
    environment: dict[str, str]

    def ask(self, path: str, method: str = "GET") -> urllib.request.Request:
        """A request to the dashboard, with the token."""
        headers = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        return urllib.request.Request(f"{self.address}{path}", headers=headers, method=method)

    def stop_job(self, submission_id: str) -> None:
        """What ``ray job stop`` sends, without the seconds that its start takes."""
        with urllib.request.urlopen(self.ask(f"/api/jobs/{submission_id}/stop", "POST"), timeout=30):
            return

    def jobs(self) -> set[str]:
        """The submission ids of the jobs that it knows of."""
        with urllib.request.urlopen(self.ask("/api/jobs/"), timeout=30) as answer:
            return {str(job["submission_id"]) for job in json.load(answer)}

    def metrics(self) -> str:
        """What Prometheus would read now."""
        with urllib.request.urlopen(self.metrics_url, timeout=10) as answer:
            return str(answer.read().decode())


@contextmanager
def ray_head(num_cpus: int = 2) -> Iterator[RayHead]:
    """Start a head; nothing of it is alive afterwards."""
    with ExitStack() as stack:
        temp_dir = stack.enter_context(short_directory())
        log = stack.enter_context(tempfile.TemporaryFile())
        ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        hidden = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "PYTHONPATH", "RAY_AUTH_TOKEN_PATH")
        environment = {name: value for name, value in os.environ.items() if name not in hidden}
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
            *(f"--{name}={port}" for name, port in ports.items()),
            *(f"--temp-dir={temp_dir}", f"--num-cpus={num_cpus}", "--object-store-memory=200000000"),
            *("--node-ip-address=127.0.0.1", "--disable-usage-stats"),
            '--system-config={"metrics_report_interval_ms": 1000}',
        ]
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            head = RayHead(
                address=f"http://127.0.0.1:{ports['dashboard-port']}",
                gcs=f"127.0.0.1:{ports['port']}",
                metrics_url=f"http://127.0.0.1:{ports['metrics-export-port']}/metrics",
                environment=environment,
            )
            wait_until_up(head, process, Path(f"/proc/self/fd/{log.fileno()}"))
            yield head
        finally:
            end(process)


def wait_until_up(head: RayHead, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until its dashboard takes jobs, which is the last thing to come up."""
    request = head.ask("/api/jobs/")
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        assert process.poll() is None, f"ray start ended:\n{log.read_text()}"
        with suppress(urllib.error.URLError, TimeoutError, ConnectionError), urllib.request.urlopen(request, timeout=5):
            return
        time.sleep(0.2)
    raise AssertionError(f"Ray did not come up:\n{log.read_text()}")


def end(process: subprocess.Popen[bytes]) -> None:
    """With SIGKILL: told to terminate, it would drain its node first."""
    processes.end({processes.identity(pid) for pid in processes.descendants(process.pid)})
    process.wait()
