"""How a run is configured: the training section, and what all sections share (checks, documents, overrides)."""

from ray_trainer.config.training import TrainingConfig, compare_configs

__all__ = ["TrainingConfig", "compare_configs"]
