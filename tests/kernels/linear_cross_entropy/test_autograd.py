"""linear_cross_entropy under autograd and torch.compile: gradcheck, opcheck, one graph, repeated backwards, no second one."""

import pytest
import torch

from fastbert.kernels.linear_cross_entropy import linear_cross_entropy
from fastbert.kernels.linear_cross_entropy.rows import padded
from fastbert.testing.linear_cross_entropy import (
    FORWARD,
    NAMES,
    WAYS,
    chunk_rows,
    chunks_of,
    make_inputs,
    make_weights,
    run,
)
from fastbert.testing.rows import DEVICE

from ..layouts import contiguous, expanded, sliced, transposed
from ..opchecking import opcheck

OPS = torch.ops.fastbert
LAYOUTS = [contiguous, sliced, expanded, transposed]
REDUCTIONS = [("mean", "kept"), ("mean", "formed"), ("sum", "kept"), ("sum", "formed"), ("none", "formed")]


def gradcheck(inputs, labels, rows, fast, **options):
    leaves = {name: t.requires_grad_() for name, t in inputs.items() if t is not None}
    options |= {"labels": labels} | {name: None for name, t in inputs.items() if t is None}
    with chunks_of(rows):
        torch.autograd.gradcheck(
            lambda *tensors: linear_cross_entropy(**dict(zip(leaves, tensors, strict=True)), **options),
            tuple(leaves.values()),
            fast_mode=fast,
            check_undefined_grad=not fast,
            nondet_tol=0.0,
        )


@pytest.mark.one_in(2)
@pytest.mark.parametrize("reduction, way", REDUCTIONS)
@pytest.mark.parametrize("bias", [True, False], ids=["biased", "plain"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True], ids=["even", "weighted"])
@pytest.mark.parametrize("n_rows, n_cols, width", [(5, 37, 6), (7, 2, 1), (4, 1, 3)])
def test_gradcheck(n_rows, n_cols, width, weighted, smoothing, bias, reduction, way):
    inputs, labels = make_inputs(n_rows, n_cols, width, torch.float64, bias=bias, ignored=0.2)
    options = {"class_weights": make_weights(n_cols, torch.float64, zeros=0.0) if weighted else None}
    gradcheck(inputs, labels, chunk_rows(way, 4), True, reduction=reduction, label_smoothing=smoothing, **options)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("reduction, way", REDUCTIONS)
def test_gradcheck_of_every_element(reduction, way):
    inputs, labels = make_inputs(2, 3, 2, torch.float64, ignored=0.0)
    gradcheck(inputs, labels, chunk_rows(way, 1), False, reduction=reduction, label_smoothing=0.2)


@pytest.mark.parametrize("weights", [None, make_weights(13, torch.float16)], ids=["even", "weighted"])
@pytest.mark.parametrize("reduction, way", REDUCTIONS)
def test_two_backwards_and_no_second_derivative(reduction, way, weights):
    inputs, labels = make_inputs(5, 13)
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    with chunks_of(chunk_rows(way, 3)):
        loss = linear_cross_entropy(**leaves, labels=labels, class_weights=weights, reduction=reduction).sin().sum()
        first = torch.autograd.grad(loss, tuple(leaves.values()), retain_graph=True)
        second = torch.autograd.grad(loss, tuple(leaves.values()), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        (dhidden,) = torch.autograd.grad(loss, leaves["hidden"], create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            dhidden.sum().backward()


def test_gradients_add_up_over_calls():
    """Gradient accumulation: parameters that already have a gradient."""
    inputs, labels = make_inputs(9, 37)
    once = run(linear_cross_entropy, inputs, labels)
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    for _ in range(2):
        linear_cross_entropy(**leaves, labels=labels).backward()
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, 2 * once["d" + name]), name


def tensors(layout=contiguous, dtype=torch.float32, n_rows=5, grad=True):
    inputs, labels = make_inputs(n_rows, 13, 6, dtype)
    hidden = layout(inputs["hidden"]) if n_rows else inputs["hidden"]
    leaves = [t.detach().requires_grad_(grad) for t in (hidden, layout(inputs["weight"]), inputs["bias"])]
    return *leaves, labels


@pytest.mark.one_in(4)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_opcheck_losses(reduction, layout):
    given, settings = tensors(layout, grad=reduction == "none"), (-100, reduction, 0.1, torch.float32)
    opcheck(OPS.linear_cross_entropy_losses, *given, None, *settings)
    opcheck(OPS.linear_cross_entropy_losses, *given, make_weights(13), *settings)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_opcheck_kept_and_formed(layout):
    settings = (-100, "mean", 0.0, torch.float32)
    for weights in (None, layout(make_weights(13)[None].expand(3, 13))[0]):
        opcheck(OPS.linear_cross_entropy_kept, *tensors(layout), weights, *settings)
        opcheck(OPS.linear_cross_entropy_formed, *tensors(layout), weights, *settings, True, True, True)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, False)], ids=str)
