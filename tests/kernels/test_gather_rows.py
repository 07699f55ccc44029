"""gather_rows: rows where the indices say, zeros elsewhere, gradients back in the rows that were read."""

import pytest
import torch

from fastbert.kernels import reference
from fastbert.kernels.core.launch import recording
from fastbert.kernels.gather_rows import gather_rows
from fastbert.testing.rows import DEVICE

from .layouts import LAYOUTS, guarded
from .opchecking import opcheck
from .test_memory import guards_of, poisoned_outputs

DTYPES = [torch.float64, torch.float32, torch.float16]
KERNEL = "gather_rows_kernel"


def indices(n_rows, taken, extra=0):
    """Row numbers below n_rows in any order, with `extra` entries of -1 in between; and the inverse."""
    index = torch.cat([torch.randperm(n_rows)[:taken], torch.full((extra,), -1)])
    index = index[torch.randperm(len(index))]
    inverse = torch.full((n_rows,), -1)
    inverse[index[index >= 0]] = torch.arange(len(index))[index >= 0]
    return index.to(DEVICE, torch.int32), inverse.to(DEVICE, torch.int32)


def check(x, index, inverse, dy=None):
    """Copies are exact, so everything is equal to the bit."""
    dy = torch.randn(len(index), x.shape[1], dtype=torch.float64).to(x) if dy is None else dy
    results = []
    for function in (gather_rows, reference.gather_rows):
        leaf = x.detach().requires_grad_()
        y = function(leaf, index, inverse)
        results.append((y, *torch.autograd.grad(y, leaf, dy)))
    (y, dx), (expected, dx_expected) = results
    assert torch.equal(y, expected) and torch.equal(dx, dx_expected)
    assert y.is_contiguous() and y.shape == (len(index), x.shape[1]) and y.dtype == x.dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 37, 64, 768, 1023, 1500])
@pytest.mark.parametrize("rows, taken, extra", [(1, 1, 0), (7, 3, 0), (40, 33, 5), (65, 65, 0)])
def test_against_the_reference(rows, taken, extra, width, dtype, launches):
    check(torch.randn(rows, width, dtype=torch.float64).to(DEVICE, dtype), *indices(rows, taken, extra))
    assert launches() == {KERNEL: 2}


@pytest.mark.parametrize("dy_layout", LAYOUTS, ids=lambda f: "dy_" + f.__name__)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_layouts(layout, dy_layout):
    index, inverse = indices(19, 11, 3)
    check(layout(torch.randn(19, 24, device=DEVICE)), index, inverse, dy_layout(torch.randn(14, 24, device=DEVICE)))


def test_packing_and_unpacking_are_each_others_inverse():
    index, inverse = indices(40, 25)
    x = torch.randn(40, 16, device=DEVICE)
    back = gather_rows(gather_rows(x, index, inverse), inverse, index)
    assert torch.equal(back, torch.where((inverse >= 0)[:, None], x, 0.0))


def test_rows_that_nobody_takes_are_not_read_and_get_no_gradient():
    index, inverse = indices(20, 9)
    x = torch.randn(20, 16, device=DEVICE)
    x[inverse < 0] = torch.nan
    x = guarded(x).requires_grad_()
    y = gather_rows(x, index, inverse)
    assert y.isfinite().all()
    y.sum().backward()
    assert not x.grad[inverse < 0].any() and (x.grad[inverse >= 0] == 1).all()


@pytest.mark.parametrize("rows, taken, width", [(1, 1, 1), (7, 5, 37), (65, 33, 48)])
def test_writes_stay_inside(rows, taken, width, monkeypatch):
    index, inverse = indices(rows, taken, extra=1)
    x = torch.randn(rows, width, device=DEVICE, requires_grad=True)
    with poisoned_outputs(monkeypatch) as given:
        y = gather_rows(x, index, inverse)
        torch.autograd.grad(y, x, torch.ones(y.shape, device=DEVICE))
    assert len(given) == 2
    for tensor in given:
        assert tensor.isfinite().all() and guards_of(tensor).isnan().all(), f"written outside of {tuple(tensor.shape)}"


@pytest.mark.no_launch
@pytest.mark.parametrize("rows, width", [(0, 8), (3, 0)])
def test_empty(rows, width):
    index, inverse = torch.arange(rows, dtype=torch.int32, device=DEVICE), torch.arange(rows, dtype=torch.int32, device=DEVICE)
    check(torch.randn(rows, width, device=DEVICE), index, inverse)


def test_nothing_of_something_is_zeros():
    index, inverse = (
        torch.full((3,), -1, dtype=torch.int32, device=DEVICE),
        torch.full((5,), -1, dtype=torch.int32, device=DEVICE),
    )
    assert not gather_rows(torch.randn(5, 8, device=DEVICE), index, inverse).any()


def test_gradcheck():
    index, inverse = indices(6, 4, 2)
    x = torch.randn(6, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, index, inverse), x)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_opcheck(layout):
    index, inverse = indices(9, 5, 1)
    x = layout(torch.randn(9, 12, device=DEVICE)).requires_grad_()
    opcheck(torch.ops.fastbert.gather_rows, x, index, inverse)


@pytest.mark.no_launch
def test_sizes_past_32_bits():
    """Three million packed tokens of BERT-base: more elements than int32 counts, each with a program."""
    launched = []
    x = torch.empty(3_000_000, 768, dtype=torch.bfloat16, device="meta")
    index = torch.empty(3_000_000, dtype=torch.int32, device="meta")
    with recording("sm_90", lambda *launch: launched.append(launch)):
        gather_rows(x, index, index)
    ((_, programs, config, arguments),) = launched
    columns = -(-768 // config.BLOCK_N)
    assert programs * config.BLOCK_M >= 3_000_000 * columns and arguments["n_rows"] == 3_000_000


@pytest.mark.no_launch
@pytest.mark.parametrize(
    "argument, change",
    [
        ("x", {"x": torch.zeros(5)}),
        ("x", {"x": torch.zeros(5, 4, dtype=torch.int64)}),
        ("index", {"index": torch.zeros(3, dtype=torch.int64)}),
        ("index", {"index": torch.zeros(3, 1, dtype=torch.int32)}),
        ("inverse", {"inverse": torch.zeros(4, dtype=torch.int32)}),
        ("inverse", {"inverse": torch.zeros(5)}),
    ],
    ids=str,
)
def test_wrong_arguments(argument, change):
    right = {"x": torch.zeros(5, 4), "index": torch.zeros(3, dtype=torch.int32), "inverse": torch.zeros(5, dtype=torch.int32)}
    with pytest.raises(ValueError, match=rf"^{argument}: "):
        gather_rows(**{name: tensor.to(DEVICE) for name, tensor in (right | change).items()})
