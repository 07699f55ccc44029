"""linear_cross_entropy with class weights: torch's values with smoothing, ignored labels and every reduction."""

import pytest
import torch
import torch.nn.functional as F

from fastbert.kernels.linear_cross_entropy import linear_cross_entropy
from fastbert.testing.linear_cross_entropy import (
    NAMES,
    WAYS,
    check,
    chunk_rows,
    chunks_of,
    make_inputs,
    make_weights,
    run,
)
from fastbert.testing.rows import DEVICE

from ..cases import DTYPES, dtype_name
from ..layouts import contiguous, expanded, offset, sliced

REDUCTIONS = [("mean", "kept"), ("mean", "formed"), ("sum", "kept"), ("sum", "formed"), ("none", "formed")]
FP16, FP32 = torch.float16, torch.float32


def options_of(dtype, **options):
    """A float32 loss from float16: eager's own sums over 101 classes have larger errors than what is tested."""
    return options | ({"out_dtype": FP32} if dtype == FP16 else {})


@pytest.mark.one_in(2)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("reduction, way", REDUCTIONS)
def test_torchs_values(reduction, way, dtype, smoothing):
    weights = make_weights(101, torch.float64 if dtype == torch.float64 else FP32)
    options = options_of(dtype, reduction=reduction, label_smoothing=smoothing, class_weights=weights)
    check(*make_inputs(33, 101, dtype=dtype), rows=chunk_rows(way, 10), **options)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_torchs_own_call(reduction, smoothing):
    """With torch's argument names instead of the reference's."""
    inputs, labels = make_inputs(9, 37)
    weights = make_weights(37)
    options = {"reduction": reduction, "label_smoothing": smoothing}

    def stock(hidden, weight, bias, labels):
        return F.cross_entropy(F.linear(hidden, weight, bias), labels, weight=weights, **options)

    ours, theirs = run(linear_cross_entropy, inputs, labels, class_weights=weights, **options), run(stock, inputs, labels)
    for name, result in ours.items():
        torch.testing.assert_close(result, theirs[name], msg=name)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction, way", [("mean", "kept"), ("sum", "formed"), ("none", "formed")])
def test_berts_vocabulary(reduction, way, smoothing):
    """Whole tiles of classes, and a partial one."""
    options = {"reduction": reduction, "label_smoothing": smoothing, "class_weights": make_weights(30522)}
    check(*make_inputs(3, 30522, 16), rows=chunk_rows(way, 2), **options)


