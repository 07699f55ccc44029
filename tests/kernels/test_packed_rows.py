"""packed_rows: the reference's indices of tokens and of rows that are read, to the bit; capacities that are too large or too
small."""

import pytest
import torch
from hypothesis import given, note
from hypothesis import strategies as st

from fastbert.kernels import reference
from fastbert.kernels.packed_rows import packed_rows
from fastbert.kernels.row_counts import row_counts
from fastbert.testing.rows import DEVICE

from .opchecking import opcheck
from .test_key_bounds import VIEWS
from .test_memory import guards_of, poisoned_outputs

KERNEL = "packed_rows_kernel"
WHAT = ("tokens", "tokens and first", "tokens and read", "first", "read")


def masks(batch=4, length=9, rate=0.6):
    return tuple((torch.rand(batch, length) < r).to(DEVICE) for r in (rate, 0.5 * rate))


def arguments_of(what, tokens, read, extra=0, extra_read=0, check=True):
    """The arguments of a caller who counted, with so much more capacity (a budget, of sequences up to S) or less."""
    tokens = tokens if "tokens" in what else None
    read = read if "read" in what else None
    either = tokens if read is None else read
    batch, length = (4, 9) if either is None else either.shape
    counts = torch.zeros(3, batch, dtype=torch.int32, device=DEVICE) if either is None else row_counts(tokens, read)
    capacity = batch * length, length, True
    if tokens is not None:
        most = int(counts[0].max()) if len(counts[0]) else 0
        capacity = max(0, int(counts[0].sum()) + extra), length if extra else most, not extra
    alone = batch, 1, True
    if read is not None:
        most = int(counts[1].max()) if len(counts[1]) else 0
        alone = max(0, int(counts[1].sum()) + extra_read), length if extra_read else most, not extra_read
    if what == "tokens":
        alone = 0, 0, True
    return counts, tokens, read, length, *capacity, "first" in what, *alone, check


def same(*arguments):
    found, expected = packed_rows(*arguments), reference.packed_rows(*arguments)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other), (found, expected)
    return found


@pytest.mark.parametrize("extra", [0, 1, 30])
@pytest.mark.parametrize("length", [1, 9, 1030])
@pytest.mark.parametrize("what", WHAT)
def test_against_the_reference(what, length, extra, launches):
    tokens, read = masks(4, length)
    arguments = arguments_of(what, tokens, read, extra, extra)
    same(*arguments)
    assert launches()[KERNEL] == 1
    if what in ("tokens", "tokens and first"):
        assert packed_rows(*arguments)[-1][0]


@pytest.mark.parametrize("rate", [0.0, 1.0])
@pytest.mark.parametrize("what", WHAT)
def test_no_token_and_no_padding(what, rate):
    same(*arguments_of(what, *masks(rate=rate)))
    same(*arguments_of(what, *masks(rate=rate), extra=5, extra_read=7))


@pytest.mark.parametrize("batch", [1, 1025, 2100])
def test_many_rows(batch):
    """More than a program sums at once."""
    same(*arguments_of("tokens and read", *masks(batch, 3), extra=batch))


@pytest.mark.parametrize("extra", [-1, -5, -1000])
def test_rows_beyond_the_capacity_are_left_out_and_reported(extra, monkeypatch):
    arguments = arguments_of("tokens and read", *masks(), extra, extra)
    with poisoned_outputs(monkeypatch) as allocated:
        fits = same(*arguments)[-1]
    assert fits.tolist()[:2] == [False, False]
    assert all(guards_of(tensor).isnan().all() for tensor in allocated if tensor.is_floating_point())


def test_what_is_claimed_is_compared():
    tokens = torch.tensor([[True, True, True], [True, False, False]], device=DEVICE)
    read = torch.tensor([[False, True, False], [True, False, False]], device=DEVICE)
    counts = row_counts(tokens, read)

    def fits(capacity, longest, exact, n, most, read_exact):
        return same(counts, tokens, read, 3, capacity, longest, exact, False, n, most, read_exact, True)[-1].tolist()

    assert fits(4, 3, True, 2, 1, True) == [True, True, True]
    assert fits(5, 3, True, 3, 1, True)[:2] == [False, False]
    assert fits(5, 3, False, 3, 1, False)[:2] == [True, True]
    assert fits(3, 3, False, 1, 1, False)[:2] == [False, False]
    assert fits(4, 2, True, 2, 0, True)[:2] == [False, False]
    read = ~tokens
    counts = row_counts(tokens, read)
    assert fits(4, 3, True, 2, 2, True) == [True, True, False]


def test_sequences_of_what_is_read_are_as_many_as_the_tokens():
    tokens, read = masks()
    bounds, _, _, read_bounds, *_ = same(*arguments_of("tokens and first", tokens, read, extra=40))
    assert len(bounds) > 5 and len(read_bounds) == len(bounds)
    assert read_bounds.tolist()[4:] == [4] * (len(bounds) - 4)


@pytest.mark.parametrize("views", [*zip(VIEWS, reversed(VIEWS), strict=True)], ids=str)
def test_layouts(views):
    tokens, read = (VIEWS[view](mask) for view, mask in zip(views, masks(), strict=True))
    same(*arguments_of("tokens and read", tokens, read))


@pytest.mark.no_launch
def test_nothing():
    empty = torch.zeros(0, 4, dtype=torch.bool, device=DEVICE)
    bounds, index, inverse = packed_rows(*arguments_of("tokens", empty, empty, check=False))
    assert bounds.shape == (1,) and not len(index) and not len(inverse)


@given(
    batch=st.integers(1, 6),
    length=st.integers(1, 12),
    rates=st.tuples(*[st.sampled_from([0.0, 0.2, 0.7, 1.0])] * 2),
    what=st.sampled_from(WHAT),
    extra=st.integers(-4, 30),
    extra_read=st.integers(-4, 30),
    values=st.integers(0, 2**31),
)
def test_any_masks_and_rooms(batch, length, rates, what, extra, extra_read, values):
    note(f"{batch} {length} {rates} {what} {extra} {extra_read}")
    torch.manual_seed(values)
    tokens, read = (torch.rand(batch, length, device=DEVICE) < rate for rate in rates)
    same(*arguments_of(what, tokens, read, extra, extra_read))


@pytest.mark.parametrize("what", WHAT)
def test_opcheck(what):
    for extra in (0, 3):
        opcheck(torch.ops.fastbert.packed_rows, *arguments_of(what, *masks(), extra, extra))


@pytest.mark.no_launch
@pytest.mark.parametrize(
    "argument, change",
    [
        ("counts", {"counts": torch.zeros(3, 2)}),
        ("counts", {"counts": torch.zeros(2, 2, dtype=torch.int32)}),
        ("tokens", {"tokens": torch.zeros(2, 3)}),
        ("tokens", {"tokens": torch.zeros(2, 4, dtype=torch.bool)}),
        ("read", {"read": torch.zeros(3, 3, dtype=torch.bool)}),
    ],
)
def test_wrong_arguments(argument, change):
    right = {"counts": torch.zeros(3, 2, dtype=torch.int32), "tokens": None, "read": None}
    arguments = {name: x if x is None else x.to(DEVICE) for name, x in (right | change).items()}
    with pytest.raises(ValueError, match=rf"^{argument}: expected"):
        packed_rows(**arguments, seqlen=3, capacity=6, longest=3)
