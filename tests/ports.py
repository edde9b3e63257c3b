"""Ports for servers that are yet to start."""

import random
import socket
from contextlib import ExitStack, suppress

_BELOW_EPHEMERAL = range(20_000, 32_000)  # the kernel gives ports from 32768 on to whoever asks for any


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, nor will by chance before the server does that they are for."""
    with ExitStack() as stack:
        ports: list[int] = []
        for port in random.SystemRandom().sample(_BELOW_EPHEMERAL, len(_BELOW_EPHEMERAL)):
            one = stack.enter_context(socket.socket())
            with suppress(OSError):  # taken
                one.bind(("", port))
                ports.append(port)
            if len(ports) == count:
                return ports
    raise AssertionError(f"There are no {count} free ports in {_BELOW_EPHEMERAL}.")
