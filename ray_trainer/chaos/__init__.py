"""The promise, proven on a user's own experiment: one clean run, one under faults, compared bit for bit.

Nothing here reaches into a run: it is started by its command, watched by what it writes, and struck by signals.
"""

from ray_trainer.chaos.comparison import Comparison, compare_runs
from ray_trainer.chaos.faults import KINDS, Fault
from ray_trainer.chaos.trial import Trial, Verdict

__all__ = ["KINDS", "Comparison", "Fault", "Trial", "Verdict", "compare_runs"]
