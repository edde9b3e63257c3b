"""What is minimised: strategies that return a sum and a count, so that means over workers are exact."""

from ray_trainer.losses.cross_entropy import (
    ClassificationLoss,
    LanguageModelingLoss,
    Seq2SeqLoss,
    VisionLoss,
)
from ray_trainer.losses.elementwise import MultiLabelLoss, RegressionLoss
from ray_trainer.losses.explain import explain_loss_error
from ray_trainer.losses.model_output import ModelOutput
from ray_trainer.losses.registry import LossStrategyRegistry, get_loss_strategy
from ray_trainer.losses.strategy import (
    IGNORE_LABEL,
    Aligned,
    AligningLoss,
    LossInputs,
    LossResult,
    LossStrategy,
    aligns,
)
from ray_trainer.losses.wrappers import PEFTAwareLoss, QuantizationSafeLoss

__all__ = [
    "IGNORE_LABEL",
    "Aligned",
    "AligningLoss",
    "ClassificationLoss",
    "LanguageModelingLoss",
    "LossInputs",
    "LossResult",
    "LossStrategy",
    "LossStrategyRegistry",
    "ModelOutput",
    "MultiLabelLoss",
    "PEFTAwareLoss",
    "QuantizationSafeLoss",
    "RegressionLoss",
    "Seq2SeqLoss",
    "VisionLoss",
    "aligns",
    "explain_loss_error",
    "get_loss_strategy",
]
