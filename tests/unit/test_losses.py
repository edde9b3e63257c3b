import logging

import numpy as np
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
    ModelOutput,
    MultiLabelLoss,
    PEFTAwareLoss,
    QuantizationSafeLoss,
    RegressionLoss,
    Seq2SeqLoss,
    VisionLoss,
    explain_loss_error,
    get_loss_strategy,
)

# Float32 sums of a few hundred terms in another order differ in the last bits.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def numpy_cross_entropy(logits, labels):
    """Sum over rows of log(sum(exp)) - logit of the label, in float64; rows of label -100 are left out."""
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    total = 0.0
    for row, label in zip(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), strict=True):
        if label != -100:
            total += np.log(np.exp(row - row.max()).sum()) + row.max() - row[label]
    return total, int((labels != -100).sum())


def tokens(batch=4, length=7, vocabulary=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, length, vocabulary, generator=generator)
    return logits, torch.randint(0, vocabulary, (batch, length), generator=generator)


def test_language_modeling_compares_each_position_with_the_next_token():
    logits, labels = tokens()

    result = LanguageModelingLoss().compute_loss({"logits": logits, "labels": labels})

    total, count = numpy_cross_entropy(logits[:, :-1], labels[:, 1:])
    assert int(result.count) == count == 4 * 6
    assert result.sum.item() == pytest.approx(total, rel=1e-5)


def test_language_modeling_has_the_gradient_of_the_sliced_form():
    logits, labels = tokens()
    ours, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()

    LanguageModelingLoss().compute_loss({"logits": ours, "labels": labels}).sum.backward()
    F.cross_entropy(plain[:, :-1].reshape(-1, 11), labels[:, 1:].reshape(-1), reduction="sum").backward()

    torch.testing.assert_close(ours.grad, plain.grad, **CLOSE)


def test_labels_of_minus_100_are_ignored_without_a_pad_token():
    logits, labels = tokens()
    labels[:, 3] = -100

    result = LanguageModelingLoss().compute_loss({"logits": logits, "labels": labels})

    total, count = numpy_cross_entropy(logits[:, :-1], labels[:, 1:])
    assert (int(result.count), result.sum.item()) == (count, pytest.approx(total, rel=1e-5))


def test_token_zero_counts_unless_it_is_named_the_pad_token():
    logits, labels = tokens()
    labels[:, 2] = 0

    plain = LanguageModelingLoss().compute_loss({"logits": logits, "labels": labels})
    padded = LanguageModelingLoss().compute_loss({"logits": logits, "labels": labels, "pad_token_id": 0})

    assert int(plain.count) == 24
    assert int(padded.count) == int((labels[:, 1:] != 0).sum())


def test_attention_mask_keeps_an_end_of_sequence_that_equals_the_pad_token():
    logits, labels = tokens(batch=1, length=5)
    labels[0] = torch.tensor([4, 5, 9, 9, 9])  # 9 ends the sequence, and pads it
    mask = torch.tensor([[1, 1, 1, 0, 0]])

    result = LanguageModelingLoss().compute_loss(
        {"logits": logits, "labels": labels, "attention_mask": mask, "pad_token_id": 9}
    )

    total, _ = numpy_cross_entropy(logits[:, :2], labels[:, 1:3])
    assert (int(result.count), result.sum.item()) == (2, pytest.approx(total, rel=1e-5))


@pytest.mark.parametrize("length", [1, 5])
def test_batch_without_any_label_gives_zero_with_a_graph(length):
    logits, labels = tokens(length=length)
    logits.requires_grad_()

    result = LanguageModelingLoss().compute_loss({"logits": logits, "labels": torch.full_like(labels, -100)})
    result.sum.backward()

    assert (result.sum.item(), int(result.count), result.mean.item()) == (0.0, 0, 0.0)
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_seq2seq_does_not_shift():
    logits, labels = tokens()

    result = Seq2SeqLoss().compute_loss({"logits": logits, "labels": labels})

    total, count = numpy_cross_entropy(logits, labels)
    assert (int(result.count), result.sum.item()) == (count, pytest.approx(total, rel=1e-5))


def test_mask_of_another_shape_than_the_labels_is_refused():
    logits, labels = tokens()

    with pytest.raises(DataError, match=r"attention_mask has shape \(4, 9\), but the labels have \(4, 7\)"):
        Seq2SeqLoss().compute_loss({"logits": logits, "labels": labels, "attention_mask": torch.ones(4, 9)})


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), cut=st.integers(1, 5), pad=st.sampled_from([None, 0, 3]))
def test_sum_over_any_split_is_the_sum_over_the_whole(seed, cut, pad):
    logits, labels = tokens(batch=6, seed=seed)
    labels[seed % 6, seed % 7 :] = -100
    mask = (torch.rand(6, 7, generator=torch.Generator().manual_seed(seed)) > 0.3).long() if pad is None else None

    def result(part):
        return LanguageModelingLoss().compute_loss(
            {
                "logits": logits[part],
                "labels": labels[part],
                "pad_token_id": pad,
                "attention_mask": None if mask is None else mask[part],
            }
        )

    first, second, whole = result(slice(0, cut)), result(slice(cut, 6)), result(slice(0, 6))
    assert int(first.count + second.count) == int(whole.count)
    torch.testing.assert_close(first.sum + second.sum, whole.sum, **CLOSE)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), extra=st.integers(1, 5))
