"""dropout_add_layernorm: every width, row count and dtype, dropout, autocast's dtypes, and frozen inputs."""

import pytest
import torch

from fastbert.kernels.dropout_add_layernorm import dropout_add_layernorm
from fastbert.testing.rows import DEVICE, DROPOUT_ADD_LAYERNORM, check, make_inputs, run, seed_tensor

from .cases import DTYPES, ROWS, dtype_name, matrix, subsets

OP = DROPOUT_ADD_LAYERNORM
NAMES = ("x", "residual", "weight", "bias", "x_bias")
HALF, SINGLE, DOUBLE = torch.float16, torch.float32, torch.float64


@pytest.mark.parametrize("rows, width, dtype, optional, options", matrix(OP))
def test_matrix(rows, width, dtype, optional, options):
    check(OP, make_inputs(OP, (rows, width), dtype, optional=optional), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("optional", [True, False], ids=["biased", "plain"])
@pytest.mark.parametrize("p", [1e-6, 0.01, 0.25, 0.9, 0.9999, 1.0])
def test_probabilities(p, optional, dtype):
    check(OP, make_inputs(OP, (17, 72), dtype, optional=optional), p=p)


@pytest.mark.parametrize("shape", [(72,), (3, 72), (2, 3, 72), (1, 1, 1, 1, 72), (3, 0, 72), (5, 0)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_leading_dimensions(shape, p, request):
    if 0 in shape:
        request.applymarker(pytest.mark.no_launch)
    results = check(OP, make_inputs(OP, shape), p=p)
    assert results["y"].shape == shape and results["y"].is_contiguous()


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.1, 3.0])
def test_eps(eps):
    """At this scale the variance is about 1e-4, so that a missing or replaced eps shows."""
    check(OP, make_inputs(OP, (5, 96), scale=1e-2), eps=eps)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("out", [None, SINGLE, HALF], ids=["promoted", "to_float32", "to_float16"])
@pytest.mark.parametrize(
    "x, residual, weights, x_bias",
    [
        (HALF, SINGLE, SINGLE, SINGLE),  # autocast: the product is float16, everything else float32
        (HALF, HALF, SINGLE, SINGLE),
        (HALF, HALF, SINGLE, HALF),
        (SINGLE, HALF, SINGLE, SINGLE),
        (SINGLE, SINGLE, HALF, HALF),
        (SINGLE, DOUBLE, DOUBLE, SINGLE),
    ],
    ids=lambda dtype: dtype_name(dtype),
)
def test_mixed_dtypes(x, residual, weights, x_bias, out, p):
    dtypes = {"x": x, "residual": residual, "weight": weights, "bias": weights, "x_bias": x_bias}
    inputs = make_inputs(OP, (17, 96), dtypes=dtypes)
    results = check(OP, inputs, p=p, out_dtype=out)
    assert results["y"].dtype == (out or torch.promote_types(x, residual))
    assert all(results["d" + name].dtype == tensor.dtype for name, tensor in inputs.items())


@pytest.mark.parametrize("frozen", subsets(NAMES), ids=lambda names: "-".join(names) or "none")
@pytest.mark.parametrize("p, residual_dtype", [(0.0, SINGLE), (0.2, HALF)], ids=["shared", "apart"])
def test_frozen_inputs(frozen, p, residual_dtype):
    """Each gradient is the same whichever others are asked for."""
    inputs = make_inputs(OP, (17, 40), dtypes={"residual": residual_dtype})
    results = check(OP, inputs, frozen=frozen, p=p)
    assert [name for name in NAMES if results["d" + name] is None] == list(frozen)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("rows", ROWS[1:])
def test_one_column(rows, dtype):
    """A row of one element has no variance: y is the bias, and exactly only the bias has a gradient."""
    dy = torch.randn(rows, 1).to(DEVICE, dtype)
    inputs = make_inputs(OP, (rows, 1), dtype)
    results = run(dropout_add_layernorm, inputs, dy, p=0.5 if rows % 2 else 0.0)
    assert torch.equal(results["y"], inputs["bias"].expand(rows, 1))
    for name in ("dx", "dresidual", "dweight", "dx_bias"):
        assert torch.count_nonzero(results[name]) == 0, name
    torch.testing.assert_close(results["dbias"], dy.sum(0))


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_x_and_residual_may_be_one_tensor(p):
    """Autograd adds the two gradients into the leaf; with p = 0 the op returns one tensor for both."""
    x = torch.randn(5, 48, device=DEVICE, requires_grad=True)
    weight, bias, seed = torch.ones(48, device=DEVICE), torch.zeros(48, device=DEVICE), seed_tensor(3)
    dropout_add_layernorm(x, x, weight, bias, p=p, seed=seed).square().sum().backward()
    apart = [x.detach().clone().requires_grad_() for _ in range(2)]
    dropout_add_layernorm(*apart, weight, bias, p=p, seed=seed).square().sum().backward()
    assert torch.equal(x.grad, apart[0].grad + apart[1].grad)


def test_gradients_of_x_and_residual_are_not_one_tensor():
    """They are equal, but a caller who scales one in place (gradient clipping) must not scale the other."""
    x, residual = (torch.randn(5, 48, device=DEVICE, requires_grad=True) for _ in range(2))
    weight, bias = torch.ones(48, device=DEVICE), torch.zeros(48, device=DEVICE)
    dropout_add_layernorm(x, residual, weight, bias).sin().sum().backward()
    before = residual.grad.clone()
    x.grad.zero_()
    assert torch.equal(residual.grad, before) and torch.count_nonzero(before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_without_gradients(mode, p, launches):
    inputs = make_inputs(OP, (33, 96))
    trained = run(dropout_add_layernorm, inputs, None, p=p, seed=seed_tensor(5))["y"]
    with mode():
        y = dropout_add_layernorm(**inputs, p=p, seed=seed_tensor(5))
    assert not y.requires_grad and torch.equal(y, trained)
    assert launches() == {OP.forward_kernel: 2}


def test_gradients_accumulate():
    inputs = make_inputs(OP, (5, 48))
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    y = dropout_add_layernorm(**leaves)
    y.sum().backward(retain_graph=True)
    once = {name: leaf.grad.clone() for name, leaf in leaves.items()}
    y.sum().backward()
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, 2 * once[name]), name


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE], ids=dtype_name)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_scales_and_offsets(dtype, scale, offset):
    """A mean far from zero, where E[x^2] - E[x]^2 would be lost to rounding."""
    inputs = make_inputs(OP, (17, 96), dtype, scale=scale)
    inputs["residual"] = inputs["residual"] + offset * scale
    check(OP, inputs, p=0.1)
