"""A run as one self-contained page: read from its files alone, so also while it runs, and wherever it runs."""

from ray_trainer.report.data import RunData, read_run
from ray_trainer.report.page import render

__all__ = ["RunData", "read_run", "render"]
