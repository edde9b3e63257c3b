"""One run of a training, from its state at the start to its results: epochs, safe points, saves."""

import logging
from dataclasses import dataclass

import torch

from ray_trainer import distributed, pulse
from ray_trainer.config import TrainingConfig
from ray_trainer.evaluation import ValidationLoop
from ray_trainer.hooks import NO_REQUEST, HookCaller, Request, StepRecord, requested
from ray_trainer.hooks.checks import Hook
from ray_trainer.loop import TrainingLoop
from ray_trainer.pulse import Phase
from ray_trainer.recording import Recorder
from ray_trainer.replicas import Replicas
from ray_trainer.rollback import Rollback
from ray_trainer.runtime import Stop
from ray_trainer.saving import Saver
from ray_trainer.setup import Setup
from ray_trainer.shortage import is_shortage
from ray_trainer.triggers import Moment, any_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Safeguards:
    """What keeps states of a run, and brings them back while it goes on.

    Attributes:
        saver: on storage, and in memory outside of this process.
        rollback: in this process, for numbers that go wrong.
        replicas: likewise, for what memory and processors do wrong.
    """

    saver: Saver
    rollback: Rollback
    replicas: Replicas


class Run:
    """Carries a training from where it is to its end.

    The order of an epoch: start → steps → validation → log → save → end. Between two steps, at the safe point:
    hooks → log → validation → save. All decisions are equal on all ranks: they follow from the progress, from
    reduced numbers, or from what was agreed with the step.
    """

    def __init__(
        self,
        config: TrainingConfig,
        setup: Setup,
        loop: TrainingLoop,
        validation: ValidationLoop,
        recorder: Recorder,
        safeguards: Safeguards,
        hooks: HookCaller,
        interruption: Stop = Stop.NONE,
    ) -> None:
        """Take the parts.

        Args:
            config: how to train.
            setup: what was decided.
            loop: runs steps.
            validation: measures the model.
            recorder: of metrics.
            safeguards: of the state.
            hooks: of the user.
            interruption: there is nothing to do any more but to save.
        """
        self._limits = setup.limits
        self._sources = setup.sources
        self._loop = loop
        self._validation = validation
        self._recorder = recorder
        self._saver = safeguards.saver
        self._progress = recorder.progress
        self._hooks = hooks
        self._validate_at = any_of(steps=config.validate_every_n_steps, epochs=config.validate_every_n_epochs)
        self._save_requested = False
        self._is_alone = distributed.world_size() == 1
        self._rollback = safeguards.rollback
        self._replicas = safeguards.replicas
        self._has_gone_back = False
        self.interruption = interruption

    def execute(self) -> None:
        """Train to the end, to an early stop or to an interruption. Collective."""
        try:
            self._compare_replicas(is_saved=True)
            if self.interruption is Stop.NONE:
                self._catch_up()
            self._loop.restart_clock()
            with pulse.measured(not self._is_alone):
                self._train()
        except Exception as error:
            if self._loop.is_whole and distributed.ends_generation(error):
                self._saver.keep(self._recorder.metrics())
            elif self._is_alone and self._loop.is_whole:
                self._recorder.flush()
                self._saver.save_after_error(self._recorder.metrics())
            if is_shortage(error):
                raise self._loop.explained(error) from error
            raise

    def _catch_up(self) -> None:
        """Do what belongs to the last completed step and was not done when its checkpoint was written."""
        progress = self._progress
        if progress.step == 0:
            if self._rollback.needs_first_checkpoint():
                self._save()
            self._rollback.keep()
            return
        ends_epoch, is_end = self._limits.ends_epoch(progress), self._limits.reached(progress)
        if progress.epoch_logged and not is_end:
            if self._saver.is_behind and self._saver.due(self._moment(is_epoch_end=True)):
                self._save()
            self._end_epoch()
        elif is_end and not self._recorder.has_closed:
            self._close_epoch(ends_epoch)
        elif progress.step_in_epoch and not ends_epoch and not is_end:
            self._safe_point(is_resumed=True)

    def _train(self) -> None:
        progress = self._progress
        while self._has_gone_back or (not self._limits.reached(progress) and self.interruption is Stop.NONE):
            if self._has_gone_back:
                self._has_gone_back = False
                self._catch_up()
                continue
            if progress.step_in_epoch == 0 and self._hooks.on_epoch_start is not None:
                self._hooks.on_epoch_start(progress.epoch)
            is_whole = self._train_epoch()
            if not self._has_gone_back and self.interruption is Stop.NONE:
                self._close_epoch(is_whole)
        self._compare_replicas(is_saved=True)  # after an interruption, if they differ, an earlier step is saved
        self._recorder.flush()
        self._saver.save_last(self._recorder.metrics())
        if self.interruption is not Stop.NONE:
            logger.warning("Stopped after step %d: %s.", progress.step, self.interruption.name)

    def _train_epoch(self) -> bool:
        """The remaining steps of the epoch in progress, or those up to a limit; whether it is whole then."""
        if self._limits.ends_epoch(self._progress):
            return True
        for record in self._loop.steps(self._sources.train):
            self._save_requested |= self._loop.agreed.wants_save
            if self._loop.wants_rollback and self._roll_back(record):
                return False
            self._after_step(record)
            self.interruption = max(self.interruption, self._loop.agreed.stop)
            if self._has_gone_back:
                return False
            if self.interruption is not Stop.NONE or self._limits.reached(self._progress):
                return self._limits.ends_epoch(self._progress)
            if self._loop.agreed.may_grow:
                raise distributed.RegroupError("another worker is ready to join")
        return True

    def _roll_back(self, record: StepRecord) -> bool:
        """Undo what led to a step that went wrong; whether the run is at an earlier step now."""
        self._loop.is_whole = False
        self._has_gone_back = self._rollback.carry_out(record)
        self._loop.is_whole = True
        return self._has_gone_back

    def _after_step(self, record: StepRecord) -> None:
        self._recorder.step(record, self._loop.take_data_wait_s())
        for straggler in self._loop.agreed.stragglers:
            self._recorder.straggler(straggler)
        self._call_after_step(record)
        self._saver.poll(self._loop.agreed.busy)
        if self._compare_replicas(is_saved=self._saver.snapshot_is_due(self._loop.agreed.busy)):
            return
        if not self._limits.ends_epoch(self._progress) and not self._limits.reached(self._progress):
            self._safe_point()  # else validation and saving belong to the end of the epoch

    def _safe_point(self, is_resumed: bool = False) -> None:
        """Validate and save where that is due; after a resume only what was missed."""
        moment = self._moment(is_epoch_end=False)
        must_validate = self._validate_at.due(moment) and not self._recorder.has_validated
        if must_validate and not self._validate():
            return
        if not is_resumed:
            self._snapshot()
        is_due = self._saver.due(moment) and (must_validate or not is_resumed or self._saver.is_behind)
        if self._save_requested or is_due:
            self._save(may_skip=not self._save_requested)
        self._rollback.keep()

    def _close_epoch(self, is_whole: bool) -> None:
        """Validate, log, save and end the epoch in progress, which a limit may have cut short."""
        progress = self._progress
        moment = self._moment(is_epoch_end=is_whole)
        is_end = self._limits.reached(progress) or progress.epoch + 1 >= self._limits.epochs
        must_validate = (self._validate_at.due(moment) or is_end) and not self._recorder.has_validated
        if must_validate and not self._validate():
            return
        self._recorder.epoch()
        progress.epoch_logged = is_whole
        self._snapshot()
        if self._save_requested or self._saver.due(moment) or self._limits.reached(progress):
            self._save()
        if not self._has_gone_back:
            self._end_epoch()

    def _end_epoch(self) -> None:
        progress = self._progress
        self._rollback.keep()
        self._ask(self._hooks.on_epoch_end, progress.epoch, self._recorder.epoch_metrics())
        if progress.epoch_logged:
            progress.complete_epoch()
            self._recorder.reset_epoch()

    def _validate(self) -> bool:
        """Measure the model where there is validation data; False if that was interrupted."""
        if self._sources.val is None:
            return True
        means = self._validation.run(self._sources.val)
        if means is None:
            self.interruption = max(self.interruption, self._validation.stop)
            return False
        self._ask(self._hooks.on_validation_end, {f"val_{name}": value for name, value in means.items()})
        self._recorder.validation(means)
        return True

    def _snapshot(self) -> None:
        """Take one where it is due; once all rows of the step are written, or they would come again after a resume."""
        if self._saver.snapshot_is_due(self._loop.agreed.busy):
            self._recorder.flush()
            self._saver.snapshot(self._recorder.metrics())

    def _save(self, may_skip: bool = False) -> None:
        self._save_requested = False
        self._recorder.flush()
        if not self._compare_replicas(is_saved=True):
            self._saver.save(self._recorder.metrics(), may_skip)

    def _compare_replicas(self, is_saved: bool) -> bool:
        """Compare them where that is due; whether they differed, so that the run is at an earlier step now."""
        if self._replicas.is_due(is_saved):
            self._recorder.flush()
            self._loop.is_whole = False
            self._has_gone_back |= self._replicas.check()
            self._loop.is_whole = True
        return self._has_gone_back

    def _call_after_step(self, record: StepRecord) -> None:
        hooks = self._hooks
        if hooks.on_batch_end is None and hooks.on_step_end is None:
            return
        before = pulse.beat(Phase.HOOK)
        request = NO_REQUEST
        if hooks.on_batch_end is not None:
            first = (self._progress.step_in_epoch - 1) * self._sources.micro_batches_a_step
            for index, loss in enumerate(self._loop.batch_losses, start=first):
                request |= requested(hooks.on_batch_end(index, float(loss.mean.detach())))
        if hooks.on_step_end is not None:
            request |= requested(hooks.on_step_end(record))
        pulse.beat(before)
        self._agree_on(request)  # once a step: ranks may have different numbers of micro-batches

    def _ask(self, hook: Hook | None, *arguments: object) -> None:
        """Call a hook that every rank has or none, and carry out what it asks for. Collective if it is there."""
        if hook is not None:
            self._agree_on(requested(hook(*arguments)))

    def _agree_on(self, request: Request) -> None:
        """Carry out what the hooks of any rank ask for. Collective."""
        mine = torch.tensor([[request.value]], dtype=torch.float64)
        for value in distributed.gather_rows(mine).flatten().tolist():
            if Request.STOP in Request(int(value)) and self._progress.stop_reason is None:
                self._progress.stop_reason = "a hook asked to stop"
            self._save_requested |= Request.SAVE in Request(int(value))

    def _moment(self, is_epoch_end: bool) -> Moment:
        progress = self._progress
        idle_s = progress.elapsed_s - self._saver.saved_at_s
        return Moment(progress.step, progress.epoch, is_epoch_end, idle_s)
