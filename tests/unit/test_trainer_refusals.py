"""Wrong input in Python: refused before the first step, named, and nothing is left on disk."""

import json
from types import SimpleNamespace

import pytest
import torch
from experiments import POINTS, Network, Points, everything_in, settings
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

from ray_trainer import TaskSpec, Trainer, get_default_task_specs
from ray_trainer.errors import ConfigError


class Stream(IterableDataset):
    def __init__(self, size):
        self.size = size

    def __iter__(self):
        points = Points(10)
        return (points[index] for index in range(self.size))


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def rows(size=9, **changes):
    points = Points(size)
    return Rows([points[index] | changes for index in range(size)])


def refused(run_dir, train_data, *, val_data=None, task=POINTS, model=None, resume_from=None, **changes):
    """The message; nothing must be there afterwards."""
    model = model or Network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = settings(run_dir, **changes)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the caller looks at the message
        Trainer(model, SimpleNamespace(), config, task).train(train_data, val_data, resume_from)
    assert not run_dir.exists(), sorted(run_dir.iterdir())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return str(caught.value)


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "run"


@pytest.mark.parametrize("data", [Points(0), [], Stream(0)], ids=["map-style", "list", "iterable"])
def test_empty_training_data_is_refused(run_dir, data):
    message = refused(run_dir, data, max_steps=4)

    assert "0 samples" in message or "empty" in message


def test_empty_validation_data_is_refused(run_dir):
    message = refused(run_dir, Points(9), val_data=Points(0))

    assert "validation" in message.lower() or "val" in message


@pytest.mark.parametrize("label", [3, -1, 2**40])
def test_label_out_of_range_in_the_first_batch_is_named(run_dir, label):
    message = refused(run_dir, rows(labels=torch.tensor(label)))

    assert "labels" in message
    assert str(label) in message


def test_label_out_of_range_in_the_validation_data_is_named_before_training(run_dir):
    message = refused(run_dir, Points(9), val_data=rows(labels=torch.tensor(7)))

    assert "labels" in message
    assert "7" in message


@pytest.mark.parametrize("label", [3, -1])
def test_label_out_of_range_only_later_in_the_data_is_named_when_it_comes(tmp_path, label):
    data = Points(19)
    data.labels[17] = label
    trainer = Trainer(Network(), SimpleNamespace(), settings(tmp_path, shuffle=False), POINTS)

    with pytest.raises(ValueError, match=rf"labels.*{label}"):
        trainer.train(data)


def test_float_labels_for_classes_are_named(run_dir):
    assert "labels" in refused(run_dir, rows(labels=torch.tensor(1.5)))


def test_features_of_another_width_than_the_model_takes_are_named(run_dir):
    message = refused(run_dir, rows(features=torch.zeros(11)))

    assert "features" in message
    assert "11" in message or "10" in message


def test_column_that_the_task_wants_and_the_data_lacks_is_named(run_dir):
    message = refused(run_dir, Rows([{"inputs": torch.zeros(6), "labels": torch.tensor(1)}] * 9))

    assert "features" in message
    assert "inputs" in message  # what there is


def test_data_without_labels_is_named(run_dir):
    assert "labels" in refused(run_dir, Rows([{"features": torch.zeros(6)}] * 9))


def test_text_where_tensors_belong_is_named(run_dir):
    message = refused(run_dir, Rows([{"features": "hello", "labels": torch.tensor(1)}] * 9))

    assert "features" in message
    assert "text" in message or "str" in message


def test_samples_of_different_shape_are_named(run_dir):
    data = Rows([{"features": torch.zeros(6 + index % 2), "labels": torch.tensor(1)} for index in range(9)])

    assert "features" in refused(run_dir, data, shuffle=False)


