"""key_bounds: the reference's numbers for every mask, length and layout."""

import itertools

import pytest
import torch

from fastbert.kernels import reference
from fastbert.kernels.key_bounds import key_bounds
from fastbert.testing.rows import DEVICE

from .attention.test_memory import fenced
from .opchecking import opcheck

KERNEL = "key_bounds_kernel"
LENGTHS = (0, 1, 2, 5, 1023, 1024, 1025, 3000)  # numbers of keys; a program's block has 1024
VIEWS = {
    "contiguous": lambda mask: mask,
    "transposed": lambda mask: mask.t().contiguous().t(),
    "sliced": lambda mask: torch.stack([mask, ~mask], 2)[:, :, 0],
    "expanded": lambda mask: mask[:1].expand(4, -1),
}


def masks_of(length):
    """Every mask of up to five keys; of more keys masks with few, many, all and none seen."""
    if length <= 5:
        return torch.tensor(list(itertools.product((False, True), repeat=length)), dtype=torch.bool).reshape(2**length, length)
    rates = torch.tensor([0.0, 0.001, 0.5, 0.999, 1.0])
    return torch.rand(len(rates), length) < rates[:, None]


def same(mask):
    bounds, expected = key_bounds(mask), reference.key_bounds(mask)
    assert bounds.dtype == torch.int32 and bounds.is_contiguous()
    assert torch.equal(bounds, expected)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("length", LENGTHS)
def test_against_the_reference(length, view, launches):
    same(VIEWS[view](masks_of(length).to(DEVICE)))
    assert launches() == {KERNEL: 1}


@pytest.mark.parametrize("length", [1500, 2049])
@pytest.mark.parametrize("place", [0, 1, 1022, 1023, 1024, -1])
def test_one_key_that_differs_wherever_it_is(place, length):
    mask = torch.zeros(2, length, dtype=torch.bool, device=DEVICE)
    mask[0, place] = True
    mask[1] = ~mask[0]
    same(mask)


def test_nothing_is_read_behind_a_row():
    """The bytes behind each mask are its opposite."""
    for value in (False, True):
        around = torch.full((3, 2060), not value, dtype=torch.bool, device=DEVICE)
        around[:, :1030] = value
        same(around[:, :1030])
    same(fenced(masks_of(5).to(DEVICE), 1))


@pytest.mark.no_launch
def test_no_rows():
    assert key_bounds(torch.zeros(0, 7, dtype=torch.bool, device=DEVICE)).shape == (0, 3)


@pytest.mark.parametrize("view", VIEWS)
def test_opcheck(view):
    opcheck(torch.ops.fastbert.key_bounds, VIEWS[view](masks_of(5).to(DEVICE)))


@pytest.mark.no_launch
@pytest.mark.parametrize("mask", [torch.ones(2, 3), torch.ones(3, dtype=torch.bool), torch.ones(2, 1, 3, dtype=torch.bool)])
def test_wrong_arguments(mask):
    with pytest.raises(ValueError, match=r"^key_mask: expected bool \[B, S\]"):
        key_bounds(mask.to(DEVICE))
