"""Trying again what failed for a reason that may pass."""

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ray_trainer.storage.faults import is_transient

T = TypeVar("T")

logger = logging.getLogger(__name__)

_JITTER = random.SystemRandom()  # has no state: neither consumes nor follows the generators that training seeds


@dataclass(frozen=True)
class Patience:
    """How long to try.

    Pauses double from `first_s` to `most_s`, each shortened by up to half at random, so that many workers do not
    come back at the same moment ("equal jitter").

    Attributes:
        limit_s: no attempt begins later than this after the first; 0 tries once.
    """

    limit_s: float = 60.0
    first_s: float = 0.1
    most_s: float = 5.0

    def attempt(self, action: Callable[[], T], what: str) -> T:
        """Do something that may be done again, until it succeeds.

        Raises:
            OSError: it failed for a reason that does not pass, or until the limit.
        """
        started_s = time.monotonic()
        pause_s = self.first_s
        failures = 0
        while True:
            try:
                result = action()
            except OSError as error:
                wait_s = pause_s * (0.5 + 0.5 * _JITTER.random())
                if not is_transient(error) or time.monotonic() + wait_s > started_s + self.limit_s:
                    raise
                failures += 1
                if failures == 1:
                    logger.warning("%s: %s. Trying again for up to %g s.", what, error, self.limit_s)
            else:
                if failures:
                    logger.warning("%s succeeded after %d failures.", what, failures)
                return result
            time.sleep(wait_s)
            pause_s = min(2 * pause_s, self.most_s)


PATIENT = Patience()
IMPATIENT = Patience(limit_s=0.0)
