"""linear_cross_entropy: sizes, dtypes, reductions and paths to the gradient; labels; smoothing; frozen and tied weights."""

import random

import pytest
import torch
import torch.nn.functional as F

from fastbert.kernels.linear_cross_entropy import linear_cross_entropy
from fastbert.testing.linear_cross_entropy import (
    FORWARD,
    NAMES,
    REDUCE,
    WAYS,
    check,
    chunk_rows,
    chunks_of,
    make_inputs,
    run,
)
from fastbert.testing.rows import DEVICE

from ..cases import DTYPES, dtype_name, subsets

REDUCTIONS = ("mean", "sum", "none")
ROWS, CLASSES, WIDTHS = (1, 2, 5, 33, 65), (2, 101, 1025), (1, 24, 37)


def matrix():
    """Rows x classes x dtype x reduction; width, bias, smoothing, chunks and the fraction of ignored labels are drawn."""
    draw, parameters = random.Random(0), []
    for rows in ROWS:
        for classes in CLASSES:
            for dtype in DTYPES:
                for reduction in REDUCTIONS:
                    options = {"reduction": reduction}
                    if draw.random() < 0.3:
                        options |= {"label_smoothing": 0.1, "out_dtype": torch.float32 if dtype == torch.float16 else None}
                    if dtype == torch.float16 and draw.random() < 0.3:
                        options["out_dtype"] = torch.float32
                    make = {"width": draw.choice(WIDTHS), "bias": draw.random() < 0.7, "ignored": draw.choice([0.0, 0.3, 0.9])}
                    chunk = draw.choice([None, 1, 7, 32]) if rows < 33 else draw.choice([None, 20, 40])
                    name = f"{rows}x{classes}-{dtype_name(dtype)}-{reduction}-chunk{chunk}"
                    parameters.append(pytest.param(rows, classes, dtype, make, chunk, options, id=name))
    return parameters


@pytest.mark.one_in(3)
@pytest.mark.parametrize("rows, classes, dtype, make, chunk, options", matrix())
def test_matrix(rows, classes, dtype, make, chunk, options):
    check(*make_inputs(rows, classes, dtype=dtype, **make), rows=chunk, **options)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("classes", [30522, 30523])
