"""Finding silent corruption: replicas that should be equal to the bit are compared, and what differs is done again."""

import logging
import socket
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ray_trainer import distributed
from ray_trainer.checkpoint.digests import digests, joint_digest, tensors_in
from ray_trainer.checkpoint.ring import StateRing
from ray_trainer.checkpoint.suspicion import Suspicion, differing, majority
from ray_trainer.errors import CorruptionError
from ray_trainer.rewind import Rewind
from ray_trainer.state import Progress

logger = logging.getLogger(__name__)

_MAX_REPLAYS = 2
_TOLD = 20  # names that are listed
_COMPARED = frozenset({"model", "optimizer"})


class Replicas:
    """Compares parameters, buffers and optimizer state of all ranks, and keeps the last state that was equal.

    Where they differ, memory or a processor of some rank has failed; its gradients have reached the others since
    then. So no rank's state is taken over: all go back to the last equal one and do the steps since then again,
    which ends in what an undisturbed run would have, whoever was wrong. Who it was is told by a majority; or else
    by the states themselves, once it is known what they should have been.

    Everything that is saved is compared first, so no checkpoint holds what was not equal on all ranks.

    ``DistributedDataParallel`` lets all ranks take over rank 0's buffers with each forward pass, so buffers may
    differ in between. Running means are not compared, nor are those that turn out to differ in a replay as well.

    Args:
        every_n_steps: between two comparisons; None never compares.
        model: whose buffers are looked at, also those that are in no checkpoint.
        progress: of the run.
        rewind: goes back.
    """

    def __init__(self, every_n_steps: int | None, model: nn.Module, progress: Progress, rewind: Rewind) -> None:
        self.is_on = every_n_steps is not None and distributed.world_size() > 1
        self._every_n_steps = every_n_steps or 1
        self._model = model
        self._progress = progress
        self._rewind = rewind
        self._ring = StateRing()
        self._equal_step = -1
        self._known: dict[str, int] = {}
        self._not_compared = _running_statistics(model)
        self._suspicion: Suspicion | None = None
        self._replays = 0

    def is_due(self, is_saved: bool) -> bool:
        """Whether the state of the last completed step should be compared, because it is time, or it is saved."""
        if not self.is_on:
            return False
        step = self._progress.step
        is_time = step % self._every_n_steps == 0 or self._is_suspected(step)
        return step != self._equal_step and (is_time or is_saved)

    def check(self) -> bool:
        """Compare; whether the run went back to an earlier step. Collective.

        Raises:
            CorruptionError: on all ranks; they differ from the start, or again and again.
        """
        live = self._live()
        found = digests(live)
        rows = distributed.gather_rows(torch.tensor([joint_digest(found)], dtype=torch.float64))[:, 0].tolist()
        if all(row == rows[0] for row in rows):
            self._accept(live, found)
            return False
        everybody = distributed.gather_objects(found)
        names = differing(everybody)
        if self._differ_always(names):
            self._not_compared |= set(names)
            self._suspicion = self._suspicion and self._suspicion.without(names)
            return self.check()
        self._go_back(Suspicion.of(self._progress.step, live, names, wrong=majority(rows)))
        return True

    def _live(self) -> dict[str, Tensor]:
        """What is compared, by place."""
        state = self._rewind.state.state_dict(_COMPARED) | {"buffers": self._temporary_buffers()}
        return {name: tensor for name, tensor in tensors_in(state) if name not in self._not_compared}

    def _temporary_buffers(self) -> dict[str, Tensor]:
        """Those that are in no checkpoint."""
        kept = self._model.state_dict().keys()
        return {name: buffer for name, buffer in self._model.named_buffers() if name not in kept}

    def _is_suspected(self, step: int) -> bool:
        return self._suspicion is not None and self._suspicion.step == step

    def _differ_always(self, names: list[str]) -> bool:
        """Whether these are buffers that are each rank's own: they differ from the start, or in a replay again."""
        buffers = {f"model.{name}" for name, _ in self._model.named_buffers()}
        buffers |= {f"buffers.{name}" for name in self._temporary_buffers()}
        is_again = self._is_suspected(self._progress.step) or self._equal_step < 0
        return is_again and buffers.issuperset(names)

    def _accept(self, live: Mapping[str, Tensor], found: dict[str, int]) -> None:
        """All are equal: this is the state to go back to."""
        step = self._progress.step
        if self._suspicion is not None and self._suspicion.step <= step:
            self._decide(self._suspicion, live)
            self._suspicion = None
        if self._suspicion is None:
            self._replays = 0
        self._ring.only(())
        self._ring.keep(step, self._rewind.state.state_dict() | {"buffers": self._temporary_buffers()})
        is_on_cpu = all(tensor.device.type == "cpu" for tensor in live.values())
        self._equal_step = step
        self._known = found if is_on_cpu else digests(self._kept(found))

    def _go_back(self, suspicion: Suspicion) -> None:
        step, target = self._progress.step, self._equal_step
        names = self._told(suspicion.names)
        self._replays += 1
        if target < 0 or self._replays > _MAX_REPLAYS:
            raise _persistent(step, names, suspicion.wrong, is_start=target < 0)
        logger.error(
            "Step %d: the replicas differ in %s. Back to step %d, the last that was equal.", step, names, target
        )
        self._rewind.journal.event(
            "rolled_back", step, self._progress.epoch, to_step=target, reason="the replicas differ", tier="memory"
        )
        if suspicion.wrong:
            self._tell(suspicion, suspicion.wrong, "majority")
        if all(distributed.gather_objects(self._is_kept_whole())):
            state = self._ring.state(target)
            for name, value in state.pop("buffers").items():
                self._model.get_buffer(name).copy_(value)
            self._rewind.to_state(state)
        elif self._rewind.to_checkpoint(target) is None:
            raise _persistent(step, names, suspicion.wrong, is_start=True)
        else:
            live = self._live()
            self._accept(live, digests(live))
        self._suspicion = suspicion

    def _is_kept_whole(self) -> bool:
        """Whether the kept state is what it was: it has lain in the same memory."""
        return digests(self._kept(self._known)) == self._known

    def _kept(self, names: Mapping[str, int]) -> dict[str, Tensor]:
        state = self._ring.peek(self._equal_step)
        kept = dict(tensors_in({part: state[part] for part in (*_COMPARED, "buffers")}))
        return {name: kept[name] for name in names}

    def _decide(self, suspicion: Suspicion, live: Mapping[str, Tensor]) -> None:
        """Tell who was wrong, now that it is known what would have been right."""
        if not suspicion.wrong:
            wrong = suspicion.compared(live)
            self._tell(suspicion, wrong, "replay" if wrong else "undecided")

    def _tell(self, suspicion: Suspicion, wrong: list[int], how: str) -> None:
        hosts = distributed.gather_objects(socket.gethostname())
        self._rewind.journal.event(
            "corruption",
            suspicion.step,
            self._progress.epoch,
            ranks=wrong,
            hosts=[hosts[rank] for rank in wrong],
            tensors=self._told(suspicion.names)[:_TOLD],
            num_tensors=len(suspicion.names),
            decided_by=how,
        )
        who = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in wrong) or "nobody knows who"
        logger.error("Up to step %d memory or a processor went wrong: %s (%s).", suspicion.step, who, how)

    def _told(self, names: list[str]) -> list[str]:
        """Places in words: the optimizer numbers its parameters."""
        parameters = [name for name, _ in self._model.named_parameters()]
        return [_in_words(name, parameters) for name in names]