def test_opcheck_backwards(needs, dtype):
    hidden, weight, bias, labels = tensors(sliced, dtype, grad=False)
    dlosses, dloss = torch.randn(5, device=DEVICE).to(dtype), torch.tensor(0.5, device=DEVICE)
    scale, dlogits = torch.tensor(0.25, device=DEVICE), torch.randn(5, padded(13), device=DEVICE).to(dtype)
    for weights in (None, make_weights(13)):
        settings = (-100, "none", 0.1, hidden.dtype)
        opcheck(OPS.linear_cross_entropy_losses_backward, dlosses, hidden, weight, bias, labels, weights, *settings, *needs)
    opcheck(OPS.linear_cross_entropy_kept_backward, dloss, scale, dlogits, hidden, weight, *needs)
    sums = (torch.randn(13, 6, device=DEVICE), torch.randn(13, device=DEVICE))
    opcheck(OPS.linear_cross_entropy_formed_backward, dloss, scale, hidden.contiguous(), *sums)


def test_opcheck_empty():
    hidden, weight, bias, labels = tensors(n_rows=0)
    opcheck(OPS.linear_cross_entropy_losses, hidden, weight, bias, labels, None, -100, "none", 0.0, torch.float16)
    opcheck(OPS.linear_cross_entropy_kept, hidden, weight, None, labels, make_weights(13), -100, "sum", 0.0, torch.float32)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, **options):
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("frozen", [(), ("weight", "bias"), NAMES], ids=str)
@pytest.mark.parametrize("reduction, way", REDUCTIONS)
def test_compiled(reduction, way, frozen, fresh_compiler):
    inputs, labels = make_inputs((3, 4), 37, dtype=torch.float16)
    options = {"reduction": reduction, "label_smoothing": 0.1, "out_dtype": torch.float32, "class_weights": make_weights(37)}
    with chunks_of(chunk_rows(way, 5)):
        eager = run(linear_cross_entropy, inputs, labels, None, frozen, **options)
        results = run(compiled(linear_cross_entropy), inputs, labels, None, frozen, **options)
    for name, result in results.items():
        assert result is eager[name] or torch.equal(result, eager[name]), name


@pytest.mark.parametrize("reduction, way", [("mean", "kept"), ("sum", "formed"), ("none", "formed")])
def test_one_graph_for_every_length(reduction, way, fresh_compiler, launches):
    function = compiled(linear_cross_entropy, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True), chunks_of(chunk_rows(way, 64)):
        for length in (4, 7, 11):
            inputs, labels = make_inputs(length, 13)
            results = run(function, inputs, labels, reduction=reduction)
            eager = run(linear_cross_entropy, inputs, labels, reduction=reduction)
            assert all(torch.equal(results[name], eager[name]) for name in eager)
    assert launches()[FORWARD] == 6 * (2 if reduction == "none" else 1)


def test_compiled_on_the_labelled_rows(fresh_compiler):
    """A length that the compiler cannot know: the number of labelled rows, to which a head reduces its input."""

    def head(hidden, weight, bias, labels):
        counted = (labels != -100).nonzero().squeeze(1)
        return linear_cross_entropy(hidden[counted], weight, bias, labels[counted])

    inputs, labels = make_inputs(9, 37)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), chunks_of(4):
        results = run(compiled(head), inputs, labels)
        eager = run(head, inputs, labels)
    for name, result in results.items():
        torch.testing.assert_close(result, eager[name])


@pytest.mark.parametrize("way", WAYS)
def test_autocast_does_not_reach_in(way):
    """The caller casts, as for F.linear: float32 inputs are computed in float32 even under autocast."""
    inputs, labels = make_inputs(9, 37)
    with chunks_of(chunk_rows(way, 4)):
        plain = run(linear_cross_entropy, inputs, labels)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            under = run(linear_cross_entropy, inputs, labels)
    assert all(torch.equal(under[name], plain[name]) for name in plain)
