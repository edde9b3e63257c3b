import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ray_trainer.errors import ConfigError, DataError
from ray_trainer.losses import (
    ClassificationLoss,
    LanguageModelingLoss,
    LossResult,
    LossStrategyRegistry,
    PEFTAwareLoss,
    RegressionLoss,
)
from ray_trainer.task import (
    TASK_KINDS,
    Experiment,
    Task,
    TaskSpec,
    explain_forward_error,
    get_default_task_specs,
    loss_for,
)


class TinyLM(nn.Module):
    def __init__(self, vocabulary=12):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 8)
        self.head = nn.Linear(8, vocabulary)

    def forward(self, input_ids, attention_mask=None):
        return {"logits": self.head(self.embed(input_ids))}


class TinySeq2Seq(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.head = nn.Linear(8, 12)

    def forward(self, input_ids, attention_mask=None, decoder_input_ids=None):
        context = self.embed(input_ids).mean(dim=1, keepdim=True)
        return (self.head(self.embed(decoder_input_ids) + context),)


class Echo(nn.Module):
    """Returns logits that were put in, and remembers what it was called with."""

    def forward(self, logits, scale=1.0):
        self.scale = scale
        return logits


def task_of(spec, model, pad_token_id=None):
    return Task(spec, model, loss_for(spec), pad_token_id)


def ids(*shape, seed=0):
    return torch.randint(1, 12, shape, generator=torch.Generator().manual_seed(seed))


def test_language_model_trains_without_a_spec_on_pairs():
    model, inputs, labels = TinyLM(), ids(4, 6), ids(4, 6, seed=1)

    result = task_of(None, model).evaluate(model, (inputs, labels))
    result.loss.sum.backward()
    ours = model.head.weight.grad.clone()

    model.zero_grad()
    logits = model(inputs)["logits"]
    F.cross_entropy(logits[:, :-1].reshape(-1, 12), labels[:, 1:].reshape(-1), reduction="sum").backward()
    torch.testing.assert_close(ours, model.head.weight.grad, rtol=1e-5, atol=1e-5)  # sums in another order
    assert int(result.loss.count) == 20
    right = (logits[:, :-1].argmax(-1) == labels[:, 1:]).sum()
    assert result.metrics == ((right, 20),)


@pytest.mark.parametrize("batch", [ids(2, 5), (ids(2, 5),), {"input_ids": ids(2, 5)}])
def test_language_model_without_labels_predicts_its_own_input(batch):
    model = TinyLM()
    pair = (ids(2, 5), ids(2, 5))

    alone, paired = (task_of(None, model).evaluate(model, given) for given in (batch, pair))

    assert torch.equal(alone.loss.sum, paired.loss.sum)


def test_perfect_next_token_model_has_accuracy_one_and_a_copier_has_not():
    labels = torch.tensor([[1, 2, 3, 4, -100, -100]])
    perfect = F.one_hot(torch.tensor([[2, 3, 4, 0, 0, 0]]), 5).float() * 9
    copier = F.one_hot(torch.tensor([[1, 2, 3, 4, 0, 0]]), 5).float() * 9
    task = task_of(None, Echo())

    assert task.evaluate(Echo(), (perfect, labels)).metrics == ((3, 3),)
    assert task.evaluate(Echo(), (copier, labels)).metrics == ((0, 3),)


def test_mask_in_a_dict_reaches_model_and_loss():
    model = TinyLM()
    inputs, mask = ids(2, 5), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    batch = {"input_ids": inputs, "attention_mask": mask, "labels": inputs, "note": "not for the model"}

    result = task_of(TaskSpec.lm_tiny(), model).evaluate(model, batch)

    assert int(result.loss.count) == 2 + 4
    assert result.metrics[0][1] == 6


def test_pad_token_of_the_spec_wins_over_that_of_the_model():
    labels = torch.tensor([[5, 0, 3, 0]])
    spec = TaskSpec.lm_tiny()

    with_spec = task_of(spec, TinyLM(), pad_token_id=3).evaluate(TinyLM(), (ids(1, 4), labels))
    without = task_of(None, TinyLM(), pad_token_id=3).evaluate(TinyLM(), (ids(1, 4), labels))

    assert (int(with_spec.loss.count), int(without.loss.count)) == (1, 2)


def test_loss_of_a_task_knows_the_pad_token_by_itself():
    inputs = {"logits": torch.zeros(1, 4, 12), "labels": torch.tensor([[5, 0, 3, 0]])}

    assert int(loss_for(TaskSpec.lm_tiny(), pad_token_id=3).compute_loss(inputs).count) == 1
    assert int(loss_for(None, pad_token_id=3).compute_loss(inputs).count) == 2
    assert int(loss_for(TaskSpec("s", "seq2seq"), pad_token_id=3).compute_loss(inputs).count) == 3


def test_encoder_only_language_model_is_not_shifted():
    logits, labels = torch.randn(2, 5, 12), ids(2, 5)
    spec = TaskSpec("mlm", "lm", "encoder_only", input_fields=["logits"])

    result = task_of(spec, Echo()).evaluate(Echo(), (logits, labels))

    assert int(result.loss.count) == 10
    torch.testing.assert_close(result.loss.mean, F.cross_entropy(logits.flatten(0, 1), labels.flatten()))


def test_seq2seq_ignores_the_mask_of_the_encoder():
    model = TinySeq2Seq()
    batch = {
        "input_ids": ids(3, 9),
        "attention_mask": torch.zeros(3, 9),
        "decoder_input_ids": ids(3, 4),
        "labels": ids(3, 4, seed=2),
    }
    batch["labels"][0, 3] = 0  # the pad token

    task = task_of(TaskSpec.seq2seq_tiny(), model)
    result = task.evaluate(model, batch)
    result.loss.sum.backward()

    logits = model(**{name: batch[name] for name in ("input_ids", "decoder_input_ids")})[0]
    wanted = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=0, reduction="sum")
    torch.testing.assert_close(result.loss.sum, wanted)
    assert int(result.loss.count) == 11
    assert task.has_perplexity
    assert model.embed.weight.grad.abs().sum() > 0


