"""Wrong arguments of linear_cross_entropy: the error names the argument, what was expected and what came."""

import pytest
import torch

from fastbert.kernels.linear_cross_entropy import linear_cross_entropy
from fastbert.testing.linear_cross_entropy import WAYS, chunk_rows, chunks_of, make_inputs, run
from fastbert.testing.rows import DEVICE

pytestmark = pytest.mark.no_launch


def call(labels=None, **changed):
    inputs, own = make_inputs(3, 13, 6)
    return linear_cross_entropy(**(inputs | {"labels": own if labels is None else labels} | changed))


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("hidden", torch.zeros(()), r"hidden: expected \[\.\.\., H\]"),
        ("hidden", torch.zeros(3, 6, dtype=torch.int64), "hidden: expected float64, .*torch.int64"),
        ("weight", torch.zeros(13, 5), r"weight: expected \[V, 6\], got \(13, 5\)"),
        ("weight", torch.zeros(13), r"weight: expected \[V, 6\], got \(13,\)"),
        ("weight", torch.zeros(13, 6, dtype=torch.float16), "weight: expected the dtype of hidden, torch.float32, got"),
        ("bias", torch.zeros(12), r"bias: expected shape \(13,\), got \(12,\)"),
        ("bias", torch.zeros(13, 1), r"bias: expected shape \(13,\), got \(13, 1\)"),
        ("bias", torch.zeros(13, dtype=torch.float64), "bias: expected the dtype of hidden, torch.float32, got"),
        ("labels", torch.zeros(3, dtype=torch.int32), "labels: expected int64, got torch.int32"),
        ("labels", torch.zeros(3), "labels: expected int64, got torch.float32"),
        ("labels", torch.zeros(4, dtype=torch.int64), r"labels: expected shape \(3,\), got \(4,\)"),
        ("labels", torch.zeros(3, 13), "labels: expected int64"),
        ("class_weights", torch.ones(12), r"class_weights: expected shape \(13,\), got \(12,\)"),
        ("class_weights", torch.ones(13, 1), r"class_weights: expected shape \(13,\), got \(13, 1\)"),
        ("class_weights", torch.ones(()), r"class_weights: expected shape \(13,\), got \(\)"),
        ("class_weights", torch.ones(13, dtype=torch.int64), "class_weights: expected float64, .*torch.int64"),
        ("class_weights", torch.ones(13, requires_grad=True), "class_weights: expected a tensor without a gradient"),
        ("reduction", "batchmean", "reduction: expected one of mean, sum, none, got 'batchmean'"),
        ("label_smoothing", 1.1, "label_smoothing: expected a number from 0 to 1, got 1.1"),
        ("label_smoothing", -0.1, "label_smoothing: expected"),
        ("label_smoothing", float("nan"), "label_smoothing: expected"),
        ("out_dtype", torch.int32, "out_dtype: expected float64, .*torch.int32"),
    ],
    ids=str,
)
def test_what_does_not_fit(name, value, said):
    if isinstance(value, torch.Tensor):
        value = value.detach().to(DEVICE).requires_grad_(value.requires_grad)
    with pytest.raises(ValueError, match="^" + said):
        call(**{name: value})


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a device assertion there, which ends the process: test_..._gpu.py")
@pytest.mark.parametrize("stray", [13, -1, -101, 2**40, -(2**63)])
@pytest.mark.parametrize("reduction, way", [("mean", way) for way in WAYS] + [("none", "formed")])
def test_a_label_that_is_no_class(reduction, way, stray):
    """torch's own error, before anything is computed."""
    inputs, labels = make_inputs(5, 13)
    labels[3] = stray
    with chunks_of(chunk_rows(way, 2)), pytest.raises(IndexError, match=f"^Target {stray} is out of bounds"):
        run(linear_cross_entropy, inputs, labels, reduction=reduction)


def test_options_are_keywords_only():
    inputs, labels = make_inputs(3, 13)
    with pytest.raises(TypeError):
        linear_cross_entropy(inputs["hidden"], inputs["weight"], inputs["bias"], labels, -100)


def test_class_weights_on_another_device():
    with pytest.raises(ValueError, match=f"^class_weights: expected a tensor on {DEVICE.type}.*, got one on meta"):
        call(class_weights=torch.ones(13, device="meta"))
