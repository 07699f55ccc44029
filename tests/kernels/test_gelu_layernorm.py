"""gelu_layernorm: every width, row count, dtype and activation, autocast's dtypes, and frozen inputs."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastbert.kernels.core.checks import ACTIVATIONS
from fastbert.kernels.core.launch import recording
from fastbert.kernels.gelu_layernorm import gelu_layernorm
from fastbert.testing.rows import DEVICE, GELU_LAYERNORM, check, make_inputs, run

from .cases import DTYPES, ROWS, dtype_name, matrix, subsets

OP = GELU_LAYERNORM
NAMES = ("x", "weight", "bias", "x_bias")
HALF, SINGLE, DOUBLE = torch.float16, torch.float32, torch.float64


@pytest.mark.parametrize("rows, width, dtype, optional, options", matrix(OP))
def test_matrix(rows, width, dtype, optional, options):
    check(OP, make_inputs(OP, (rows, width), dtype, optional=optional), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("optional", [True, False], ids=["biased", "plain"])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 30.0])
def test_activations(activation, dtype, optional, scale):
    check(OP, make_inputs(OP, (17, 96), dtype, optional=optional, scale=scale), activation=activation)


@pytest.mark.parametrize("shape", [(72,), (3, 72), (2, 3, 72), (1, 1, 1, 1, 72), (3, 0, 72), (5, 0)], ids=str)
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_leading_dimensions(shape, activation, request):
    if 0 in shape:
        request.applymarker(pytest.mark.no_launch)
    results = check(OP, make_inputs(OP, shape), activation=activation)
    assert results["y"].shape == shape and results["y"].is_contiguous()


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.1, 3.0])
def test_eps(eps):
    """At this scale the variance is about 1e-4, so that a missing or replaced eps shows."""
    check(OP, make_inputs(OP, (5, 96), scale=2e-2), eps=eps)


@pytest.mark.parametrize("out", [None, SINGLE, HALF], ids=["same", "to_float32", "to_float16"])
@pytest.mark.parametrize(
    "x, weights, x_bias",
    [(HALF, SINGLE, SINGLE), (HALF, HALF, SINGLE), (SINGLE, HALF, HALF), (DOUBLE, SINGLE, DOUBLE)],
    ids=lambda dtype: dtype_name(dtype),
)
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_mixed_dtypes(x, weights, x_bias, out, activation):
    dtypes = {"x": x, "weight": weights, "bias": weights, "x_bias": x_bias}
    inputs = make_inputs(OP, (17, 96), dtypes=dtypes)
    results = check(OP, inputs, activation=activation, out_dtype=out)
    assert results["y"].dtype == (out or x)
    assert all(results["d" + name].dtype == tensor.dtype for name, tensor in inputs.items())


@pytest.mark.parametrize("frozen", subsets(NAMES), ids=lambda names: "-".join(names) or "none")
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_frozen_inputs(frozen, activation):
    """Each gradient is the same whichever others are asked for."""
    results = check(OP, make_inputs(OP, (17, 40)), frozen=frozen, activation=activation)
    assert [name for name in NAMES if results["d" + name] is None] == list(frozen)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("rows", ROWS[1:])
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_one_column(rows, dtype, activation):
    """A row of one element has no variance: y is the bias, and exactly only the bias has a gradient."""
    dy = torch.randn(rows, 1).to(DEVICE, dtype)
    inputs = make_inputs(OP, (rows, 1), dtype)
    results = run(gelu_layernorm, inputs, dy, activation=activation)
    assert torch.equal(results["y"], inputs["bias"].expand(rows, 1))
    for name in ("dx", "dweight", "dx_bias"):
        assert torch.count_nonzero(results[name]) == 0, name
    torch.testing.assert_close(results["dbias"], dy.sum(0))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode, launches):
    inputs = make_inputs(OP, (33, 96))
    trained = run(gelu_layernorm, inputs, None)["y"]
    with mode():
        y = gelu_layernorm(**inputs)
    assert not y.requires_grad and torch.equal(y, trained)
    assert launches() == {OP.forward_kernel: 2}


def test_the_default_is_the_exact_gelu():
    inputs = make_inputs(OP, (5, 96), scale=2.0)
    assert torch.equal(gelu_layernorm(**inputs), gelu_layernorm(**inputs, activation="gelu"))
    assert not torch.equal(gelu_layernorm(**inputs), gelu_layernorm(**inputs, activation="gelu_tanh"))


VIEWS = ("_unsafe_view", "detach", "empty", "empty_like", "new_empty", "unbind", "view")


class Calls(TorchDispatchMode):
    """torch's operations, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0]
        self.names += [] if name in VIEWS else [name]
        return func(*args, **(kwargs or {}))


@pytest.mark.no_launch
@pytest.mark.parametrize("other, casts", [(HALF, 0), (SINGLE, 2)], ids=str)
def test_sums_over_rows_are_added_up_and_cast_in_one_launch(other, casts):
    """torch computes nothing, unless the vectors have different dtypes: then the 16-bit gradients are cast."""
    inputs = make_inputs(OP, (3, 40), HALF, dtypes={"bias": other})
    leaves, dy = [x.requires_grad_() for x in inputs.values()], torch.ones(3, 40, dtype=HALF, device=DEVICE)
    kernels = []
    with recording("sm_90", lambda kernel, *others: kernels.append(kernel.__name__)), Calls() as calls:
        torch.autograd.grad(gelu_layernorm(**inputs), leaves, dy)
    assert kernels == ["gelu_layernorm_fwd_kernel", "gelu_layernorm_bwd_kernel", "column_sums_kernel"]
    assert calls.names == ["_to_copy"] * casts