def test_target_may_be_an_input_as_well():
    class WithLabels(nn.Module):
        def forward(self, input_ids, labels):
            self.saw = labels
            return F.one_hot(labels, 12).float()

    model, labels = WithLabels(), ids(2, 4)
    spec = TaskSpec("t5", "seq2seq", input_fields=["input_ids", "labels"])

    result = task_of(spec, model).evaluate(model, (ids(2, 4), labels))

    assert model.saw is labels
    assert result.metrics == ((8, 8),)


def test_image_classifier_trains_by_position():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    images, labels = torch.randn(5, 3, 8, 8), torch.tensor([0, 9, 3, 3, 1])
    task = task_of(TaskSpec.vision_tiny(), model)

    by_dict = task.evaluate(model, {"pixel_values": images, "labels": labels})
    by_tuple = task.evaluate(model, [images, labels])
    by_tuple.loss.sum.backward()

    assert torch.equal(by_dict.loss.sum, by_tuple.loss.sum)
    torch.testing.assert_close(by_tuple.loss.mean, F.cross_entropy(model(images), labels))
    assert by_tuple.metrics == (((model(images).argmax(1) == labels).sum(), 5),)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_text_classifier_reads_the_last_real_position():
    spec = TaskSpec("c", "text_classification", input_fields=["logits"], additional_config={"num_classes": 3})
    logits = torch.randn(2, 4, 3)
    batch = {
        "logits": logits,
        "attention_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]),
        "labels": ids(2) % 3,
    }

    result = task_of(spec, Echo()).evaluate(Echo(), batch)

    wanted = F.cross_entropy(torch.stack([logits[0, 1], logits[1, 3]]), batch["labels"], reduction="sum")
    torch.testing.assert_close(result.loss.sum, wanted)


def test_tabular_regression_reports_the_absolute_error():
    model = nn.Linear(3, 1)
    features, target = torch.randn(6, 3), torch.randn(6)
    spec = TaskSpec("prices", "regression", target_field="price")
    task = task_of(spec, model)

    result = task.evaluate(model, {"features": features, "price": target})
    result.loss.sum.backward()

    prediction = model(features)[:, 0]
    assert (task.metric_names, task.has_perplexity) == (("mae",), False)
    torch.testing.assert_close(result.loss.sum, ((prediction - target) ** 2).sum())
    torch.testing.assert_close(result.metrics[0][0], (prediction - target).abs().sum().detach())
    assert result.metrics[0][1] == 6
    assert not result.metrics[0][0].requires_grad