def test_padding_a_batch_further_changes_nothing(seed, extra):
    logits, labels = tokens(seed=seed)
    mask = torch.ones_like(labels)
    noise = torch.randn(4, extra, 11, generator=torch.Generator().manual_seed(seed + 1))

    plain = LanguageModelingLoss().compute_loss({"logits": logits, "labels": labels})
    padded = LanguageModelingLoss().compute_loss(
        {
            "logits": torch.cat([logits, noise], dim=1),
            "labels": F.pad(labels, (0, extra), value=5),
            "attention_mask": F.pad(mask, (0, extra), value=0),
        }
    )

    assert int(plain.count) == int(padded.count)
    torch.testing.assert_close(plain.sum, padded.sum, **CLOSE)


def test_classification_equals_torch_and_counts_samples():
    logits, labels = torch.randn(8, 5, requires_grad=True), torch.tensor([0, 1, 2, 3, 4, -100, 0, 1])

    result = ClassificationLoss().compute_loss({"logits": logits, "labels": labels, "pad_token_id": 0})

    assert int(result.count) == 7  # class 0 is a class, not padding
    torch.testing.assert_close(result.mean, F.cross_entropy(logits, labels))


@pytest.mark.parametrize(
    ("mask", "positions"),
    [(None, [3, 3]), ([[1, 1, 0, 0], [1, 1, 1, 1]], [1, 3]), ([[0, 0, 1, 1], [0, 1, 1, 0]], [3, 2])],
)
def test_classification_of_a_sequence_reads_its_last_real_position(mask, positions):
    logits, labels = torch.randn(2, 4, 3), torch.tensor([2, 0])

    result = ClassificationLoss().compute_loss(
        {"logits": logits, "labels": labels, "attention_mask": None if mask is None else torch.tensor(mask)}
    )

    total, _ = numpy_cross_entropy(logits[[0, 1], positions], labels)
    assert result.sum.item() == pytest.approx(total, rel=1e-5)


def test_classification_of_a_sequence_without_real_tokens_is_ignored():
    mask = torch.tensor([[0, 0], [1, 0]])

    result = ClassificationLoss().compute_loss(
        {"logits": torch.randn(2, 2, 3), "labels": torch.tensor([1, 2]), "attention_mask": mask}
    )

    assert int(result.count) == 1


@pytest.mark.parametrize("from_inputs", [True, False])
def test_class_weights_give_torchs_weighted_mean(from_inputs):
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, -100, 2, 2])
    weights = torch.tensor([0.5, 2.0, 3.0])

    loss = ClassificationLoss() if from_inputs else ClassificationLoss(class_weights=[0.5, 2.0, 3.0])
    inputs = {"logits": logits, "labels": labels} | ({"class_weights": weights} if from_inputs else {})
    result = loss.compute_loss(inputs)

    assert result.count.item() == pytest.approx(11.5)
    torch.testing.assert_close(result.mean, F.cross_entropy(logits, labels, weights))
    assert loss.measure(loss.align(inputs))[1] == 5  # accuracy counts samples, not weights


def test_segmentation_counts_pixels():
    logits, labels = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    labels[0, 0] = -100

    loss = VisionLoss()
    result = loss.compute_loss({"logits": logits, "labels": labels})

    assert int(result.count) == 35
    torch.testing.assert_close(result.mean, F.cross_entropy(logits, labels))
    right = ((logits.argmax(1) == labels) & (labels != -100)).sum()
    assert loss.measure(loss.align({"logits": logits, "labels": labels})) == (right, 35)


def test_multilabel_ignores_elements_of_minus_100():
    logits, labels = torch.randn(4, 3, requires_grad=True), torch.tensor([[1, 0, 1]] * 4)
    labels[1, 2] = -100
    known = labels != -100

    loss = MultiLabelLoss(class_weights=[1.0, 2.0, 3.0])
    result = loss.compute_loss({"logits": logits, "labels": labels})
    result.sum.backward()

    probability = 1 / (1 + np.exp(-logits.detach().double().numpy()))
    weights = np.where(labels.numpy() == 1, [1.0, 2.0, 3.0], 1.0)
    terms = -weights * np.where(labels.numpy() == 1, np.log(probability), np.log(1 - probability))
    assert int(result.count) == 11
    assert result.sum.item() == pytest.approx(terms[known.numpy()].sum(), rel=1e-5)
    assert logits.grad[1, 2] == 0
    right = (((logits > 0) == (labels == 1)) & known).sum()
    assert loss.measure(loss.align({"logits": logits, "labels": labels})) == (right, 11)


