"""When a training calls which hook, with what, and what a hook may ask for."""

from types import SimpleNamespace

import pytest
import torch
from experiments import POINTS, Network, Points, checkpoints, events, settings

from ray_trainer import DefaultHooks, Request, Trainer
from ray_trainer.checkpoint import CheckpointManager

NAMES = (
    "on_training_start", "on_resume", "on_epoch_start", "on_batch_end", "on_step_end", "on_validation_end",
    "on_epoch_end", "on_checkpoint_saved", "on_exception", "on_training_end",
)  # fmt: skip


class Log:
    """All hooks; writes down each call and answers, or raises, as it is told."""

    def __init__(self, answers=None):
        self.calls = []
        self.answers = answers or {}

    def _note(self, name, *arguments):
        self.calls.append((name, *arguments))
        count = sum(call[0] == name for call in self.calls)
        answer = self.answers.get((name, count), self.answers.get(name))
        if isinstance(answer, Exception):
            raise answer
        return answer

    @property
    def names(self):
        return [call[0] for call in self.calls]

    def of(self, name):
        return [call[1:] for call in self.calls if call[0] == name]


def _signed(name):
    """A method with the contract's own parameters, because a hook's signature is checked."""
    parameters = {"on_epoch_start": "epoch", "on_batch_end": "batch_idx, loss", "on_step_end": "record"}
    parameters |= {"on_resume": "record", "on_checkpoint_saved": "record", "on_exception": "error"}
    parameters |= {"on_validation_end": "metrics", "on_epoch_end": "epoch, metrics"}
    listed = parameters.get(name, "")
    return eval(f"lambda self, {listed}: self._note({name!r}, {listed})")


for _name in NAMES:
    setattr(Log, _name, _signed(_name))


def train(run_dir, hooks, size=7, val=True, resume_from=None, data=None, **changes):
    torch.manual_seed(0)
    config = settings(run_dir, **({"epochs": 2, "warmup_steps": 0} | changes))
    trainer = Trainer(Network(), SimpleNamespace(), config, POINTS, hooks)
    return trainer.train(data or Points(size), Points(5, seed=1) if val else None, resume_from)


def test_hooks_are_called_in_the_order_of_the_contract(tmp_path):
    log = Log()

    train(tmp_path, log)

    step = ["on_batch_end", "on_batch_end", "on_step_end"]
    epoch = ["on_epoch_start", *step, *step, "on_validation_end", "on_checkpoint_saved", "on_epoch_end"]
    assert log.names == ["on_training_start", *epoch, *epoch, "on_training_end"]


def test_hooks_get_the_arguments_of_the_contract(tmp_path):
    log = Log()

    summary = train(tmp_path, log)["metrics_summary"]

    assert log.of("on_epoch_start") == [(0,), (1,)]
    assert [index for index, _ in log.of("on_batch_end")] == [0, 1, 2, 3] * 2
    assert all(type(loss) is float for _, loss in log.of("on_batch_end"))
    assert [(r.step, r.epoch, r.num_samples) for (r,) in log.of("on_step_end")] == [
        (1, 0, 4), (2, 0, 3), (3, 1, 4), (4, 1, 3)
    ]  # fmt: skip
    for (metrics,), (epoch, whole), (_, row) in zip(
        log.of("on_validation_end"), log.of("on_epoch_end"), summary.iterrows(), strict=True
    ):
        assert metrics == {"val_loss": row["val/loss"], "val_accuracy": row["val/accuracy"]}
        train_metrics = {"loss": row["train/loss"], "accuracy": row["train/accuracy"]}
        assert whole == metrics | train_metrics | {f"train_{name}": value for name, value in train_metrics.items()}
        assert epoch == row["epoch"]
    assert [record.step for (record,) in log.of("on_checkpoint_saved")] == [2, 4]


def test_without_validation_data_the_validation_hook_is_not_called_and_no_val_metric_is_told(tmp_path):
    log = Log()

    train(tmp_path, log, val=False)

    assert log.of("on_validation_end") == []
    assert {*log.of("on_epoch_end")[0][1]} == {"train_loss", "train_accuracy", "loss", "accuracy"}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("on_resume", "on_exception")])
def test_any_single_hook_may_be_all_that_is_implemented(tmp_path, name):
    only = type("Only", (), {"_note": Log._note, "__init__": Log.__init__, name: vars(Log)[name]})()

    train(tmp_path, only, epochs=1)

    assert {call[0] for call in only.calls} == {name}


def test_object_without_any_hook_serves(tmp_path):
    assert len(train(tmp_path, object(), epochs=1)["metrics_summary"]) == 1


def test_results_do_not_depend_on_which_hooks_there_are(tmp_path):
    with_all, without = train(tmp_path / "a", Log()), train(tmp_path / "b", None)

    drop = ["epoch_duration"]
    assert with_all["metrics_summary"].drop(columns=drop).equals(without["metrics_summary"].drop(columns=drop))


@pytest.mark.parametrize("name", NAMES[2:8])
def test_error_in_a_hook_ends_training_once_and_is_raised(tmp_path, name):
    log = Log({name: KeyError("mine")})

    with pytest.raises(KeyError, match="mine"):
        train(tmp_path, log)

    assert log.names[-2:] == ["on_exception", "on_training_end"]
    assert log.names.count("on_training_end") == 1