def test_token_beyond_the_vocabulary_of_the_model_is_named(run_dir):
    class Speaker(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(10, 10)

        def forward(self, input_ids):
            return self.embedding(input_ids)

    ids = torch.full((6, 8), 12)
    message = refused(run_dir, TensorDataset(ids, ids), task=get_default_task_specs()["lm_tiny"], model=Speaker())

    assert "input_ids" in message
    assert "12" in message


def test_sample_that_cannot_be_read_is_named(run_dir):
    data = Points(9)

    def fail(index):
        raise OSError("no such image")

    data.on_read = fail

    assert "no such image" in refused(run_dir, data)


def test_data_that_is_no_data_is_refused(run_dir):
    assert "int" in refused(run_dir, 5)
    assert refused(run_dir, None)


@pytest.mark.parametrize("monitor", ["val_lose", "val_f1", "loss"])
def test_monitor_that_the_run_will_not_have_is_named_with_those_it_will(run_dir, monitor):
    message = refused(run_dir, Points(9), val_data=Points(5), monitor=monitor)

    assert monitor in message
    assert "val_loss" in message


def test_monitor_of_validation_without_validation_data_is_refused(run_dir):
    assert "val_accuracy" in refused(run_dir, Points(9), monitor="val_accuracy", mode="max")


def test_unknown_loss_is_named_at_construction(run_dir):
    task = TaskSpec("points", "tabular_classification", input_fields=["features"], loss_type="crossentropy")

    message = refused(run_dir, Points(9), task=task)

    assert "crossentropy" in message
    assert "cross_entropy" in message


@pytest.mark.parametrize("where", ["nowhere", "checkpoint_epoch0000_step00000001"])
def test_resume_from_a_path_that_does_not_exist_is_an_error_that_names_it(tmp_path, where):
    trainer = Trainer(Network(), SimpleNamespace(), settings(tmp_path / "run"), POINTS)

    with pytest.raises(FileNotFoundError, match=where):
        trainer.train(Points(9), resume_from=str(tmp_path / where))

    assert not (tmp_path / "run").exists()
    assert list(tmp_path.iterdir()) == []


def test_resume_from_an_empty_directory_is_an_error_that_names_it(tmp_path):
    (tmp_path / "empty").mkdir()
    trainer = Trainer(Network(), SimpleNamespace(), settings(tmp_path / "run"), POINTS)

    with pytest.raises(FileNotFoundError, match="empty"):
        trainer.train(Points(9), resume_from=str(tmp_path / "empty"))

    assert not (tmp_path / "run").exists()


def test_resume_with_another_model_is_refused_and_both_sides_are_listed(tmp_path):
    class Deeper(Network):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(2, 2)

    Trainer(Network(), SimpleNamespace(), settings(tmp_path, max_steps=2), POINTS).train(Points(9))
    files = everything_in(tmp_path)
    other = Trainer(Deeper(), SimpleNamespace(), settings(tmp_path), POINTS)

    with pytest.raises((ValueError, RuntimeError), match=r"extra\.weight"):
        other.train(Points(9), resume_from="auto")

    assert everything_in(tmp_path) == files


def test_model_without_trainable_parameters_is_refused(run_dir):
    model = Network()
    model.requires_grad_(False)

    assert "Network" in refused(run_dir, Points(9), model=model)


def test_wrong_configuration_is_refused_with_all_errors_at_once(run_dir):
    message = refused(run_dir, Points(9), epochs=0, learning_rate=float("nan"), save_every_n_epochs=0, batch_size=1.5)

    assert message.startswith("Configuration validation failed:")
    assert all(name in message for name in ("epochs", "learning_rate", "save_every_n_epochs", "batch_size"))


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda model: {"optimizer": torch.optim.LBFGS(model.parameters())}, "LBFGS"),
        (lambda model: {"optimizer": torch.optim.SGD(Network().parameters(), lr=0.1)}, "not the model's"),
        (lambda model: _with_schedule(model, torch.optim.lr_scheduler.ReduceLROnPlateau), "ReduceLROnPlateau"),
        (lambda model: {"scheduler": _with_schedule(model, _constant)["scheduler"]}, "pass that as well"),
    ],
    ids=["several losses a step", "another model's", "follows a metric", "without its optimizer"],
)
def test_optimizer_or_schedule_that_would_not_work_is_refused(run_dir, build, named):
    model = Network()

    with pytest.raises(ConfigError, match=named):
        Trainer(model, SimpleNamespace(), settings(run_dir), POINTS, **build(model))

    assert not run_dir.exists()


def _constant(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def _with_schedule(model, schedule):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return {"optimizer": optimizer, "scheduler": schedule(optimizer)}


@pytest.mark.parametrize("output", [{"out": torch.zeros(2, 3)}, None, [1.0], ()], ids=["dict", "none", "list", "empty"])
def test_model_whose_output_cannot_be_read_is_refused(run_dir, output):
    class Strange(Network):
        def forward(self, features):
            return output

    message = refused(run_dir, Points(12), model=Strange())

    assert "The first batch fails in the model or the loss" in message
    assert "line " not in message  # it would be one of ours


def test_error_below_the_users_model_is_told_with_the_line_of_the_model(run_dir):
    class Broken(Network):
        def forward(self, features):
            return json.loads("no JSON")

    message = refused(run_dir, Points(12), model=Broken())

    assert "JSONDecodeError" in message
    assert f"({__file__}, line " in message
    assert ': return json.loads("no JSON")). Compare' in message


def test_run_is_not_continued_with_another_optimizer(run_dir):
    Trainer(Network(), SimpleNamespace(), settings(run_dir, optimizer="adamw"), POINTS).train(Points(12))
    before = everything_in(run_dir)

    with pytest.raises(ValueError, match="optimizer was 'adamw' and is 'sgd'"):
        Trainer(Network(), SimpleNamespace(), settings(run_dir, optimizer="sgd", epochs=9), POINTS).train(
            Points(12), resume_from="auto"
        )

    assert everything_in(run_dir) == before


def test_model_that_cuts_its_gradients_off_is_told_to_the_user(tmp_path):
    class Detached(Network):
        def forward(self, features):
            return super().forward(features).detach()

    with pytest.raises(ConfigError, match=r"depends on no parameter.*detach"):
        Trainer(Detached(), SimpleNamespace(), settings(tmp_path), POINTS).train(Points(12))


def test_run_directory_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigError, match=r"checkpoint_dir: .*file is a file\. Name a directory"):
        Trainer(Network(), SimpleNamespace(), settings(tmp_path / "file" / "run"), POINTS).train(Points(12))
