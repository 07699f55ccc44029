"""Invariances of the ops on rows: the number of rows, their order, and the contents of other rows do not matter."""

import pytest
import torch

from fastbert.testing.rows import BIAS_GELU, DEVICE, DROPOUT_ADD_LAYERNORM, GELU_LAYERNORM, OPS, make_inputs, run

from .layouts import guarded

ROW_RESULTS = ("y", "dx", "dresidual")
BAD = [torch.nan, torch.inf, -torch.inf]


def of_rows(op, inputs, dy, index, **options):
    """The results for the rows `index` alone, without sums over rows."""
    chosen = {name: t[index] if name in op.rows else t for name, t in inputs.items()}
    results = run(op.call, chosen, dy[index], **options)
    return {name: results[name] for name in ROW_RESULTS if results.get(name) is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("op", OPS, ids=str)
def test_the_order_of_rows(op, dtype):
    inputs, dy, order = make_inputs(op, (70, 40), dtype), torch.randn(70, 40).to(DEVICE, dtype), torch.randperm(70)
    straight, shuffled = of_rows(op, inputs, dy, torch.arange(70)), of_rows(op, inputs, dy, order)
    for name, rows in straight.items():
        assert torch.equal(shuffled[name], rows[order.to(DEVICE)]), name


@pytest.mark.parametrize("fewer", [1, 2, 31, 32, 33, 69])
@pytest.mark.parametrize("op", OPS, ids=str)
def test_the_number_of_rows(op, fewer):
    inputs, dy = make_inputs(op, (70, 40)), torch.randn(70, 40, device=DEVICE)
    all_rows, first = of_rows(op, inputs, dy, slice(70)), of_rows(op, inputs, dy, slice(fewer))
    for name, rows in all_rows.items():
        assert torch.equal(first[name], rows[:fewer]), name


@pytest.mark.parametrize("fewer", [1, 33])
def test_the_number_of_rows_with_dropout(fewer):
    op = DROPOUT_ADD_LAYERNORM
    inputs, dy = make_inputs(op, (70, 40)), torch.randn(70, 40, device=DEVICE)
    options = {"p": 0.5, "seed": torch.tensor(3, device=DEVICE)}
    all_rows, first = of_rows(op, inputs, dy, slice(70), **options), of_rows(op, inputs, dy, slice(fewer), **options)
    for name, rows in all_rows.items():
        assert torch.equal(first[name], rows[:fewer]), name


@pytest.mark.parametrize("where", [0, 33])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", ["x", "dy"])
@pytest.mark.parametrize("op", OPS, ids=str)
def test_a_bad_row_stays_alone(op, name, bad, where):
    """A NaN or an infinity changes only the results of its own row, and the sums over rows."""
    inputs, dy = make_inputs(op, (37, 40)), torch.randn(37, 40, device=DEVICE)
    clean = run(op.call, inputs, dy)
    tensor = inputs["x"] if name == "x" else dy
    tensor[where, 7] = bad
    spoiled = run(op.call, inputs, dy)
    others = torch.arange(37, device=DEVICE) != where
    for result in ROW_RESULTS:
        if clean.get(result) is not None:
            assert torch.equal(spoiled[result][others], clean[result][others]), result
    assert not spoiled["dbias"].isfinite().all() or name == "x"
    assert not (spoiled["y"][where].isfinite().all() and spoiled["dx"][where].isfinite().all()) or bad == torch.inf


@pytest.mark.parametrize("op", [DROPOUT_ADD_LAYERNORM, GELU_LAYERNORM], ids=str)
def test_repeated_rows_add_up_in_the_weight_gradients(op):
    """Rows are in blocks and blocks in programs: no row is counted twice or left out."""
    inputs, dy = make_inputs(op, (1, 40), torch.float64), torch.randn(1, 40, dtype=torch.float64, device=DEVICE)
    one = run(op.call, inputs, dy)
    for times in (2, 33, 64, 129):
        repeated = {k: t.expand(times, 40) if k in op.rows else t for k, t in inputs.items()}
        many = run(op.call, repeated, dy.expand(times, 40))
        for name in ("dweight", "dbias", "dx_bias"):
            torch.testing.assert_close(many[name], times * one[name])


@pytest.mark.parametrize("factor", [2.0**-10, 0.5, 8.0, 2.0**12])
def test_layernorm_does_not_see_a_uniform_scale(factor):
    """A power of two scales every number exactly, so only eps = 0 is needed for equal bits."""
    inputs = make_inputs(DROPOUT_ADD_LAYERNORM, (9, 40))
    scaled = inputs | {name: inputs[name] * factor for name in ("x", "residual", "x_bias")}
    dy = torch.randn(9, 40, device=DEVICE)
    one = run(DROPOUT_ADD_LAYERNORM.call, inputs, dy, eps=0.0)
    other = run(DROPOUT_ADD_LAYERNORM.call, scaled, dy, eps=0.0)
    for name in ("y", "dweight", "dbias"):
        torch.testing.assert_close(other[name], one[name])
    torch.testing.assert_close(other["dx"] * factor, one["dx"])


@pytest.mark.parametrize("op", OPS, ids=str)
def test_gradients_are_linear_in_the_upstream_gradient(op):
    inputs, dy = make_inputs(op, (9, 40)), torch.randn(9, 40, device=DEVICE)
    one, four = run(op.call, inputs, dy), run(op.call, inputs, 4 * dy)
    for name in one.keys() - {"y"}:
        assert torch.equal(four[name], 4 * one[name]), name


@pytest.mark.parametrize("op", OPS, ids=str)
def test_the_optional_bias_is_an_addition(op):
    """x with a bias of zeros equals x without one."""
    inputs, dy = make_inputs(op, (9, 40)), torch.randn(9, 40, device=DEVICE)
    zeros = run(op.call, inputs | {op.optional: guarded(torch.zeros_like(inputs[op.optional]))}, dy)
    without = run(op.call, inputs | {op.optional: None}, dy)
    for name in without.keys() - {"d" + op.optional}:
        assert torch.equal(zeros[name], without[name]), name


def test_bias_gelu_is_elementwise():
    """Transposing the input transposes the result if no bias distinguishes columns."""
    x, dy = torch.randn(9, 40, device=DEVICE), torch.randn(9, 40, device=DEVICE)
    one = run(BIAS_GELU.call, {"x": x, "bias": None}, dy)
    other = run(BIAS_GELU.call, {"x": x.t(), "bias": None}, dy.t())
    assert torch.equal(one["y"], other["y"].t()) and torch.equal(one["dx"], other["dx"].t())