@pytest.mark.parametrize("kind", ["mse", "l1", "huber"])
def test_regression_equals_its_formula(kind):
    logits, labels = torch.randn(5, 2) * 3, torch.randn(5, 2)
    error = (logits - labels).abs().double()
    wanted = {
        "mse": error**2,
        "l1": error,
        "huber": torch.where(error < 1, error**2 / 2, error - 0.5),
    }[kind].sum()

    result = get_loss_strategy(kind).compute_loss({"logits": logits, "labels": labels})

    assert result.count == 10
    assert result.sum.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_regression_pairs_a_column_with_a_vector_one_to_one():
    logits, labels = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([1.0, 2.0, -100.0])

    result = RegressionLoss().compute_loss({"logits": logits, "labels": labels})

    assert (result.sum.item(), result.count) == (
        103.0**2,
        3,
    )  # broadcast to (3, 3) it would be another number


@pytest.mark.parametrize(("logits", "labels"), [((4, 1), (3,)), ((4, 2), (4,)), ((4,), (4, 2)), ((4, 2), (4, 1))])
def test_regression_refuses_to_broadcast(logits, labels):
    with pytest.raises(DataError, match="one label per output"):
        RegressionLoss().compute_loss({"logits": torch.zeros(logits), "labels": torch.zeros(labels)})


def test_unknown_kind_of_regression_is_refused():
    with pytest.raises(ConfigError, match="'mse', 'l1', 'huber'"):
        RegressionLoss("rmse")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("loss", "logits", "labels"),
    [
        (LanguageModelingLoss(), torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))),
        (ClassificationLoss(), torch.randn(2, 7), torch.randint(0, 7, (2,))),
        (MultiLabelLoss(), torch.randn(2, 7), torch.ones(2, 7)),
        (RegressionLoss(), torch.randn(2, 7), torch.randn(2, 7)),
    ],
)
def test_low_precision_logits_are_summed_in_float32(dtype, loss, logits, labels):
    low = logits.to(dtype)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = loss.compute_loss({"logits": low, "labels": labels})
    reference = loss.compute_loss({"logits": low.float(), "labels": labels})

    assert result.sum.dtype is torch.float32
    assert torch.equal(result.sum, reference.sum)


@pytest.mark.parametrize(
    ("loss", "logits", "labels", "message"),
    [
        (LanguageModelingLoss(), (2, 3), (2,), "3D logits"),
        (LanguageModelingLoss(), (2, 3, 5), (2, 4), "one label per position"),
        (ClassificationLoss(), (2, 3), (2, 1), r"got logits \(2, 3\) and labels \(2, 1\)"),
        (VisionLoss(), (2, 3, 4), (2, 4), r"\(B, C, H, W\)"),
        (VisionLoss(), (2, 3, 4, 4), (2, 5, 5), "one label per pixel"),
        (MultiLabelLoss(), (2, 3), (2,), "0/1 vector of length 3"),
    ],
)
def test_shapes_that_do_not_fit_are_named(loss, logits, labels, message):
    with pytest.raises(DataError, match=message):
        loss.compute_loss({"logits": torch.zeros(logits), "labels": torch.zeros(labels, dtype=torch.int64)})


def test_float_labels_of_a_classification_are_refused():
    with pytest.raises(DataError, match=r"labels are torch\.float32, but a class is a whole number"):
        ClassificationLoss().compute_loss({"logits": torch.zeros(2, 3), "labels": torch.zeros(2)})


def test_small_integer_labels_are_taken():
    labels = torch.tensor([0, 2], dtype=torch.int32)

    result = ClassificationLoss().compute_loss({"logits": torch.zeros(2, 3), "labels": labels})

    assert result.sum.item() == pytest.approx(2 * np.log(3))


def test_peft_loss_refuses_a_frozen_model_and_reports_a_partly_frozen_one(caplog):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    with caplog.at_level(logging.INFO):
        loss = PEFTAwareLoss(ClassificationLoss(), model)
    assert caplog.messages == ["6 of 12 parameters train (50.00 %)"]
    assert (loss.metric, loss.has_perplexity) == ("accuracy", False)

    model.requires_grad_(False)
    with pytest.raises(ValueError, match="No trainable parameters"):
        PEFTAwareLoss(ClassificationLoss(), model)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")  # deprecated, but models have them