def _running_statistics(model: nn.Module) -> set[str]:
    """Places of the buffers of normalisation layers."""
    layers = [
        (name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.modules.batchnorm._NormBase)
    ]
    return {f"model.{name}.{buffer}" for name, layer in layers for buffer, _ in layer.named_buffers()}


def _in_words(name: str, parameters: list[str]) -> str:
    part, _, place = name.partition(".")
    words = place.split(".")
    if part == "optimizer" and words[0] == "state" and words[1].isdigit() and int(words[1]) < len(parameters):
        return f"{parameters[int(words[1])]} ({words[2]})"
    return place


def _persistent(step: int, names: list[str], wrong: list[int], *, is_start: bool) -> CorruptionError:
    listed = ", ".join(names[:_TOLD])
    who = f"rank {', '.join(map(str, wrong))} is wrong" if wrong else "who is wrong is not known"
    when = "and there is no state to go back to" if is_start else f"again after {_MAX_REPLAYS} replays"
    error = CorruptionError(
        f"The replicas of the model differ at step {step}, {when}: {len(names)} tensors ({listed}); {who}. Memory or a "
        "processor may be failing: take that machine out and give the command again, which goes on from the newest "
        "checkpoint. If the workers are machines of different kinds, or a hook or the optimizer treats ranks "
        "differently, their replicas are never equal: leave compare_replicas_every_n_steps out then."
    )
    error.on_all_ranks = True
    return error
