"""What only a GPU shows about the ops on rows: bfloat16 at real sizes, and that a kernel is worth having."""

import pytest
import torch

from fastbert.kernels.core.checks import ACTIVATIONS
from fastbert.testing.rows import BIAS_GELU, DEVICE, DROPOUT_ADD_LAYERNORM, OPS, check, make_inputs, seed_tensor
from tests.gpu import least_milliseconds

from .cases import dtype_name
from .layouts import LAYOUTS

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=dtype_name)
EVERY_OP = pytest.mark.parametrize("op", OPS, ids=str)


def dropout_of(op, p=0.1):
    return {"p": p, "seed": seed_tensor(7)} if op is DROPOUT_ADD_LAYERNORM else {}


@DTYPES
@EVERY_OP
@pytest.mark.parametrize("rows", [1, 127, 4099])
@pytest.mark.parametrize("width", [37, 768, 1500, 3072])
def test_bound(op, width, rows, dtype):
    """Few rows and many, of models' widths. Every entry of the configuration tables: test_gpu_configurations.py."""
    check(op, make_inputs(op, (rows, width), dtype), **dropout_of(op))


@DTYPES
@EVERY_OP
@pytest.mark.parametrize("optional", [True, False], ids=["biased", "plain"])
def test_bert_large_at_full_length(op, optional, dtype):
    """More rows than programs are resident: the loop over blocks and the sums over programs."""
    check(op, make_inputs(op, (32, 512, 1024), dtype, optional=optional), **dropout_of(op))


@DTYPES
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("op", OPS[1:], ids=str)
def test_activations(op, activation, dtype):
    check(op, make_inputs(op, (257, 768), dtype), activation=activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_come_through_as_in_torch(activation):
    """PTX's max and min return the other operand of a NaN; the interpreter's do not."""
    x = torch.tensor([[1.0, torch.nan, torch.inf, -torch.inf, -0.0, 0.5, 1e38]], device=DEVICE).to(BF16)
    check(BIAS_GELU, {"x": x, "bias": None}, activation=activation, frozen=("x",))


@EVERY_OP
@pytest.mark.parametrize("dy_layout", LAYOUTS, ids=lambda f: "dy_" + f.__name__)
@pytest.mark.parametrize("x_layout", LAYOUTS, ids=lambda f: "x_" + f.__name__)
def test_layouts(op, x_layout, dy_layout):
    inputs = make_inputs(op, (70, 96), BF16)
    inputs["x"] = x_layout(inputs["x"])
    check(op, inputs, dy_layout(torch.randn(70, 96).to(DEVICE, BF16)), **dropout_of(op))


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("half", [BF16, FP16], ids=dtype_name)
def test_autocasts_dtypes(half, p):
    dtypes = {"x": half, "residual": FP32, "weight": FP32, "bias": FP32, "x_bias": FP32}
    results = check(DROPOUT_ADD_LAYERNORM, make_inputs(DROPOUT_ADD_LAYERNORM, (257, 768), dtypes=dtypes), p=p)
    assert results["y"].dtype == FP32 and results["dx"].dtype == half


@EVERY_OP
def test_faster_than_eager(op):
    """A sanity check, not a benchmark: one pass over memory against several, with so many rows that launches do not matter."""
    inputs = {k: t.requires_grad_() for k, t in make_inputs(op, (65536, 768), BF16).items()}
    dy = torch.randn(65536, 768, device=DEVICE).to(BF16)

    def step(function, **options):
        torch.autograd.grad(function(**inputs, **options), tuple(inputs.values()), dy)

    keep = {"p": 0.1, "keep": torch.rand(65536, 768, device=DEVICE) > 0.1} if op is DROPOUT_ADD_LAYERNORM else {}
    dropout = dropout_of(op)
    fast, eager = least_milliseconds(lambda: step(op.call, **dropout), lambda: step(op.reference, **keep))
    assert fast < eager, f"{fast:.3f} ms against eager's {eager:.3f} ms"