@pytest.mark.parametrize("way", WAYS)
def test_berts_vocabulary(way, classes):
    check(*make_inputs(3, classes, 16, dtype=torch.float16), rows=chunk_rows(way, 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_labels_ignored(reduction, way, dtype):
    """The mean of nothing is NaN and its gradients are 0, as in torch."""
    inputs, labels = make_inputs(5, 13, dtype=dtype, ignored=1.1)
    results = check(inputs, labels, rows=chunk_rows(way, 2), reduction=reduction)
    assert results["y"].isnan().all() == (reduction == "mean")
    assert all(not results["d" + name].any() for name in NAMES)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_label(reduction, way):
    inputs, labels = make_inputs(9, 101, ignored=1.1)
    labels[4] = 100
    check(inputs, labels, rows=chunk_rows(way, 2), reduction=reduction)


@pytest.mark.parametrize("ignore_index", [-1, 0, 7, 12, 2**40])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignore_index(reduction, ignore_index):
    """It may also be a class, or the number that another call ignores."""
    inputs, labels = make_inputs(33, 13, ignored=0.0)
    labels[::3] = ignore_index
    check(inputs, labels, ignore_index=ignore_index, reduction=reduction)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_name)
def test_label_smoothing(dtype, reduction, smoothing):
    check(*make_inputs(9, 101, dtype=dtype), rows=4, reduction=reduction, label_smoothing=smoothing)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(7,), (2, 5), (2, 3, 4), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_leading_dimensions(reduction, shape, way):
    results = check(*make_inputs(shape, 13), rows=chunk_rows(way, 3), reduction=reduction)
    assert results["y"].shape == (shape if reduction == "none" else ())
    assert results["dhidden"].shape == (*shape, 24)


@pytest.mark.parametrize("shape", [(0,), (2, 0)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_rows(reduction, shape):
    results = check(*make_inputs(shape, 13), reduction=reduction)
    assert not results["dweight"].any() and results["dweight"].shape == (13, 24)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_features(reduction, way):
    """The logits are then the bias alone."""
    inputs, labels = make_inputs(5, 13, 0)
    results = check(inputs, labels, rows=chunk_rows(way, 3), reduction=reduction)
    assert results["dbias"].any()


@pytest.mark.parametrize("frozen", subsets(NAMES), ids=lambda names: "-".join(names) or "none")
@pytest.mark.parametrize("reduction, way", [("sum", "kept"), ("sum", "formed"), ("none", "formed")])
def test_frozen_inputs(reduction, way, frozen):
    results = check(*make_inputs(9, 37), rows=chunk_rows(way, 4), frozen=frozen, reduction=reduction)
    assert [name for name in NAMES if results["d" + name] is None] == list(frozen)


@pytest.mark.parametrize("factor", [3.0, -0.25, 1e-3, 0.0])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_name)
def test_the_losss_own_gradient(dtype, way, factor):
    """For a loss that is weighted, or divided by the number of accumulation steps."""
    dy = torch.tensor(factor, dtype=dtype, device=DEVICE)
    check(*make_inputs(33, 101, dtype=dtype), dy, rows=chunk_rows(way, 8))


@pytest.mark.parametrize("way", WAYS)
def test_float16_with_a_scaled_loss(way):
    """GradScaler's 65536: small probabilities, which eager keeps by scaling before it rounds, are not lost here either."""
    inputs, labels = make_inputs(65, 1025, dtype=torch.float16, scale=3.0)
    dy = torch.tensor(1024.0, device=DEVICE)
    results = check(inputs, labels, dy, rows=chunk_rows(way, 20), out_dtype=torch.float32)
    double = {name: t.double() for name, t in inputs.items()}
    exact = run(linear_cross_entropy, double, labels, dy.double())["dbias"]
    small = (exact.abs() < 1e-3 * exact.abs().max()) & (exact != 0)
    assert small.any() and (results["dbias"][small] != 0).float().mean() > 0.95


@pytest.mark.parametrize("dy", ["random", "expanded", "strided", "zero"])
@pytest.mark.parametrize("rows", [None, 7])
def test_a_gradient_a_row(dy, rows):
    inputs, labels = make_inputs(33, 37)
    dy = {
        "random": lambda: torch.randn(33),
        "expanded": lambda: torch.full((), 0.5).expand(33),
        "strided": lambda: torch.randn(33, 2)[:, 0],
        "zero": lambda: torch.zeros(33),
    }[dy]().to(DEVICE)
    check(inputs, labels, dy, rows=rows, reduction="none")


def test_a_gradient_a_row_of_two_dimensions():
    inputs, labels = make_inputs((3, 11), 37)
    check(inputs, labels, torch.randn(11, 3, device=DEVICE).t(), rows=7, reduction="none")


@pytest.mark.parametrize("scale", [1e-4, 10.0, 100.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("way", WAYS)
def test_flat_and_peaked_rows(way, dtype, scale):
    scale = min(scale, 20.0) if dtype == torch.float16 else scale  # above that, one rounding decides which class wins
    check(*make_inputs(33, 101, dtype=dtype, scale=scale), rows=chunk_rows(way, 20), reduction="sum")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, -3.4028234663852886e38])
@pytest.mark.parametrize("where", ["one class", "all classes"])
def test_logits_that_are_no_numbers(where, bad):
    """As in eager: a class masked with -inf or the lowest number, a diverged model."""
    inputs, labels = make_inputs(5, 37, ignored=0.0)
    inputs["bias"][3 if where == "one class" else slice(None)] = bad
    labels[labels == 3] = 4
    inputs["hidden"] *= 1e-30  # so that adding to the lowest number is exact
    check(inputs, labels, frozen=NAMES)
    if where == "one class" and bad < 0:
        check(inputs, labels, reduction="none")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode, reduction, launches):
    inputs, labels = make_inputs(33, 101)
    trained = run(linear_cross_entropy, inputs, labels, reduction=reduction)["y"]
    before = launches()
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    with mode():
        loss = linear_cross_entropy(**leaves, labels=labels, reduction=reduction)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, trained)
    assert launches() - before == {FORWARD: 1, REDUCE: 1}


@pytest.mark.parametrize("way", WAYS)
def test_a_tied_weight(way):
    """BERT's decoder weight is its word embedding: one gradient for both uses."""
    inputs, labels = make_inputs(9, 37)
    tokens = torch.randint(0, 37, (9,), device=DEVICE)
    found = []
    for function in (linear_cross_entropy, lambda h, w, b, labels: F.cross_entropy(F.linear(h, w, b), labels)):
        weight = inputs["weight"].clone().requires_grad_()
        with chunks_of(chunk_rows(way, 4)):
            function(F.embedding(tokens, weight).tanh(), weight, inputs["bias"], labels).backward()
        found.append(weight.grad)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_losss_dtype(reduction, out_dtype):
    inputs, labels = make_inputs(9, 37, dtype=torch.float16)
    results = check(inputs, labels, rows=4, reduction=reduction, out_dtype=out_dtype)
    assert results["y"].dtype == (out_dtype or torch.float16)
    assert {results["d" + name].dtype for name in NAMES} == {torch.float16}