def test_multilabel_accuracy_is_elementwise():
    spec = TaskSpec("tags", "vision_multilabel", input_fields=["logits"])
    logits, labels = torch.tensor([[2.0, -1.0], [3.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, -100.0]])

    result = task_of(spec, Echo()).evaluate(Echo(), (logits, labels))

    assert result.metrics == ((2, 3),)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), cut=st.integers(1, 5))
def test_any_split_of_a_batch_adds_up_to_the_whole(seed, cut):
    model, inputs, labels = TinyLM(), ids(6, 5, seed=seed), ids(6, 5, seed=seed + 1)
    labels[labels < 3] = -100
    task = task_of(None, model)

    first, second, whole = (
        task.evaluate(model, {"input_ids": inputs[part], "labels": labels[part]})
        for part in (slice(0, cut), slice(cut, 6), slice(0, 6))
    )

    # The sums are float32 and added in another order; the counts are exact.
    torch.testing.assert_close(first.loss.sum + second.loss.sum, whole.loss.sum, rtol=1e-5, atol=1e-5)
    assert first.loss.count + second.loss.count == whole.loss.count
    assert [a + b for a, b in zip(first.metrics[0], second.metrics[0], strict=True)] == list(whole.metrics[0])


def test_metric_that_was_not_asked_for_is_not_computed():
    task = task_of(TaskSpec("lm", "lm", metrics=["loss"]), TinyLM())

    assert (task.metric_names, task.has_perplexity) == ((), False)
    assert task.evaluate(TinyLM(), (ids(2, 4), ids(2, 4))).metrics == ()


def test_loss_given_to_the_trainer_decides_what_is_measured():
    model = nn.Linear(4, 3)
    batch = (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))

    task = Task(None, model, PEFTAwareLoss(ClassificationLoss(), model))
    regression = Task(None, model, RegressionLoss())

    assert (task.metric_names, task.has_perplexity) == (("accuracy",), False)
    assert task.evaluate(model, batch).metrics == (((model(batch[0]).argmax(1) == batch[1]).sum(), 5),)
    assert regression.metric_names == ("mae",)


class SumOfLogits:
    def compute_loss(self, inputs):
        return LossResult(inputs["logits"].sum(), 7)


def test_foreign_loss_is_measured_by_the_task_type():
    logits, labels = torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 0])
    spec = TaskSpec("c", "classification", input_fields=["logits"])

    with_spec = Task(spec, Echo(), SumOfLogits()).evaluate(Echo(), (logits, labels))
    without = Task(None, Echo(), SumOfLogits()).evaluate(Echo(), (logits, labels))

    assert with_spec == (LossResult(torch.tensor(4.0), 7), ((1, 2),))
    assert without == (LossResult(torch.tensor(4.0), 7), ())


def test_loss_that_returns_a_mean_is_refused():
    class Mean:
        def compute_loss(self, inputs):
            return inputs["logits"].mean()

    with pytest.raises(ConfigError, match=r"Mean\.compute_loss returned Tensor\. Return LossResult"):
        Task(None, Echo(), Mean()).evaluate(Echo(), (torch.zeros(2, 2), torch.zeros(2)))


def test_evaluate_leaves_random_state_and_batch_alone():
    model, batch = TinyLM(), {"input_ids": ids(2, 4), "labels": ids(2, 4)}
    before, copy = torch.get_rng_state(), {name: value.clone() for name, value in batch.items()}

    task = task_of(TaskSpec.lm_tiny(), model)
    task.check_first_batch(batch)
    task.evaluate(model, batch)

    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(batch[name], copy[name]) for name in copy)


# What the model is given


def test_only_fields_that_forward_names_are_passed_without_a_spec():
    model = Echo()
    batch = {"logits": torch.zeros(2, 3, 4), "scale": 2.0, "index": 7, "labels": ids(2, 3) % 4}

    task_of(None, model).evaluate(model, batch)

    assert model.scale == 2.0


def test_forward_with_any_keyword_gets_everything_but_the_target():
    class TakesAll(nn.Module):
        def forward(self, **fields):
            self.saw = set(fields)
            return fields["logits"]

    model = TakesAll()
    task_of(None, model).evaluate(model, {"logits": torch.zeros(2, 3, 4), "extra": 1, "labels": ids(2, 3) % 4})

    assert model.saw == {"logits", "extra"}


