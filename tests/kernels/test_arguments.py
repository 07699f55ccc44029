"""Wrong arguments: the error names the argument, what was expected and what came."""

import pytest
import torch

from fastbert.kernels.bias_gelu import bias_gelu
from fastbert.kernels.core.checks import MAX_WIDTH
from fastbert.kernels.dropout_add_layernorm import dropout_add_layernorm
from fastbert.kernels.gelu_layernorm import gelu_layernorm
from fastbert.testing.rows import BIAS_GELU, DEVICE, DROPOUT_ADD_LAYERNORM, GELU_LAYERNORM, OPS, make_inputs

pytestmark = pytest.mark.no_launch

BAD_VECTORS = {"shorter": (47,), "longer": (49,), "one": (1,), "scalar": (), "matrix": (1, 48)}
INTEGERS = (torch.int64, torch.int32, torch.uint8, torch.bool)


@pytest.mark.parametrize("shape", BAD_VECTORS.values(), ids=BAD_VECTORS.keys())
@pytest.mark.parametrize("op, name", [(op, name) for op in OPS for name in op.vectors], ids=lambda value: str(value))
def test_a_vector_of_another_shape(op, name, shape):
    inputs = make_inputs(op, (3, 48))
    inputs[name] = torch.zeros(shape, device=DEVICE)
    with pytest.raises(ValueError, match=rf"^{name}: expected shape \(48,\), got ") as error:
        op.call(**inputs)
    assert str(tuple(shape)) in str(error.value)


@pytest.mark.parametrize("dtype", [*INTEGERS, torch.complex64, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(
    "op, name", [(op, name) for op in OPS for name in (*op.rows, *op.vectors)], ids=lambda value: str(value)
)
def test_a_dtype_without_a_kernel(op, name, dtype):
    inputs = make_inputs(op, (3, 48))
    inputs[name] = torch.zeros_like(inputs[name]).to(dtype)
    with pytest.raises(ValueError, match=rf"^{name}: .*{dtype}"):
        op.call(**inputs)


@pytest.mark.parametrize("shape", [(4, 48), (3, 47), (48,), (3, 1), (1, 3, 48)], ids=str)
def test_a_residual_of_another_shape(shape):
    """Shapes are not broadcast, although torch would: the gradient would have to be summed."""
    inputs = make_inputs(DROPOUT_ADD_LAYERNORM, (3, 48))
    inputs["residual"] = torch.zeros(shape, device=DEVICE)
    with pytest.raises(ValueError, match=r"^residual: expected the shape of x, \(3, 48\), got "):
        dropout_add_layernorm(**inputs)


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan"), float("inf"), -1e-9])
def test_a_p_that_is_no_probability(p):
    with pytest.raises(ValueError, match="^p: expected a probability from 0 to 1, got "):
        dropout_add_layernorm(**make_inputs(DROPOUT_ADD_LAYERNORM, (3, 48)), p=p)


@pytest.mark.parametrize("activation", ["gelu_new", "GELU", "tanh", "", "mish"])
@pytest.mark.parametrize("op", [BIAS_GELU, GELU_LAYERNORM], ids=str)
def test_an_activation_without_a_kernel(op, activation):
    with pytest.raises(ValueError, match="^activation: expected one of gelu, gelu_tanh, relu, silu, got "):
        op.call(**make_inputs(op, (3, 48)), activation=activation)


@pytest.mark.parametrize("op", [DROPOUT_ADD_LAYERNORM, GELU_LAYERNORM], ids=str)
def test_a_row_too_wide_for_one_tile(op):
    with pytest.raises(ValueError, match=f"^x: expected .*H <= {MAX_WIDTH}, got "):
        op.call(**make_inputs(op, (1, MAX_WIDTH + 1)))


@pytest.mark.parametrize("function", [bias_gelu, gelu_layernorm, dropout_add_layernorm], ids=lambda f: f.__name__)
def test_a_tensor_without_dimensions(function):
    scalar, vector = torch.zeros((), device=DEVICE), torch.zeros(1, device=DEVICE)
    others = {gelu_layernorm: (vector, vector), dropout_add_layernorm: (scalar, vector, vector)}.get(function, ())
    with pytest.raises(ValueError, match="^x: "):
        function(scalar, *others)


def test_options_are_keywords_only():
    inputs = make_inputs(GELU_LAYERNORM, (3, 48))
    with pytest.raises(TypeError):
        gelu_layernorm(inputs["x"], inputs["weight"], inputs["bias"], inputs["x_bias"])