def test_quantized_logits_are_dequantized():
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    quantized = torch.quantize_per_tensor(logits, scale=0.05, zero_point=3, dtype=torch.qint8)
    integers = quantized.int_repr()

    from_tensor = QuantizationSafeLoss(ClassificationLoss()).compute_loss({"logits": quantized, "labels": labels})
    from_scale = QuantizationSafeLoss(ClassificationLoss(), scale=0.05, zero_point=3).compute_loss(
        {"logits": integers, "labels": labels}
    )

    total, _ = numpy_cross_entropy((integers.numpy().astype(np.float64) - 3) * 0.05, labels)
    assert from_tensor.sum.item() == pytest.approx(total, rel=1e-5)
    assert from_scale.sum.item() == pytest.approx(total, rel=1e-5)


def test_integer_logits_without_a_scale_are_refused():
    inputs = {"logits": torch.zeros(2, 3, dtype=torch.int8), "labels": torch.zeros(2, dtype=torch.int64)}

    with pytest.raises(DataError, match="quantized dtype"):
        QuantizationSafeLoss(ClassificationLoss()).compute_loss(inputs)
    with pytest.raises(DataError, match="QuantizationSafeLoss"):
        ClassificationLoss().compute_loss(inputs)


@pytest.mark.parametrize("value", [10, -1])
def test_label_out_of_range_is_explained(value):
    logits, labels = torch.zeros(3, 10), torch.tensor([1, value, -100])

    with pytest.raises(IndexError) as caught:
        ClassificationLoss().compute_loss({"logits": logits, "labels": labels})
    explained = explain_loss_error(caught.value, logits, labels, "species")

    assert isinstance(explained, DataError)
    assert f"Label {value} in 'species' is out of range" in str(explained)
    assert "0..9" in str(explained)
    assert "1 of 3 labels" in str(explained)


def test_error_with_another_cause_is_not_explained():
    assert explain_loss_error(RuntimeError("out of memory"), torch.zeros(2, 3), torch.tensor([0, 2])) is None


@pytest.mark.parametrize(("classes", "wrong"), [(256, None), (200, 255)])
def test_bytes_as_labels_are_compared_as_numbers(classes, wrong):
    labels = torch.tensor([0, 156, 255], dtype=torch.uint8)

    explained = explain_loss_error(RuntimeError("any"), torch.zeros(3, classes), labels)

    assert explained is None if wrong is None else f"Label {wrong} in 'labels' is out of range" in str(explained)


def test_lost_cuda_device_is_explained_without_touching_it():
    error = RuntimeError("CUDA error: device-side assert triggered")

    explained = explain_loss_error(error, torch.empty(2, 3, device="meta"), torch.empty(2, device="meta"))

    assert "on the CPU" in str(explained)


def test_every_listed_loss_can_be_built():
    names = LossStrategyRegistry.list_available()

    assert {"language_modeling", "causal_lm", "classification", "text_classification", "regression"} <= set(names)
    assert {"vision_classification", "segmentation", "multilabel", "vision_multilabel", "seq2seq"} <= set(names)
    assert all(callable(get_loss_strategy(name).compute_loss) for name in names)


def test_unknown_loss_names_the_closest_one():
    with pytest.raises(ConfigError, match=r"Unknown task_type.*Available: .*Did you mean 'classification'\?"):
        get_loss_strategy("clasification")


def test_registered_loss_is_found_and_its_name_is_taken():
    @LossStrategyRegistry.register("half_of_everything")
    class Half:
        def compute_loss(self, inputs):
            return LossResult(inputs["logits"].sum() / 2, 1)

    assert isinstance(get_loss_strategy("half_of_everything"), Half)
    LossStrategyRegistry.register("half_of_everything")(Half)  # a module that is imported again
    with pytest.raises(ConfigError, match="already registered"):
        LossStrategyRegistry.register("half_of_everything")(ClassificationLoss)
    with pytest.raises(ConfigError, match="already registered"):
        LossStrategyRegistry.register("seq2seq")(Half)


def test_model_output_is_read_from_every_usual_form():
    logits, own_loss = torch.zeros(2, 3), torch.tensor(1.0)

    class Output:
        pass

    output = Output()
    output.logits = logits
    for raw in (logits, (logits,), (own_loss, logits), {"logits": logits, "loss": own_loss}, output):
        assert ModelOutput.from_raw(raw).logits is logits
    assert ModelOutput.from_raw({"logits": logits, "loss": own_loss}).loss is own_loss


@pytest.mark.parametrize(
    ("raw", "error", "message"),
    [
        ((), ValueError, "empty tuple"),
        ({"scores": 1}, ValueError, "missing logits"),
        ([torch.zeros(1)], TypeError, "Cannot parse output type list"),
        (("a",), TypeError, "no tensor"),
        (None, TypeError, "NoneType"),
    ],
)
def test_model_output_of_another_form_is_refused(raw, error, message):
    with pytest.raises(error, match=message):
        ModelOutput.from_raw(raw)