def test_keyword_only_parameter_is_not_passed_by_position():
    class Keyword(nn.Module):
        def forward(self, x, *, factor):
            return x * factor

    spec = TaskSpec("k", "classification", input_fields=["x", "factor"])
    batch = {"x": torch.ones(2, 3), "factor": 2.0, "labels": torch.tensor([0, 1])}

    assert task_of(spec, Keyword()).evaluate(Keyword(), batch).loss.count == 2


def test_mask_is_left_out_for_a_model_that_does_not_take_one():
    model = nn.Sequential(nn.Embedding(12, 12))
    batch = {"input_ids": ids(2, 4), "attention_mask": torch.ones(2, 4), "labels": ids(2, 4)}

    result = task_of(TaskSpec.lm_tiny(), model).evaluate(model, batch)

    assert int(result.loss.count) == 6


def test_fields_in_another_order_than_the_parameters_are_refused():
    class Two(nn.Module):
        def forward(self, left, right, third):
            return left

    spec = TaskSpec("t", "classification", input_fields=["right", "left", "other"])
    batch = {name: torch.zeros(2, 3) for name in ("left", "right", "other")} | {"labels": torch.zeros(2)}

    with pytest.raises(DataError, match=r"do not fit Two\.forward\(left, right, third\)"):
        task_of(spec, Two()).evaluate(Two(), batch)


def test_batches_of_changing_structure_are_each_read_right():
    model, task = TinyLM(), task_of(TaskSpec.lm_tiny(), TinyLM())
    inputs, mask = ids(1, 4), torch.tensor([[1, 1, 0, 0]])

    counts = [
        int(task.evaluate(model, batch).loss.count)
        for batch in ((inputs, inputs), (inputs, mask, inputs), {"labels": inputs, "input_ids": inputs})
    ]

    assert counts == [3, 1, 3]


# Errors


@pytest.mark.parametrize(
    ("spec", "batch", "message"),
    [
        (TaskSpec.lm_tiny(), {"input_ids": ids(2, 4)}, "target field 'labels' is missing.*'input_ids' int64"),
        (
            TaskSpec.lm_tiny(),
            {"text": 1, "labels": ids(2, 4)},
            "input field 'input_ids' is missing.*'text' int",
        ),
        (TaskSpec.lm_tiny(), (ids(2, 4),), "1 elements.*the task names 2: input_ids, labels"),
        (TaskSpec.cls_tiny(), ids(2, 4), "the task names 2"),
        (TaskSpec.lm_tiny(), "a line", "of type str"),
        (None, 7, "of type int"),
        (None, {"x": 1, "y": 2, "labels": ids(2, 4)}, r"parameter of TinyLM\.forward\(input_ids"),
        (None, {"input_ids_": ids(2, 4)}, "target field 'labels' is missing"),
    ],
)
def test_batch_that_cannot_be_read_is_named_with_its_fields(spec, batch, message):
    task = task_of(spec, TinyLM())

    for read in (lambda: task.evaluate(TinyLM(), batch), lambda: task.check_first_batch(batch)):
        with pytest.raises(DataError, match=message):
            read()


@pytest.mark.parametrize(
    ("task_type", "labels", "message"),
    [
        ("classification", torch.tensor([0, 3]), "Label 3 in 'y' is out of range: the task has 3 classes"),
        ("classification", torch.tensor([0, -1]), "Label -1 in 'y'"),
        ("classification", torch.tensor([0.0, 1.0]), "'y' is torch.float32, but a class is a whole number"),
        ("classification", [0, 1], "'y' is a list of int, not a tensor"),
        ("classification", torch.tensor([0, 1, 2]), "'x' has 2 rows and the target 'y' has 3"),
        ("multilabel", torch.tensor([[0.0, 2.0, 1.0]] * 2), r"'y' holds 2; .* must be in 0\.\.1"),
        ("regression", torch.tensor([0.0, float("nan")]), "'y' is NaN or infinite in row 1"),
    ],
)
def test_first_batch_with_wrong_labels_is_refused(task_type, labels, message):
    spec = TaskSpec("t", task_type, input_fields=["x"], target_field="y", output_schema={"num_classes": 3})

    with pytest.raises(DataError, match=message):
        task_of(spec, nn.Linear(4, 3)).check_first_batch({"x": torch.zeros(2, 4), "y": labels})


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"dtype": "float32"}, "'input_ids' is int64, input_schema says float32"),
        ({"shape": [5]}, r"a sample of field 'input_ids' has shape \(4,\), input_schema says \(5,\)"),
        ({"max": 3}, "'input_ids' holds values from 1 to 7, input_schema allows 1 to 3"),
    ],
)
def test_first_batch_that_differs_from_the_schema_is_refused(schema, message):
    batch = {"input_ids": torch.tensor([[1, 2, 3, 7]]), "labels": ids(1, 4)}
    spec = TaskSpec("lm", "lm", input_schema={"input_ids": schema})

    with pytest.raises(DataError, match=message):
        task_of(spec, TinyLM()).check_first_batch(batch)


