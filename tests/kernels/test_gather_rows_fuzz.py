"""Fuzzes gather_rows: any sizes, layouts and indices; memory; invariances."""

import pytest
import torch
from hypothesis import given, note
from hypothesis import strategies as st

from fastbert.kernels.gather_rows import gather_rows
from fastbert.testing.rows import DEVICE

from .attention.test_memory import fenced
from .layouts import LAYOUTS, expanded, guarded, sliced
from .test_gather_rows import DTYPES, check, indices
from .test_memory import guards_of, poisoned_outputs


@st.composite
def calls(draw):
    n_rows = draw(st.integers(1, 70))
    return {
        "n_rows": n_rows,
        "taken": draw(st.integers(0, n_rows)),
        "extra": draw(st.sampled_from([0, 0, 1, 5, 40])),
        "width": draw(st.integers(1, 130) | st.sampled_from([255, 256, 257, 1023, 1025])),
        "dtype": draw(st.sampled_from(DTYPES)),
        "scale": 10.0 ** draw(st.floats(-4.0, 4.0)),
        "layouts": (draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(LAYOUTS))),
        "values": draw(st.integers(0, 2**31)),
    }


@given(call=calls())
def test_any_legal_call(call):
    note(str(call))
    torch.manual_seed(call["values"])
    index, inverse = indices(call["n_rows"], call["taken"], call["extra"])
    if not len(index):
        index = index.new_full((1,), -1)
    layout, dy_layout = call["layouts"]
    x, dy = (
        layout((call["scale"] * torch.randn(n, call["width"], dtype=torch.float64)).to(DEVICE, call["dtype"]))
        for n, layout in ((call["n_rows"], layout), (len(index), dy_layout))
    )
    check(x, index, inverse, dy)


def gathered(x, index, inverse, dy):
    leaf = x.detach().requires_grad_()
    y = gather_rows(leaf, index, inverse)
    return y.detach(), *torch.autograd.grad(y, leaf, dy)


def case(dtype=torch.float32, width=37):
    index, inverse = indices(33, 20, 5)
    return (
        torch.randn(33, width).to(DEVICE, dtype),
        index,
        inverse,
        torch.randn(25, width).to(DEVICE, dtype),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1, 37, 1025])
def test_reads_and_writes_stay_inside(width, dtype, monkeypatch):
    """Inputs between bands of NaN, indices between bands that name an existing row; outputs that start as NaN in such bands."""
    x, index, inverse, dy = case(dtype, width)
    plain = gathered(x, index, inverse, dy)
    with poisoned_outputs(monkeypatch) as given_out:
        results = gathered(guarded(x), fenced(index, 0), fenced(inverse, 0), guarded(dy))
    assert len(given_out) == 2
    for result, expected in zip(results, plain, strict=True):
        assert torch.equal(result, expected)
    for tensor in given_out:
        assert guards_of(tensor).isnan().all(), f"written outside of {tuple(tensor.shape)}"


@pytest.mark.parametrize("layout", [torch.clone, sliced, expanded], ids=lambda f: f.__name__)
def test_no_input_is_overwritten_or_returned(layout):
    """A second run gives the same bits."""
    x, index, inverse, dy = case()
    read = layout(x), index, inverse, layout(dy)
    before = [tensor.clone() for tensor in read]
    results, again = gathered(*read), gathered(*read)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(read, before, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(results, again, strict=True))
    storages = [tensor.untyped_storage().data_ptr() for tensor in (*read, *results)]
    assert len(set(storages)) == len(storages)


def test_the_order_of_what_is_taken():
    x, index, inverse, dy = case()
    y, dx = gathered(x, index, inverse, dy)
    order = torch.randperm(25).to(DEVICE)
    places = torch.empty_like(order)
    places[order] = torch.arange(25, device=DEVICE)
    moved = torch.where(inverse >= 0, places[inverse.clamp(min=0).long()], -1).to(torch.int32)
    other, other_dx = gathered(x, index[order], moved, dy[order])
    assert torch.equal(other, y[order]) and torch.equal(other_dx, dx)


@pytest.mark.parametrize("more", [1, 40])
def test_spare_capacity_is_zeros(more):
    """Longer padding changes none of the rows, and the gradients that it gets go nowhere."""
    x, index, inverse, dy = case()
    y, dx = gathered(x, index, inverse, dy)
    longer = torch.cat([index, index.new_full((more,), -1)])
    other, other_dx = gathered(x, longer, inverse, torch.cat([dy, dy.new_full((more, 37), torch.nan)]))
    assert torch.equal(other[:25], y) and not other[25:].any() and torch.equal(other_dx, dx)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_row_stays_alone(bad):
    x, index, inverse, dy = case()
    y, dx = gathered(x, index, inverse, dy)
    row, place = int(index[index >= 0][0]), int((index >= 0).nonzero()[0])
    x[row, 3], dy[place, 5] = bad, bad
    other, other_dx = gathered(x, index, inverse, dy)
    assert not (other[place].isfinite().all() or other_dx[row].isfinite().all())
    y[place], dx[row] = other[place].nan_to_num(), other_dx[row].nan_to_num()
    assert torch.equal(other.nan_to_num(), y) and torch.equal(other_dx.nan_to_num(), dx)