def test_error_at_the_end_of_a_failed_training_does_not_mask_the_first(tmp_path):
    log = Log({("on_step_end", 2): KeyError("first"), "on_training_end": OSError("second"), "on_exception": OSError()})

    with pytest.raises(KeyError, match="first") as caught:
        train(tmp_path, log)

    assert any("second" in note for note in caught.value.__notes__)
    assert isinstance(log.of("on_exception")[0][0], KeyError)


def test_error_at_the_end_of_a_good_training_is_raised(tmp_path):
    with pytest.raises(OSError, match="mine"):
        train(tmp_path, Log({"on_training_end": OSError("mine")}))

    assert len(checkpoints(tmp_path)) == 2


def test_error_before_training_starts_calls_no_hook(tmp_path):
    log = Log()

    with pytest.raises(ValueError, match="0 samples"):
        train(tmp_path, log, size=0)

    assert log.calls == []


@pytest.mark.parametrize("name", ["on_batch_end", "on_step_end"])
def test_request_to_stop_ends_the_run_after_that_step_as_if_it_were_the_last(tmp_path, name):
    log = Log({name: Request.STOP})

    results = train(tmp_path, log)

    assert [record.step for (record,) in log.of("on_step_end")] == [1]
    assert log.names[-4:] == ["on_validation_end", "on_checkpoint_saved", "on_epoch_end", "on_training_end"]
    assert checkpoints(tmp_path) == ["checkpoint_epoch0000_step00000001"]
    assert len(results["metrics_summary"]) == 1


@pytest.mark.parametrize("name", ["on_validation_end", "on_epoch_end"])
def test_request_to_stop_at_an_epoch_s_end_is_the_end_also_for_a_resumed_run(tmp_path, name):
    first = train(tmp_path, Log({name: Request.STOP}), epochs=5)

    log = Log()
    second = train(tmp_path, log, epochs=5, resume_from="auto")

    assert len(first["metrics_summary"]) == 1
    assert log.names == ["on_training_start", "on_resume", "on_training_end"]
    assert second["metrics_summary"].equals(first["metrics_summary"])


def test_request_to_save_makes_a_checkpoint_of_that_very_step(tmp_path):
    train(tmp_path, Log({("on_step_end", 1): Request.SAVE}))

    assert checkpoints(tmp_path)[0] == "checkpoint_epoch0000_step00000001"
    assert len(checkpoints(tmp_path)) == 3


def test_request_to_save_and_to_stop_combine(tmp_path):
    train(tmp_path, Log({("on_batch_end", 3): Request.SAVE | Request.STOP}))

    assert checkpoints(tmp_path) == ["checkpoint_epoch0000_step00000002"]


def test_request_to_save_in_the_last_hook_of_an_epoch_makes_no_second_copy_of_a_step(tmp_path):
    train(tmp_path, Log({"on_epoch_end": Request.SAVE}))

    assert len({name[:34] for name in checkpoints(tmp_path)}) == len(checkpoints(tmp_path))


def test_resumed_run_tells_so_and_goes_on_with_the_numbers_of_its_batches(tmp_path):
    with pytest.raises(KeyError):
        train(tmp_path, Log({("on_step_end", 3): KeyError()}))
    log = Log()

    train(tmp_path, log, resume_from="auto")

    assert log.names[:3] == ["on_training_start", "on_resume", "on_batch_end"]  # within epoch 1: it has started
    assert log.of("on_resume")[0][0].step == 3
    assert [index for index, _ in log.of("on_batch_end")] == [2, 3]


def test_state_of_hooks_is_in_the_checkpoint_and_comes_back(tmp_path):
    class Counter(DefaultHooks):
        def __init__(self):
            self.steps, self.losses = 0, torch.zeros(0)

        def on_step_end(self, record):
            self.steps += 1
            self.losses = torch.cat([self.losses, record.loss_sum.detach()[None]])

        def state_dict(self):
            return {"steps": self.steps, "losses": self.losses}

        def load_state_dict(self, state):
            self.steps, self.losses = state["steps"], state["losses"]

    whole, first, second = Counter(), Counter(), Counter()
    train(tmp_path / "whole", whole)
    constant = {"lr_scheduler_type": "constant"}
    train(tmp_path / "run", first, max_steps=3, **constant)
    assert CheckpointManager(tmp_path / "run").restore("newest").state["hooks"]["steps"] == 3

    train(tmp_path / "run", second, resume_from="auto", **constant)

    assert second.steps == whole.steps == 4
    assert torch.equal(second.losses[:3], first.losses)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("on_train_start", "on_training_start"),
        ("on_train_batch_end", "on_batch_end"),
        ("on_epoch_ended", "on_epoch_end"),
    ],
)
def test_misspelt_hook_is_refused_with_the_name_that_was_meant(tmp_path, wrong, right):
    hooks = type("Mine", (), {wrong: lambda self: None})()

    with pytest.raises(ValueError, match=f"{wrong}.*did you mean {right}"):
        train(tmp_path / "run", hooks)

    assert not (tmp_path / "run").exists()


def test_finished_run_says_so_in_its_events(tmp_path):
    train(tmp_path, None)

    assert len(events(tmp_path, "run_started")) == 1
    assert [(event["step"], event["epoch"]) for event in events(tmp_path, "checkpoint_saved")] == [(2, 0), (4, 1)]
    assert len(events(tmp_path, "run_finished")) == 1