def test_first_batch_that_fits_passes():
    schema = {"input_ids": {"dtype": "int64", "shape": [None], "min": 0, "max": 11}}
    spec = TaskSpec("lm", "lm", special_tokens={"pad": 99}, input_schema=schema, output_schema={"vocab_size": 12})

    task_of(spec, TinyLM()).check_first_batch((ids(2, 4), torch.tensor([[1, 11, 99, -100]] * 2)))


def test_text_that_was_not_tokenized_is_named():
    spec = TaskSpec("c", "text_classification", input_fields=["review"])

    with pytest.raises(DataError, match="field 'review' holds text"):
        task_of(spec, nn.Linear(1, 1)).check_first_batch({"review": ["good", "bad"], "labels": ids(2)})


def test_label_out_of_range_in_a_step_names_the_column():
    spec = TaskSpec("digits", "tabular_classification", target_field="digit")
    batch = {"features": torch.zeros(2, 4), "digit": torch.tensor([0, 3])}

    with pytest.raises(DataError, match=r"Label 3 in 'digit'.*0\.\.2.*at least 4 outputs") as caught:
        task_of(spec, nn.Linear(4, 3)).evaluate(nn.Linear(4, 3), batch)
    assert isinstance(caught.value.__cause__, IndexError)


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (nn.Linear(5, 3), (torch.zeros(2, 4), ids(2)), r"cannot be multiplied.*element 0 float32 \(2, 4\)"),
        (nn.Linear(4, 3), (torch.zeros(2, 4).double(), ids(2)), "element 0 float64"),
        (nn.Conv2d(3, 4, 1), (torch.zeros(2, 1, 4, 4), ids(2)), "channels"),
        (TinyLM(12), (torch.tensor([[3, 50]]), ids(1, 2)), r"holds 3\.\.50.*embed 0\.\.11"),
        (nn.Linear(4, 3), (torch.zeros(2, 4), torch.zeros(2, 4), ids(2)), r"forward\(\) takes 2 positional"),
    ],
)
def test_batch_that_does_not_fit_the_model_is_described(model, batch, message):
    with pytest.raises(DataError, match=message) as caught:
        task_of(None, model).evaluate(model, batch)
    assert ".forward(" in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA out of memory"), ValueError("mine"), TypeError("unsupported operand"), KeyError("x")],
)
def test_error_of_another_cause_passes_through(error):
    class Fails(nn.Module):
        def forward(self, x):
            raise error

    assert explain_forward_error(error, (ids(2), ids(2)), Fails()) is None
    with pytest.raises(type(error)) as caught:
        task_of(None, Fails()).evaluate(Fails(), (ids(2), ids(2)))
    assert caught.value is error


# TaskSpec


def test_default_specs_are_valid_and_survive_json():
    specs = get_default_task_specs()

    assert set(specs) == {"lm_tiny", "cls_tiny", "seq2seq_tiny", "vision_tiny"}
    for spec in specs.values():
        assert spec.validate()
        assert TaskSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize("task_type", sorted(TASK_KINDS))
def test_every_task_type_is_complete_with_a_name_alone(task_type):
    spec = TaskSpec("t", task_type)

    assert spec.validate()
    assert callable(loss_for(spec).compute_loss)
    assert Task(spec, nn.Linear(1, 1), loss_for(spec)).metric_names in (("accuracy",), ("mae",))