@pytest.mark.parametrize("layout", [contiguous, sliced, expanded, offset], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weights_of_any_layout_and_type(smoothing, dtype, layout):
    weights = layout(make_weights(37, dtype)[:, None])[:, 0]
    plain = weights.to(FP32).contiguous()
    inputs, labels = make_inputs(9, 37)
    given, expected = (
        run(linear_cross_entropy, inputs, labels, class_weights=w, label_smoothing=smoothing) for w in (weights, plain)
    )
    assert all(torch.equal(given[name], expected[name]) for name in given)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction, way", REDUCTIONS)
def test_an_ignored_class_has_no_weight(reduction, way, smoothing):
    """Neither in the mean nor in a gradient, although it is a class and weighs the most; smoothing counts it, as in torch."""
    inputs, labels = make_inputs(33, 13, ignored=0.0)
    weights = make_weights(13, zeros=0.0)
    weights[7], labels[::3] = 100.0, 7
    options = {"reduction": reduction, "label_smoothing": smoothing, "ignore_index": 7}
    check(inputs, labels, rows=chunk_rows(way, 8), class_weights=weights, **options)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction, way", REDUCTIONS)
def test_all_labels_ignored(reduction, way, smoothing):
    inputs, labels = make_inputs(5, 13, ignored=1.1)
    options = {"reduction": reduction, "label_smoothing": smoothing, "class_weights": make_weights(13)}
    results = check(inputs, labels, rows=chunk_rows(way, 2), **options)
    assert results["y"].isnan().all() == (reduction == "mean")
    assert all(not results["d" + name].any() for name in NAMES)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("way", WAYS)
def test_labels_that_weigh_nothing(way, smoothing):
    """Their sum is 0 (with smoothing the other classes' share); their mean is NaN, and so are its gradients."""
    inputs, labels = make_inputs(9, 13, ignored=0.0)
    weights = make_weights(13)
    weights[labels] = 0.0
    for reduction in ("sum", "none"):
        options = {"reduction": reduction, "label_smoothing": smoothing, "class_weights": weights}
        results = check(inputs, labels, rows=chunk_rows(way, 4), **options)
        assert smoothing or not any(x.any() for x in results.values())
    results = check(inputs, labels, rows=chunk_rows(way, 4), label_smoothing=smoothing, class_weights=weights)
    assert all(x.isnan().all() for x in results.values())


@pytest.mark.parametrize("bad", [torch.inf, torch.nan, -1.0])
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=dtype_name)
@pytest.mark.parametrize("way", WAYS)
def test_weights_of_classes_that_no_label_names(way, dtype, bad):
    """Without smoothing they are never read, as in torch: the inverse of a class's frequency may well be infinite."""
    inputs, labels = make_inputs(33, 101, dtype=dtype)
    weights = make_weights(101)
    weights[torch.isin(torch.arange(101, device=DEVICE), labels, invert=True)] = bad
    results = check(inputs, labels, rows=chunk_rows(way, 10), class_weights=weights, **options_of(dtype))
    assert all(x.isfinite().all() for x in results.values())


def test_negative_weights():
    check(*make_inputs(33, 101), class_weights=-make_weights(101), label_smoothing=0.1)


@pytest.mark.parametrize("magnitude", [2.0**-40, 2.0**40])
@pytest.mark.parametrize("reduction, way", [("mean", "kept"), ("mean", "formed"), ("sum", "kept"), ("sum", "formed")])
def test_float16_with_weights_of_any_magnitude(reduction, way, magnitude):
    """Gradients are stored in float16 before they are divided by the weights' sum: they must not scale with the weights."""
    inputs, labels = make_inputs(33, 101, dtype=FP16)
    weights = make_weights(101)
    options = {"reduction": reduction, "label_smoothing": 0.1, "out_dtype": FP32}
    dy = torch.tensor(1.0 if reduction == "mean" else 1.0 / magnitude, device=DEVICE)
    with chunks_of(chunk_rows(way, 10)):
        one = run(linear_cross_entropy, inputs, labels, class_weights=weights, **options)
        other = run(linear_cross_entropy, inputs, labels, dy, class_weights=magnitude * weights, **options)
    torch.testing.assert_close(other.pop("y"), one.pop("y") * (1.0 if reduction == "mean" else magnitude))
    for name, result in other.items():
        assert torch.equal(result, one[name]), name


@pytest.mark.parametrize("reduction, way", REDUCTIONS)
def test_weights_of_one_change_nothing(reduction, way):
    inputs, labels = make_inputs(33, 101)
    with chunks_of(chunk_rows(way, 10)):
        plain = run(linear_cross_entropy, inputs, labels, reduction=reduction)
        even = run(linear_cross_entropy, inputs, labels, reduction=reduction, class_weights=torch.ones(101, device=DEVICE))
    assert all(torch.equal(even[name], plain[name]) for name in plain)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_gradients(reduction):
    """Also for weights that require a gradient elsewhere."""
    inputs, labels = make_inputs(33, 101)
    options = {"reduction": reduction, "label_smoothing": 0.1, "class_weights": make_weights(101).requires_grad_()}
    with torch.no_grad():
        loss = linear_cross_entropy(**inputs, labels=labels, **options)
    trained = run(linear_cross_entropy, inputs, labels, **options | {"class_weights": options["class_weights"].detach()})
    torch.testing.assert_close(loss, trained["y"])
