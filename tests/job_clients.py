"""Commands that talk to a head, as a user gives them in the repository."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ray_head import RayHead

T = TypeVar("T")

REPOSITORY = Path(__file__).parents[1]
PATIENCE_S = 240


class Client:
    """A command that talks to the head, as a user gives it in the repository."""

    def __init__(self, head: RayHead, log: Path, *command: str) -> None:
        self._log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=REPOSITORY,
                env=head.environment | {"RAY_API_SERVER_ADDRESS": head.address},
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )

    @property
    def output(self) -> str:
        return self._log.read_text()

    def wait(self) -> int:
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"the command did not end:\n{self.output}") from None

    def until(self, look: Callable[[], T | None], what: str) -> T:
        """What there is to see, while the command runs."""

        def alive() -> T | None:
            found = look()
            assert found is not None or self.process.poll() is None, f"the command ended early:\n{self.output}"
            return found

        return until(alive, what)


def until(look: Callable[[], T | None], what: str) -> T:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        found = look()
        if found is not None:
            return found
        time.sleep(0.05)
    raise AssertionError(f"waited in vain for {what}")
