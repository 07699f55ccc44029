"""Numerical against analytical gradients in float64, in which the kernels then compute throughout."""

import itertools

import pytest
import torch

from fastbert.kernels.core.checks import ACTIVATIONS
from fastbert.testing.rows import BIAS_GELU, DROPOUT_ADD_LAYERNORM, GELU_LAYERNORM, OPS, make_inputs, seed_tensor

from .layouts import expanded, sliced, transposed

SMALL, WIDE, DEEP = (2, 4), (2, 37), (2, 2, 6)


def gradcheck(op, inputs, **options):
    """Element by element on a small case that has every input; in random directions on the others."""
    leaves = {name: t.requires_grad_() for name, t in inputs.items() if t is not None}
    fast = inputs["x"].numel() > 8 or len(leaves) < len(inputs)
    torch.autograd.gradcheck(
        lambda *tensors: op.call(**dict(zip(leaves, tensors, strict=True)), **options),
        tuple(leaves.values()),
        fast_mode=fast,
        check_undefined_grad=not fast,
        nondet_tol=0.0,
    )


@pytest.mark.parametrize("shape", [SMALL, WIDE, DEEP], ids=str)
@pytest.mark.parametrize("optional", [True, False], ids=["biased", "plain"])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_dropout_add_layernorm(p, optional, shape):
    inputs = make_inputs(DROPOUT_ADD_LAYERNORM, shape, torch.float64, optional=optional)
    gradcheck(DROPOUT_ADD_LAYERNORM, inputs, p=p, seed=seed_tensor(11))


@pytest.mark.parametrize("shape", [SMALL, WIDE, DEEP], ids=str)
@pytest.mark.parametrize("optional", [True, False], ids=["biased", "plain"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bias_gelu(activation, optional, shape):
    gradcheck(BIAS_GELU, make_inputs(BIAS_GELU, shape, torch.float64, optional=optional), activation=activation)


@pytest.mark.parametrize("shape", [SMALL, WIDE, DEEP], ids=str)
@pytest.mark.parametrize("optional", [True, False], ids=["biased", "plain"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gelu_layernorm(activation, optional, shape):
    # eps keeps a row that relu leaves without variance smooth enough to differentiate numerically.
    inputs = make_inputs(GELU_LAYERNORM, shape, torch.float64, optional=optional)
    gradcheck(GELU_LAYERNORM, inputs, activation=activation, eps=1e-2)


@pytest.mark.parametrize(
    "op, layout",
    list(itertools.product(OPS, [transposed, sliced, expanded])),
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_layouts(op, layout):
    inputs = make_inputs(op, (3, 6), torch.float64)
    base = inputs["x"]
    options = {"p": 0.3, "seed": seed_tensor(11)} if op is DROPOUT_ADD_LAYERNORM else {}
    vectors = {name: t for name, t in inputs.items() if name != "x"}
    torch.autograd.gradcheck(
        lambda x: op.call(x=layout(x), **vectors, **options),
        (base.requires_grad_(),),
        fast_mode=True,
        check_undefined_grad=False,
    )


@pytest.mark.parametrize("op", OPS, ids=str)
def test_a_second_derivative_raises(op):
    """The backward kernels have no derivative; an error is better than zeros."""
    inputs = make_inputs(op, (3, 6), torch.float64)
    x = inputs["x"].requires_grad_()
    (dx,) = torch.autograd.grad(op.call(**inputs).sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()
