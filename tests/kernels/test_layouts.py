"""Any strides of inputs and upstream gradients: an op that assumes contiguity passes all other tests."""

import pytest
import torch

from fastbert.testing.rows import DEVICE, DROPOUT_ADD_LAYERNORM, OPS, assert_same, check, make_inputs, run, seed_tensor

from .layouts import LAYOUTS, contiguous, offset, sliced, transposed


def fixed_options(op):
    return {"p": 0.25, "seed": seed_tensor(7)} if op is DROPOUT_ADD_LAYERNORM else {}


@pytest.mark.parametrize("dy_layout", LAYOUTS, ids=lambda f: "dy_" + f.__name__)
@pytest.mark.parametrize("x_layout", LAYOUTS, ids=lambda f: "x_" + f.__name__)
@pytest.mark.parametrize("op", OPS, ids=str)
def test_every_pair_of_layouts(op, x_layout, dy_layout):
    """The same bits as from contiguous copies, and within the bound of eager on the same layouts."""
    inputs = make_inputs(op, (37, 48))
    inputs["x"] = x_layout(inputs["x"])
    if "residual" in inputs:
        inputs["residual"] = LAYOUTS[LAYOUTS.index(x_layout) - 1](inputs["residual"])
    dy = dy_layout(torch.randn(37, 48, device=DEVICE))
    assert dy.is_contiguous() == (dy_layout in (contiguous, offset))  # the case is what it claims

    results = check(op, inputs, dy)
    plain = run(op.call, {k: t.contiguous().clone() for k, t in inputs.items()}, dy.contiguous())
    assert_same(results, plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("op", OPS, ids=str)
def test_gradient_of_a_sum(op, dtype):
    """`y.sum().backward()`: the upstream gradient is one element, with every stride 0."""
    inputs = make_inputs(op, (37, 48), dtype)
    dy = torch.full((), 0.5, dtype=dtype, device=DEVICE).expand(37, 48)
    check(op, inputs, dy, **fixed_options(op))


@pytest.mark.parametrize("op", OPS, ids=str)
def test_columns_of_one_value(op):
    """x with column stride 0; only the biases distinguish its columns."""
    inputs = make_inputs(op, (37, 48))
    inputs["x"] = inputs["x"][:, :1].expand(37, 48)
    check(op, inputs, torch.randn(37, 1, device=DEVICE).expand(37, 48).cos(), **fixed_options(op))


def swapped(x):
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def broadcast(x):
    return x[:, :1].expand_as(x)


def permuted(x):
    return x.permute(2, 0, 1).contiguous().permute(1, 2, 0)


def cut_from_longer(x):
    return torch.cat([x, torch.full_like(x, torch.nan)], dim=1)[:, : x.shape[1]]


@pytest.mark.parametrize("layout", [swapped, broadcast, permuted, cut_from_longer], ids=lambda f: f.__name__)
@pytest.mark.parametrize("op", OPS, ids=str)
def test_three_dimensions(op, layout):
    """Layouts of [batch, sequence, H], some of which strides of [rows, H] cannot express."""
    inputs = make_inputs(op, (3, 7, 48))
    for name in op.rows:
        inputs[name] = layout(inputs[name])
    check(op, inputs, layout(torch.randn(3, 7, 48, device=DEVICE)), **fixed_options(op))


@pytest.mark.parametrize("layout", ["sliced", "expanded", "reversed"])
@pytest.mark.parametrize("op", OPS, ids=str)
def test_vectors(op, layout):
    inputs = make_inputs(op, (17, 48))
    for name in op.vectors:
        vector = inputs[name]
        inputs[name] = {
            "sliced": lambda v: torch.stack([v, v * torch.nan], dim=1)[:, 0],
            "expanded": lambda v: v[:1].expand_as(v),
            "reversed": lambda v: v.flip(0),
        }[layout](vector)
    check(op, inputs, **fixed_options(op))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("layout", [transposed, sliced], ids=lambda f: f.__name__)
@pytest.mark.parametrize("op", OPS, ids=str)
def test_few_rows(op, layout, rows):
    """Strides of a dimension of size 1 are arbitrary, and torch returns odd ones."""
    inputs = make_inputs(op, (rows, 48))
    inputs["x"] = layout(inputs["x"])
    check(op, inputs, layout(torch.randn(rows, 48, device=DEVICE)), **fixed_options(op))
