"""Loss strategies by name."""

import difflib
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, TypeVar

from ray_trainer.errors import ConfigError
from ray_trainer.losses.cross_entropy import (
    ClassificationLoss,
    LanguageModelingLoss,
    Seq2SeqLoss,
    VisionLoss,
)
from ray_trainer.losses.elementwise import MultiLabelLoss, RegressionLoss
from ray_trainer.losses.strategy import LossStrategy

Factory = TypeVar("Factory", bound=Callable[..., LossStrategy])

BUILT_IN: dict[str, Callable[..., LossStrategy]] = {
    "language_modeling": LanguageModelingLoss,
    "causal_lm": LanguageModelingLoss,
    "seq2seq": Seq2SeqLoss,
    "classification": ClassificationLoss,
    "text_classification": ClassificationLoss,
    "tabular_classification": ClassificationLoss,
    "vision_classification": VisionLoss,
    "segmentation": VisionLoss,
    "multilabel": MultiLabelLoss,
    "vision_multilabel": MultiLabelLoss,
    "regression": RegressionLoss,
    "mse": partial(RegressionLoss, "mse"),
    "l1": partial(RegressionLoss, "l1"),
    "huber": partial(RegressionLoss, "huber"),
}


class LossStrategyRegistry:
    """The built-in strategies, and those that a program registered.

    The latter live as long as the process: on a cluster, register them in the experiment's module.
    """

    _registered: ClassVar[dict[str, Callable[..., LossStrategy]]] = {}

    @classmethod
    def register(cls, name: str) -> Callable[[Factory], Factory]:
        """Return a decorator that registers a strategy class, or any function that returns a strategy.

        Raises:
            ConfigError: something else has that name. The same class again is fine: modules are reloaded.
        """

        def decorate(factory: Factory) -> Factory:
            known = BUILT_IN.get(name) or cls._registered.get(name)
            if known is not None and not _same_definition(known, factory):
                raise ConfigError(f"a loss {name!r} is already registered ({known!r}). Choose another name.")
            cls._registered[name] = factory
            return factory

        return decorate

    @classmethod
    def get(cls, name: str, **options: Any) -> LossStrategy:
        """Build the strategy of that name; `options` go to its constructor.

        Raises:
            ConfigError: there is none; says which there are and which one may have been meant.
        """
        factory = BUILT_IN.get(name) or cls._registered.get(name)
        if factory is None:
            available = cls.list_available()
            close = difflib.get_close_matches(str(name), available, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"Unknown task_type or loss {name!r}. Available: {', '.join(available)}.{hint}")
        return factory(**options)

    @classmethod
    def list_available(cls) -> list[str]:
        """Return all names, sorted."""
        return sorted({*BUILT_IN, *cls._registered})


def get_loss_strategy(name: str, **options: Any) -> LossStrategy:
    """Build a loss strategy by name; see `LossStrategyRegistry.get`."""
    return LossStrategyRegistry.get(name, **options)


def _same_definition(known: Any, factory: Any) -> bool:
    where = (getattr(factory, "__module__", None), getattr(factory, "__qualname__", None))
    return where == (getattr(known, "__module__", None), getattr(known, "__qualname__", ""))
