"""Everything between the backward pass and the weights."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim.lr_scheduler import LRScheduler

from ray_trainer.errors import ConfigError
from ray_trainer.gradients.norms import GradientGroups, group_gradients, scale_gradients, total_norm


@dataclass(frozen=True)
class AccumulationStats:
    """What a `GradientAccumulator` has done so far.

    Attributes:
        micro_batches: backward passes.
        optimizer_steps: updates of the weights.
        skipped_steps: steps whose gradients were thrown away.
        pending_micro_batches: backward passes since the last update or skip.
        last_grad_norm: norm of the mean gradient before clipping, of the last update; None before the first.
    """

    micro_batches: int = 0
    optimizer_steps: int = 0
    skipped_steps: int = 0
    pending_micro_batches: int = 0
    last_grad_norm: float | None = None


class GradientAccumulator:
    """Owner of the gradients: adds them up, takes their norm once, clips, updates, zeroes.

    Gradients of *sums* are accumulated, and the mean is taken once, over the true total count. So k
    micro-batches of any sizes give the gradient of one large batch, and a short last one needs no
    special case::

        for micro_batch in step:
            accumulator.backward(loss_sum)
        norm = accumulator.norm(total_count)          # of the mean gradient
        accumulator.apply(total_count, norm)          # or discard()

    **fp16.** A `GradScaler` starts at 2**16, chosen by torch for gradients of means; those of a sum over N
    tokens are N times larger and would overflow fp16. The loss is therefore first divided by a power of two
    near N (exact in floating point), which brings them back to the size of a mean. N is known at the end of
    the first step; until then the divisor is the scale itself, so that the first step runs unscaled.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        accumulation_steps: int = 1,
        max_grad_norm: float | None = 1.0,
        scaler: GradScaler | None = None,
        parameters: Iterable[nn.Parameter] | None = None,
        scheduler: LRScheduler | None = None,
    ) -> None:
        """Take over the gradients.

        Args:
            optimizer: what carries out the update.
            accumulation_steps: micro-batches that a full step has; for the loop that forms them.
            max_grad_norm: the mean gradient is scaled down to this L2 norm; None for no clipping.
            scaler: for fp16; a disabled one counts as none.
            parameters: whose gradients count; those of the optimizer by default, also ones added to it later.
            scheduler: advanced by each real update, not by a skip.
        """
        if accumulation_steps < 1:
            raise ValueError(
                f"accumulation_steps must be >= 1, not {accumulation_steps}. 1 updates at each micro-batch."
            )
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be > 0 or None, not {max_grad_norm}. None turns clipping off.")
        self.optimizer = optimizer
        self.accumulation_steps = accumulation_steps
        self.max_grad_norm = max_grad_norm
        self.scheduler = scheduler
        self._parameters = None if parameters is None else list(parameters)
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._loss_divisor = max(1.0, self._scaler.get_scale()) if self._scaler else 1.0
        self._is_divisor_final = self._scaler is None
        self._norm_count: float | None = None
        self._groups: GradientGroups = {}
        self._micro_batches = 0
        self._optimizer_steps = 0
        self._skipped_steps = 0
        self._pending_micro_batches = 0
        self._last_norm: Tensor | float | None = None

    def backward(self, loss_sum: Tensor) -> None:
        """Add the gradients of one micro-batch's summed loss.

        A loss that is NaN or infinite makes all of them NaN, so that the one norm tells every rank of it.

        Raises:
            ConfigError: the loss depends on no parameter.
        """
        if not loss_sum.requires_grad:
            raise ConfigError(
                "The loss depends on no parameter that is trained, so it has no gradient. Look for .detach(), "
                "torch.no_grad(), argmax or NumPy between the model's parameters and what its forward returns."
            )
        if self._scaler is not None:
            loss_sum = self._scaler.scale(loss_sum / self._loss_divisor)
        if loss_sum.is_cpu and math.isfinite(loss_sum.item()):  # no device to wait for, and quicker than the way below
            loss_sum.backward()  # type: ignore[no-untyped-call]
        else:
            one = torch.rsub(loss_sum.detach(), 1, alpha=0)  # 1 - 0 * loss, which is NaN for such a loss
            loss_sum.backward(one)  # type: ignore[no-untyped-call]
        self._pending_micro_batches += 1

    def norm(self, total_count: float) -> Tensor:
        """The global L2 norm of the mean gradient, before clipping.

        Once a step, after the last `backward`. Collective under FSDP.

        Args:
            total_count: what the loss sums were taken over, in all micro-batches and ranks; equal on all
                ranks. If it is zero there is no mean: the norm of the sum is returned.

        Returns:
            Zero-dim, on the gradients' device; reading it waits for the device. NaN or infinite if a
            gradient is, or if its square leaves float32 (above 1e19).
        """
        if self._scaler is not None and self._pending_micro_batches:
            self._scaler.unscale_(self.optimizer)
        self._norm_count = total_count
        self._groups = group_gradients(self._owned())
        return total_norm(self._groups) * self._mean_factor(total_count)

    def apply(self, total_count: float, norm: Tensor | float) -> bool:
        """Scale the gradients to the clipped mean, update the weights and zero the gradients.

        Once a step, after `norm`; the gradients must not be replaced in between.

        Args:
            total_count: as for `norm`; zero makes this a skip.
            norm: what `norm` returned, finite; a float that was read from it already saves a wait.

        Returns:
            Whether the weights were updated; an fp16 scaler may refuse, and zero samples have no gradient.
        """
        if not total_count:
            self.discard()
            return False
        if total_count != self._norm_count:
            raise RuntimeError(
                f"apply() got total_count {total_count}, norm() before it {self._norm_count}. "
                "Take the norm once after the last backward, with the same count."
            )
        factor = self._mean_factor(total_count)
        if self.max_grad_norm is not None:
            factor *= min(1.0, self.max_grad_norm / (float(norm) + 1e-6))  # as in torch's clip_grad_norm_
        scale_gradients(self._groups, factor)
        is_updated = self._step_optimizer()
        if is_updated:
            self._last_norm = norm
            if self.scheduler is not None:
                self.scheduler.step()
        self._close_step(is_updated)
        return is_updated

    def discard(self) -> None:
        """Throw the gradients away: the weights, the schedule and the optimizer's state stay as they are.

        A skip is counted if their norm had been taken; without it the step was broken off, which counts as
        nothing.
        """
        self._release_scaler()
        self._close_step(is_updated=False)

    @property
    def learning_rate(self) -> float:
        """That of the optimizer's first group, for the next update."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def is_searching_scale(self) -> bool:
        """Whether fp16's loss scale may still be too large, which makes an infinite norm no failure.

        Reading it waits for the device.
        """
        return self._scaler is not None and self._scaler.get_scale() > 1.0

    @property
    def stats(self) -> AccumulationStats:
        """Counts so far; reading them waits for the device if the norm was not read yet."""
        return AccumulationStats(
            micro_batches=self._micro_batches + self._pending_micro_batches,
            optimizer_steps=self._optimizer_steps,
            skipped_steps=self._skipped_steps,
            pending_micro_batches=self._pending_micro_batches,
            last_grad_norm=None if self._last_norm is None else float(self._last_norm),
        )

    def state_dict(self) -> dict[str, Any]:
        """Counts and the scaler's state, between two steps; gradients are no state then."""
        return {
            "micro_batches": self._micro_batches,
            "optimizer_steps": self._optimizer_steps,
            "skipped_steps": self._skipped_steps,
            "last_grad_norm": self.stats.last_grad_norm,
            "scaler": None if self._scaler is None else self._scaler_state(self._scaler),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state; gradients of a step that was under way are dropped.

        A scaler starts afresh if the state comes from a run without one.
        """
        self._release_scaler()
        self._zero_gradients()
        self._micro_batches = state_dict["micro_batches"]
        self._optimizer_steps = state_dict["optimizer_steps"]
        self._skipped_steps = state_dict["skipped_steps"]
        self._last_norm = state_dict["last_grad_norm"]
        scaler_state = state_dict["scaler"]
        if self._scaler is not None and scaler_state is not None:
            self._scaler.load_state_dict(scaler_state["grad_scaler"])
            self._loss_divisor = scaler_state["loss_divisor"]
            self._is_divisor_final = scaler_state["is_divisor_final"]

    def _scaler_state(self, scaler: GradScaler) -> dict[str, Any]:
        return {
            "grad_scaler": scaler.state_dict(),
            "loss_divisor": self._loss_divisor,
            "is_divisor_final": self._is_divisor_final,
        }

    def _owned(self) -> list[nn.Parameter]:
        if self._parameters is not None:
            return self._parameters
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _mean_factor(self, total_count: float) -> float:
        return self._loss_divisor / total_count if total_count else 1.0

    def _step_optimizer(self) -> bool:
        if self._scaler is None:
            self.optimizer.step()
            return True
        scale_before = self._scaler.get_scale()
        self._scaler.step(self.optimizer)
        self._scaler.update()
        return self._scaler.get_scale() >= scale_before  # it is lowered exactly when the update was refused

    def _release_scaler(self) -> None:
        """Tell the scaler that the gradients are not used; it lowers its scale if they overflowed."""
        if self._scaler is not None and self._norm_count is not None and self._pending_micro_batches:
            self._scaler.update()

    def _close_step(self, is_updated: bool) -> None:
        if self._norm_count is not None:
            self._micro_batches += self._pending_micro_batches
            self._optimizer_steps += int(is_updated)
            self._skipped_steps += int(not is_updated)
            if self._norm_count and not self._is_divisor_final:
                self._loss_divisor = 2.0 ** round(math.log2(self._norm_count))
                self._is_divisor_final = True
        self._zero_gradients()

    def _zero_gradients(self) -> None:
        for parameter in self._owned():
            parameter.grad = None
        self._pending_micro_batches = 0
        self._norm_count = None
        self._groups = {}
