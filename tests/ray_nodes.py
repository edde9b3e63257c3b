"""A Ray cluster of several nodes on this machine: a head and nodes as ``ray start`` makes them, each of which can be
killed, and the head started again.

What the head knows is kept in a RocksDB, or with ``HEAD_MEMORY=redis`` in the environment by a Redis server (Debian's
redis-server), so that one which is started again goes on where the other was.
"""

import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cluster_runs import short_directory
from ports import free_ports
from ray_head import PATIENCE_S, PORTS, RayHead, end, wait_until_up

_HIDDEN = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "PYTHONPATH", "RAY_AUTH_TOKEN_PATH")
REDIS_PASSWORD = secrets.token_hex(16)
_GAVE_UP = "The current node timed out during startup"
_NODE_PORTS = ("dashboard-agent-listen-port", "metrics-export-port")


class Node:
    """One ``ray start --block`` and all processes that descend from it."""

    def __init__(
        self, options: list[str], environment: Mapping[str, str], log: Path, prefix: Sequence[str] = ()
    ) -> None:
        self._command = [*prefix, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *options]
        self._environment = dict(environment)
        self.log = log
        self.start()

    def start(self) -> None:
        """Start it, also again."""
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self._command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self._environment,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Until it has joined."""
        deadline = time.monotonic() + PATIENCE_S
        while "will now block" not in (told := self.log.read_text()):
            if self.process.poll() is not None:
                assert told.count(_GAVE_UP) in (1, 2), f"ray start ended:\n{told}"
                self.start()  # Ray gives a raylet 30 s, which is little on a machine that does much else
            assert time.monotonic() < deadline, f"the node did not come up:\n{self.log.read_text()}"
            time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL to all of it: what the loss of a machine is to the others."""
        end(self.process)


class RayCluster:
    """A head that runs nothing, and nodes.

    Attributes:
        head: for whoever wants to talk to it.
        nodes: in the order in which they were added.
    """

    def __init__(self, directory: Path, temp_dir: str, variables: Mapping[str, str], memory: Mapping[str, str]) -> None:
        self._directory = directory
        self._temp_dir = temp_dir
        ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        environment = {name: value for name, value in os.environ.items() if name not in _HIDDEN}
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), **variables}
        environment["RAY_gcs_rpc_server_reconnect_timeout_s"] = "600"  # as the files in cluster/ have it
        self.head = RayHead(
            address=f"http://127.0.0.1:{ports['dashboard-port']}",
            gcs=f"127.0.0.1:{ports['port']}",
            metrics_url=f"http://127.0.0.1:{ports['metrics-export-port']}/metrics",
            environment=environment,
        )
        options = [
            "--head",
            "--num-cpus=0",
            f"--temp-dir={temp_dir}",
            *(f"--{name}={port}" for name, port in ports.items()),
        ]
        if "RAY_REDIS_ADDRESS" in memory:
            options.append(f"--redis-password={REDIS_PASSWORD}")
        self._head_node = Node([*options, *_COMMON], {**environment, **memory}, directory / "head.log")
        self.nodes: list[Node] = []
        self._wait()

    def add_node(self, num_cpus: int) -> Node:
        """A node more; it has joined once it is asked to do something."""
        ports = dict(zip(_NODE_PORTS, free_ports(len(_NODE_PORTS)), strict=True))
        options = [
            f"--address={self.head.gcs}",
            f"--num-cpus={num_cpus}",
            *(f"--{name}={port}" for name, port in ports.items()),
        ]
        node = Node(
            [*options, *_COMMON], self.head.environment, self._directory / f"node{ports['metrics-export-port']}.log"
        )
        self.nodes.append(node)
        node.wait()  # nodes of one machine that start at the same moment take each other's sockets
        return node

    def lose_head(self) -> None:
        """Kill all processes of the head."""
        self._head_node.kill()
        # the machine that comes in its place knows of no Ray
        Path(self._temp_dir, "ray_current_cluster").unlink()

    def start_head(self) -> None:
        """Start it again, with what it kept; twice if need be, as a unit of systemd would.

        Ray gives itself 30 s, whatever else the machine has to do.
        """
        self._head_node.start()
        try:
            self._wait()
        except AssertionError:
            self._head_node.kill()
            self._head_node.start()
            self._wait()

    def close(self) -> None:
        """Nothing of it is alive afterwards."""
        for node in (*self.nodes, self._head_node):
            node.kill()

    def _wait(self) -> None:
        wait_until_up(self.head, self._head_node.process, self._head_node.log)


_COMMON = ("--node-ip-address=127.0.0.1", "--object-store-memory=200000000", "--disable-usage-stats")


@contextmanager
def ray_cluster(variables: Mapping[str, str]) -> Iterator[RayCluster]:
    """A head, to which nodes are added.

    Args:
        variables: in the environment of all of them.
    """
    with ExitStack() as stack:
        temp_dir = stack.enter_context(short_directory())
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if os.environ.get("HEAD_MEMORY") == "redis":
            memory = stack.enter_context(redis(directory))
        else:
            memory = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(directory / "gcs")}
        cluster = RayCluster(directory, temp_dir, variables, memory)
        stack.callback(cluster.close)
        yield cluster


@contextmanager
def redis(directory: Path) -> Iterator[dict[str, str]]:
    """A Redis server that outlives the head; what the head needs to know of it."""
    (port,) = free_ports(1)
    options = ["--port", str(port), "--dir", str(directory), "--requirepass", REDIS_PASSWORD, "--appendonly", "yes"]
    with (directory / "redis.log").open("wb") as log:
        server = subprocess.Popen(["redis-server", "--bind", "127.0.0.1", *options], stdout=log, stderr=log)
    try:
        yield {
            "RAY_REDIS_ADDRESS": f"127.0.0.1:{port}",
            "RAY_external_storage_namespace": "tests",
        }
    finally:
        server.kill()
        server.wait()