def test_everything_wrong_with_a_spec_is_listed_at_once():
    spec = TaskSpec(
        name="",
        task_type="clasification",
        model_family="encoder-only",
        input_fields=["x", "x"],
        special_tokens={"pad_tokn_id": 0, "eos_token_id": -1},
        additional_config={"num_class": 3, "num_classes": 0, "class_weights": "balanced"},
        modality="txt",
        input_schema={"y": {}, "x": {"dtype": "int46", "shapes": 3, "min": "0"}},
        output_schema={"vocab_size": 2.5},
    )

    with pytest.raises(ConfigError, match="Task specification '' cannot be used:") as caught:
        spec.validate()

    text = str(caught.value)
    for part in (
        "name is ''",
        "did you mean 'classification'?",
        "did you mean 'encoder_only'?",
        "names a field twice",
        "did you mean 'pad_token_id'?",
        "special_tokens['eos_token_id'] is -1",
        "did you mean 'num_classes'?",
        "additional_config['num_classes'] is 0",
        "['class_weights'] is 'balanced'",
        "did you mean 'text'?",
        "input_schema: 'y' is unknown",
        "['dtype'] is 'int46'",
        "did you mean 'shape'?",
        "['min'] is '0'",
        "output_schema['vocab_size'] is 2.5",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task_type": "lm", "loss_type": "mse"}, "'mse' does not fit task_type 'lm'"),
        ({"task_type": "lm", "loss_type": "mystery"}, "'mystery' is not registered"),
        ({"task_type": "regression", "metrics": ["accuracy"]}, "metrics: 'accuracy' is unknown.*loss, mae"),
        ({"task_type": "seq2seq", "additional_config": {"shift_labels": True}}, "task_type 'lm' only"),
        ({"task_type": "vision_classification", "modality": "text"}, "Use 'vision'"),
        (
            {"task_type": "classification", "additional_config": {"num_classes": 3, "class_weights": [1, 2]}},
            "2 entries for 3 classes",
        ),
    ],
)
def test_parts_of_a_spec_that_contradict_each_other_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        TaskSpec("t", **fields).validate()


def test_unknown_field_in_a_dict_names_the_closest_one():
    with pytest.raises(
        ConfigError, match=r"'target_feild'; did you mean 'target_field'\?[\s\S]*'task_type' is missing"
    ):
        TaskSpec.from_dict({"name": "t", "target_feild": "y"})


def test_loss_type_and_class_weights_choose_the_loss():
    huber = loss_for(TaskSpec("r", "regression", loss_type="huber"))
    weighted = loss_for(TaskSpec("c", "classification", additional_config={"class_weights": [1, 3]}))

    inputs = {"logits": torch.tensor([[4.0]]), "labels": torch.tensor([[0.0]])}
    assert huber.compute_loss(inputs).sum.item() == 3.5
    assert weighted.compute_loss({"logits": torch.zeros(1, 2), "labels": torch.tensor([1])}).count.item() == 3
    assert isinstance(loss_for(None), LanguageModelingLoss)


def test_registered_loss_can_be_named_in_a_spec():
    LossStrategyRegistry.register("sum_of_logits")(SumOfLogits)

    assert isinstance(loss_for(TaskSpec("t", "lm", loss_type="sum_of_logits")), SumOfLogits)


# Experiment


def build_model(model_config):
    return nn.Linear(1, 1)


def build_datasets(model_config, training_config):
    return {"train": []}


def test_experiment_survives_pickling():
    experiment = Experiment(build_model, build_datasets, task_spec=TaskSpec.lm_tiny())

    assert pickle.loads(pickle.dumps(experiment)) == experiment


def test_everything_wrong_with_an_experiment_is_listed_at_once():
    with pytest.raises(ConfigError, match="Experiment cannot be used:") as caught:
        Experiment(
            build_model=nn.Linear(1, 1),
            build_datasets=build_model,
            task_spec="lm_tiny",
            build_hooks=build_model,
            collate_fn=3,
        )

    for part in (
        "build_model is a model",
        "build_datasets takes (model_config)",
        "task_spec is 'lm_tiny'",
        "build_hooks takes (model_config). Give a function build_hooks()",
        "collate_fn is 3",
    ):
        assert part in str(caught.value)
