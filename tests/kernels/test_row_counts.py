"""row_counts: tokens of each row, positions that are read, and whether one of those is padding."""

import pytest
import torch

from fastbert.kernels import reference
from fastbert.kernels.row_counts import row_counts
from fastbert.testing.rows import DEVICE

from .opchecking import opcheck
from .test_key_bounds import VIEWS

KERNEL = "row_counts_kernel"


def masks(batch=4, length=9, rate=0.6):
    return tuple((torch.rand(batch, length) < r).to(DEVICE) for r in (rate, 0.5 * rate))


def same(tokens, read):
    counts, expected = row_counts(tokens, read), reference.row_counts(tokens, read)
    assert counts.dtype == torch.int32 and counts.is_contiguous() and torch.equal(counts, expected)
    return counts


@pytest.mark.parametrize("length", [1, 9, 1023, 1025, 3000])
@pytest.mark.parametrize("rate", [0.0, 0.6, 1.0])
def test_against_the_reference(rate, length, launches):
    tokens, read = masks(5, length, rate)
    for pair in ((tokens, read), (tokens, None), (None, read)):
        same(*pair)
    assert launches() == {KERNEL: 3}


@pytest.mark.parametrize("views", [*zip(VIEWS, reversed(VIEWS), strict=True)], ids=str)
def test_layouts(views):
    same(*(VIEWS[view](mask) for view, mask in zip(views, masks(), strict=True)))


@pytest.mark.parametrize("place", [0, 1, 1023, 1024, 1499])
def test_a_read_position_that_is_padding_is_noticed_wherever_it_is(place):
    tokens = torch.ones(3, 1500, dtype=torch.bool, device=DEVICE)
    read = tokens.clone()
    tokens[1, place] = False
    assert same(tokens, read)[2].tolist() == [0, 1, 0]
    assert same(tokens, None)[2].tolist() == [0, int(place == 0), 0]
    read[1, place] = False
    assert not same(tokens, read)[2].any()


@pytest.mark.no_launch
def test_nothing():
    assert row_counts(torch.zeros(0, 4, dtype=torch.bool, device=DEVICE), None).shape == (3, 0)


def test_no_columns():
    assert not same(*(torch.zeros(2, 0, dtype=torch.bool, device=DEVICE) for _ in range(2))).any()


@pytest.mark.parametrize("view", VIEWS)
def test_opcheck(view):
    tokens, read = (VIEWS[view](mask) for mask in masks())
    for pair in ((tokens, read), (tokens, None), (None, read)):
        opcheck(torch.ops.fastbert.row_counts, *pair)


@pytest.mark.no_launch
@pytest.mark.parametrize(
    "argument, tokens, read",
    [
        ("tokens", None, None),
        ("tokens", torch.ones(2, 3), None),
        ("tokens", torch.ones(3, dtype=torch.bool), None),
        ("read", None, torch.ones(2, 3, dtype=torch.int64)),
        ("read", torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool)),
    ],
)
def test_wrong_arguments(argument, tokens, read):
    with pytest.raises(ValueError, match=rf"^{argument}: expected bool"):
        row_counts(*(None if mask is None else mask.to(DEVICE) for mask in (tokens, read)))
