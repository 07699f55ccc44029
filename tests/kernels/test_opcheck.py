"""torch.library.opcheck on every custom op: schema, fake tensors, autograd registration, AOT dispatch.

The fake implementations' shapes and strides are those that the kernels return, for any input.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastbert.testing.rows import DEVICE, seed_tensor

from .layouts import contiguous, expanded, sliced, transposed
from .opchecking import opcheck, registered

LAYOUTS = [contiguous, sliced, expanded, transposed]
OPS = torch.ops.fastbert


def rows(shape=(5, 12), dtype=torch.float32, grad=True, layout=contiguous):
    return layout(torch.randn(shape, device=DEVICE).to(dtype)).requires_grad_(grad)


def vector(n=12, dtype=torch.float32, grad=True):
    return torch.randn(n, device=DEVICE).to(dtype).requires_grad_(grad)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_dropout_add_layernorm(layout, p):
    seed = seed_tensor(3) if p else None
    residual = rows(layout=sliced)
    arguments = (rows(layout=layout), residual, vector(), vector(), vector(), seed, 1e-12, p, torch.float32, True)
    opcheck(OPS.dropout_add_layernorm, *arguments)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_dropout_add_layernorm_backward(layout):
    dy, z, statistics = rows(grad=False, layout=layout), rows(grad=False), rows((5,), grad=False)
    weight = vector(grad=False)
    for p, x_dtype, apart, sum_columns in ((0.0, torch.float32, False, True), (0.3, torch.float16, True, False)):
        arguments = (dy, z, statistics, statistics.exp(), weight, seed_tensor(3) if p else None, p)
        opcheck(OPS.dropout_add_layernorm_backward, *arguments, x_dtype, torch.float32, apart, sum_columns)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_bias_gelu(layout, activation):
    opcheck(OPS.bias_gelu, rows(layout=layout), vector(), activation)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("sum_columns", [True, False])
def test_bias_gelu_backward(layout, sum_columns):
    arguments = (rows(grad=False, layout=layout), rows(grad=False, layout=sliced), vector(grad=False))
    opcheck(OPS.bias_gelu_backward, *arguments, "gelu_tanh", sum_columns)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_gelu_layernorm(layout):
    opcheck(OPS.gelu_layernorm, rows(layout=layout), vector(), vector(), vector(), "gelu", 1e-12, torch.float32, True)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("sum_columns", [True, False])
def test_gelu_layernorm_backward(layout, sum_columns):
    dy, x, statistics = rows(grad=False, layout=layout), rows(grad=False, layout=sliced), rows((5,), grad=False)
    arguments = (dy, x, statistics, statistics.exp(), vector(grad=False), vector(grad=False))
    opcheck(OPS.gelu_layernorm_backward, *arguments, "relu", torch.float32, sum_columns)


def test_float16_backward():
    """The sums over rows stay float32, whatever the dtype of the inputs."""
    x, weight, statistics = rows(dtype=torch.float16, grad=False), vector(grad=False), rows((5,), grad=False)
    dy = rows(dtype=torch.float16, grad=False, layout=expanded)
    opcheck(OPS.bias_gelu_backward, dy, x, vector(dtype=torch.float16, grad=False), "gelu", True)
    opcheck(OPS.gelu_layernorm_backward, dy, x, statistics, statistics.exp(), weight, None, "gelu", torch.float16, True)
    arguments = (dy, x, statistics, statistics.exp(), weight, None, 0.0, torch.float16, torch.float32, True, True)
    opcheck(OPS.dropout_add_layernorm_backward, *arguments)


@pytest.mark.no_launch
@pytest.mark.parametrize("shape", [(0, 12), (2, 0, 12)], ids=str)
def test_empty(shape):
    x, n = rows(shape), shape[-1]
    weight, bias, x_bias = vector(n), vector(n), vector(n)
    statistics = torch.randn(shape[:-1], device=DEVICE)
    opcheck(OPS.dropout_add_layernorm, *(x, rows(shape), weight, bias, x_bias, None, 1e-12, 0.0, torch.float32, True))
    opcheck(OPS.bias_gelu, x, x_bias, "gelu")
    opcheck(OPS.gelu_layernorm, x, weight, bias, x_bias, "gelu", 1e-12, torch.float32, True)
    x, weight, x_bias = x.detach(), weight.detach(), x_bias.detach()
    opcheck(
        OPS.dropout_add_layernorm_backward,
        *(x, x, statistics, statistics, weight, None, 0.0, torch.float32, torch.float32, True, True),
    )
    opcheck(OPS.bias_gelu_backward, x, x, x_bias, "gelu", True)
    opcheck(OPS.gelu_layernorm_backward, x, x, statistics, statistics, weight, x_bias, "gelu", torch.float32, True)


@pytest.mark.parametrize("out", [torch.float32, torch.float16], ids=str)
def test_autocasts_dtypes(out):
    """float16 product, float32 residual and weights."""
    x, residual = rows((2, 3, 12), torch.float16), rows((2, 3, 12))
    opcheck(
        OPS.dropout_add_layernorm,
        *(x, residual, vector(), vector(), vector(dtype=torch.float16), seed_tensor(3), 1e-12, 0.1, out, True),
    )
    opcheck(OPS.gelu_layernorm, x, vector(), vector(), None, "gelu", 1e-12, out, True)


def test_without_anything_to_save():
    """As in inference: no statistics, no sum, nothing that requires a gradient."""
    x, weight = rows(grad=False), vector(grad=False)
    opcheck(OPS.dropout_add_layernorm, *(x, x.clone(), weight, weight, None, None, 1e-12, 0.0, torch.float32, False))
    opcheck(OPS.bias_gelu, x, None, "relu")
    opcheck(OPS.gelu_layernorm, x, weight, weight, None, "gelu_tanh", 1e-12, torch.float16, False)


def checked(source: str) -> Iterator[str]:
    """The ops that a test's source passes to `opcheck`, by name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "opcheck":
            (op, *_) = node.args
            assert isinstance(op, ast.Attribute), ast.unparse(node)
            yield op.attr


@pytest.mark.no_launch
def test_every_op_is_checked_somewhere():
    found = {name for path in Path(__file__).parent.rglob("test_*.py") for name in checked(path.read_text())}
    assert found == registered()


@pytest.mark.no_launch
def test_an_op_that_nobody_checks_is_noticed():
    assert set(checked("def test():\n    opcheck(OPS.one, 1)\n    other(OPS.two, 2)")) == {"one"}
