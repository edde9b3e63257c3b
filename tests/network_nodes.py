"""Nodes with a network of their own on this machine, whose links can be cut: network namespaces on a bridge.

Each has an address, a host name and a loopback of its own, and shares files and processes with this machine. Needs
root and Linux; `why_not` says what is missing.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cluster_runs import short_directory
from ray_nodes import Node

HEAD_PORT = 6379
#: So that a node which is cut off is given up after two seconds, and not after fifteen.
IMPATIENT = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "500",
    "RAY_health_check_failure_threshold": "4",
}


def why_not() -> str | None:
    """Why this machine can't have such nodes, or None if it can."""
    if shutil.which("ip") is None or shutil.which("nsenter") is None:
        return "needs the commands ip (iproute2) and nsenter (util-linux)"
    name = f"rt{os.getpid()}"
    for change in ("add", "del"):
        done = subprocess.run(["ip", "netns", change, name], capture_output=True, text=True, check=False)
        if done.returncode:
            return f"network namespaces are not allowed here: {done.stderr.strip()}"
    return None


class Host:
    """One machine of the network.

    Attributes:
        address: of its only interface, ``eth0``.
        prefix: what a command begins with that is to run on it.
    """

    def __init__(self, network: "Network", number: int) -> None:
        self._space = f"{network.name}-{number}"
        self._link = f"{network.name}v{number}"
        self.address = f"{network.subnet}.{number}"
        self.name = f"node{number}"
        _ip("netns", "add", self._space)
        network.stack.callback(_ip, "netns", "del", self._space)
        _ip("link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", self._space)
        _ip("link", "set", self._link, "master", network.name, "up")
        for change in (f"addr add {self.address}/24 dev eth0", "link set eth0 up", "link set lo up"):
            _ip("-n", self._space, *change.split())
        setup = f'hostname {self.name}; mount --bind {network.hosts} /etc/hosts; exec "$@"'
        self.prefix = [
            *("nsenter", f"--net=/run/netns/{self._space}"),
            *("unshare", "--uts", "--mount", "sh", "-c", setup, "sh"),
        ]

    def cut(self) -> None:
        """Take its cable away: nothing comes through any more, and nobody is told."""
        _ip("link", "set", self._link, "down")

    def mend(self) -> None:
        """Plug it in again."""
        _ip("link", "set", self._link, "up")


class Network:
    """A bridge, and the hosts on it."""

    def __init__(self, stack: ExitStack, directory: Path) -> None:
        self.stack = stack
        self.name = f"rt{os.getpid() % 100_000}"
        self.subnet = f"10.77.{os.getpid() % 250}"
        self.hosts = directory / "hosts"
        names = [f"{self.subnet}.{number} node{number}\n" for number in range(1, 9)]
        self.hosts.write_text("127.0.0.1 localhost\n" + "".join(names))
        _ip("link", "add", self.name, "type", "bridge")
        stack.callback(_ip, "link", "del", self.name)
        _ip("link", "set", self.name, "up")


class RayOnNetwork:
    """A head that runs nothing, and two nodes with two CPUs each.

    Attributes:
        address: what ``cluster.address`` takes.
        environment: for whoever joins.
        hosts: the head's first.
    """

    def __init__(self, stack: ExitStack, directory: Path, temp_dir: str) -> None:
        network = Network(stack, directory)
        self.hosts = [Host(network, number) for number in (1, 2, 3)]
        self.address = f"{self.hosts[0].address}:{HEAD_PORT}"
        hidden = ("RAY_ADDRESS", "PYTHONPATH")
        self.environment = {name: value for name, value in os.environ.items() if name not in hidden}
        self.environment |= {"RAY_AUTH_MODE": "disabled", "RAY_gcs_rpc_server_reconnect_timeout_s": "600"}
        self.nodes: list[Node] = []
        head = ["--head", f"--port={HEAD_PORT}", "--num-cpus=0", "--include-dashboard=false", f"--temp-dir={temp_dir}"]
        worker = [f"--address={self.address}", "--num-cpus=2"]
        for host in self.hosts:
            options = [*(worker if self.nodes else head), f"--node-ip-address={host.address}"]
            options += ["--object-store-memory=100000000", "--disable-usage-stats"]
            node = Node(options, self.environment | IMPATIENT, directory / f"{host.name}.log", prefix=host.prefix)
            stack.callback(node.kill)
            self.nodes.append(node)
            node.wait()


@contextmanager
def ray_on_network(directory: Path) -> Iterator[RayOnNetwork]:
    """Ray on three hosts; nothing of it is there afterwards."""
    with ExitStack() as stack:
        temp_dir = stack.enter_context(short_directory())
        yield RayOnNetwork(stack, directory, temp_dir)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
