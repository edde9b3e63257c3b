"""Whether a loss or a gradient norm jumps above what it usually is."""

import math
from collections import deque
from statistics import median
from typing import Any

#: Of the median: deviations of a training that hardly varies are taken to be at least this large.
_LEAST_DEVIATION = 0.05
_TO_STANDARD_DEVIATION = 1.4826  # times the median absolute deviation, for a normal distribution


class SpikeDetector:
    """Compares each step with the accepted ones before it.

    A spike is a value that is more than ``threshold`` robust standard deviations above the median of the last
    ``window`` accepted steps. Median and median absolute deviation, unlike mean and variance, are not moved by
    the outliers they look for. All of it follows from numbers that are equal on all ranks, and is state: a
    resumed run finds the same spikes.
    """

    def __init__(self, threshold: float = 8.0, window: int = 100) -> None:
        """Start with nothing to compare with.

        Args:
            threshold: deviations above the median from which on a value is a spike.
            window: accepted steps that are looked at; before there are so many, nothing is a spike.
        """
        self.threshold = threshold
        self.window = window
        self._losses: deque[float] = deque(maxlen=window)
        self._norms: deque[float] = deque(maxlen=window)

    def find(self, norm: float, loss: float | None) -> str | None:
        """What is wrong with a step, in words; None where nothing is.

        Args:
            norm: of the gradient, finite.
            loss: the mean over the global batch; None where nobody knows it.
        """
        found = self._compared("loss", loss, self._losses) if loss is not None else None
        return found or self._compared("gradient norm", norm, self._norms)

    def accept(self, norm: float, loss: float | None) -> None:
        """Count a step among those that others are compared with."""
        self._norms.append(norm)
        if loss is not None:
            self._losses.append(loss)

    def state_dict(self) -> dict[str, Any]:
        """The accepted values, oldest first."""
        return {"losses": list(self._losses), "norms": list(self._norms)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from there; of a longer window the newest values stay."""
        self._losses = deque(state_dict["losses"], maxlen=self.window)
        self._norms = deque(state_dict["norms"], maxlen=self.window)

    def _compared(self, name: str, value: float, earlier: deque[float]) -> str | None:
        if len(earlier) < self.window:
            return None
        usual = median(earlier)
        least = _LEAST_DEVIATION * abs(usual)
        if value <= usual + self.threshold * least:  # the common case needs no deviations
            return None
        deviation = _TO_STANDARD_DEVIATION * median(abs(other - usual) for other in earlier)
        if math.isfinite(value) and value <= usual + self.threshold * max(deviation, least):
            return None
        return f"{name} {value:.4g} where {usual:.4g} is usual"
