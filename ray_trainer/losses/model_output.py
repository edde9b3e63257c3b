"""One form for what models return."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class ModelOutput:
    """The logits of a forward pass, and what else the model said."""

    logits: Tensor
    loss: Tensor | None = None
    """The model's own loss. Never trained on: it is a mean, and means of unequal batches do not add up."""
    hidden_states: Any = None
    attentions: Any = None

    @classmethod
    def from_raw(cls, raw: Any) -> "ModelOutput":
        """Read a tensor, a tuple, a mapping with 'logits', or an object with ``.logits`` (Hugging Face).

        Of a tuple the first tensor that is no scalar is taken: a leading scalar is the model's own loss.

        Raises:
            ValueError: there are no logits in it.
            TypeError: it is something else.
        """
        if isinstance(raw, Tensor):
            return cls(raw)
        if isinstance(raw, tuple) and not hasattr(raw, "logits"):
            return cls(_logits_of_tuple(raw))
        if isinstance(raw, Mapping):
            if raw.get("logits") is None:
                raise ValueError(
                    f"the model's output has no 'logits', only {', '.join(map(repr, raw)) or 'nothing'} "
                    "(missing logits). Return them under that name, or return the tensor alone."
                )
            return cls(raw["logits"], raw.get("loss"), raw.get("hidden_states"), raw.get("attentions"))
        if isinstance(getattr(raw, "logits", None), Tensor):
            return cls(
                raw.logits,
                getattr(raw, "loss", None),
                getattr(raw, "hidden_states", None),
                getattr(raw, "attentions", None),
            )
        raise TypeError(
            f"Cannot parse output type {type(raw).__name__} of the model. Return a tensor, a tuple that "
            "starts with one, a dict with 'logits', or an object with .logits."
        )


def _logits_of_tuple(raw: tuple[Any, ...]) -> Tensor:
    if not raw:
        raise ValueError("the model returned an empty tuple. Return the logits, or a tuple that holds them.")
    tensors = [item for item in raw if isinstance(item, Tensor)]
    if not tensors:
        kinds = ", ".join(type(item).__name__ for item in raw)
        raise TypeError(f"Cannot parse output type tuple of ({kinds}): there is no tensor in it.")
    return next((tensor for tensor in tensors if tensor.dim() > 0), tensors[0])
