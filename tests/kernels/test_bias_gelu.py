"""bias_gelu: every width, row count, dtype and activation, also far out where the activations saturate."""

import pytest
import torch

from fastbert.kernels.bias_gelu import bias_gelu
from fastbert.kernels.core.checks import ACTIVATIONS
from fastbert.testing.rows import BIAS_GELU, DEVICE, check, make_inputs, run

from .cases import DTYPES, dtype_name, matrix

OP = BIAS_GELU


@pytest.mark.parametrize("rows, width, dtype, optional, options", matrix(OP))
def test_matrix(rows, width, dtype, optional, options):
    check(OP, make_inputs(OP, (rows, width), dtype, optional=optional), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("optional", [True, False], ids=["biased", "plain"])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 10.0, 1e4])
def test_activations(activation, dtype, optional, scale):
    check(OP, make_inputs(OP, (17, 96), dtype, optional=optional, scale=scale), activation=activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_magnitude(activation, dtype):
    """From deep inside the linear part to where one factor underflows: both signs, evenly spaced exponents."""
    magnitudes = torch.logspace(-6, 2, 400, dtype=torch.float64)
    x = torch.cat([-magnitudes, torch.zeros(1, dtype=torch.float64), magnitudes]).to(DEVICE, dtype)
    check(OP, {"x": x[None], "bias": None}, torch.ones_like(x)[None], activation=activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_come_through_as_in_torch(activation, dtype):
    x = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf, -0.0, 0.5, torch.finfo(dtype).max / 4], dtype=dtype)
    check(OP, {"x": x[None].to(DEVICE), "bias": None}, activation=activation, frozen=("x",))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradient_of_nan_is_as_in_torch(activation):
    x = torch.tensor([[1.0, torch.nan, -2.0, 3.0]], device=DEVICE)
    dx = check(OP, {"x": x, "bias": None}, torch.ones_like(x), activation=activation)["dx"]
    assert dx.isfinite().tolist() == [[True, activation == "relu", True, True]]


def test_gradient_of_relu_at_zero_is_zero():
    x = torch.tensor([[0.0, -0.0, 1.0]], device=DEVICE)
    assert run(bias_gelu, {"x": x}, torch.ones_like(x), activation="relu")["dx"].tolist() == [[0.0, 0.0, 1.0]]


@pytest.mark.parametrize("shape", [(72,), (3, 72), (2, 3, 72), (1, 1, 1, 1, 72), (3, 0, 72), (5, 0), (0,)], ids=str)
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_leading_dimensions(shape, activation, request):
    if 0 in shape:
        request.applymarker(pytest.mark.no_launch)
    results = check(OP, make_inputs(OP, shape), activation=activation)
    assert results["y"].shape == shape and results["y"].is_contiguous()


@pytest.mark.parametrize("x, bias", [(torch.float16, torch.float32), (torch.float32, torch.float16)], ids=dtype_name)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mixed_dtypes(x, bias, activation):
    results = check(OP, make_inputs(OP, (33, 96), dtypes={"x": x, "bias": bias}), activation=activation)
    assert (results["y"].dtype, results["dx"].dtype, results["dbias"].dtype) == (x, x, bias)


@pytest.mark.parametrize("frozen", [(), ("x",), ("bias",)], ids=lambda names: "-".join(names) or "none")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_frozen_inputs(frozen, activation):
    results = check(OP, make_inputs(OP, (17, 40)), frozen=frozen, activation=activation)
    assert [name for name in ("x", "bias") if results["d" + name] is None] == list(frozen)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode, launches):
    inputs = make_inputs(OP, (33, 96))
    trained = run(bias_gelu, inputs, None)["y"]
    with mode():
        y = bias_gelu(**inputs)
    assert not y.requires_grad and torch.equal(y, trained)
    assert launches() == {OP.forward_kernel: 2}


def test_the_default_is_the_exact_gelu():
    inputs = make_inputs(OP, (5, 96), scale=2.0)
    assert torch.equal(bias_gelu(**inputs), bias_gelu(**inputs, activation="gelu"))
    assert not torch.equal(bias_gelu(**inputs), bias_gelu(**inputs, activation="gelu_tanh"))
