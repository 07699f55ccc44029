"""attention's masks: keys masked by padding, by general masks and by causality, and by all of them."""

import itertools

import pytest
import torch

from fastbert.kernels.attention import attention, bounds_of
from fastbert.testing.attention import check, make_inputs, normal, tiles
from fastbert.testing.rows import DEVICE, assert_same, run

from ..cases import DTYPES, dtype_name

HALF, SINGLE, DOUBLE, BFLOAT = torch.float16, torch.float32, torch.float64, torch.bfloat16
LOWEST = {dtype: torch.finfo(dtype).min for dtype in (HALF, SINGLE, DOUBLE, BFLOAT)}


def key_masks(kind, batch, length):
    """bool [batch, length], with different rows of one kind."""
    place, row = torch.arange(length), torch.arange(batch)[:, None]
    half = (length + 1) // 2
    masks = {
        "none": (place >= 0) & (row >= 0),
        "right": place < (length - (row + 1) * length // 4).clamp(min=2),
        "left": place >= ((row + 1) * length // 4).clamp(max=length - 2),
        "holes": (place * 7 + row * 3) % 5 < 3,
        "both ends": (place > row) & (place < half + row),
        "one token": place == (half + row) % length,
        "all masked": (place < 0) & (row >= 0),
        "some all masked": (place < half) & (row % 2 == 0),
    }
    return masks[kind].to(DEVICE)


KINDS = ("none", "right", "left", "holes", "both ends", "one token", "all masked", "some all masked")


@pytest.mark.one_in(2)
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("length, dtype", [(5, DOUBLE), (40, SINGLE), (97, HALF)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_padding(kind, length, dtype, causal):
    """Over several blocks of keys, some fully masked. With left padding and causality some rows see no key."""
    # Rows that see one key have no gradient of q and k, in eager either: all there is of it is rounding.
    frozen = ("q", "k") if kind == "one token" else ()
    with tiles((16, 16) if length < 97 else (64, 32)):
        results = check(
            make_inputs(2, length, 1, 16, dtype),
            key_mask=key_masks(kind, 2, length),
            causal=causal,
            frozen=frozen,
        )
    assert all(t.isfinite().all() for t in results.values() if t is not None)


@pytest.mark.parametrize("lengths", [(33, 33), (17, 50), (50, 17)], ids=str)
@pytest.mark.parametrize("tile", [(16, 32), (32, 16)], ids=str)
@pytest.mark.parametrize("kind", ["none", "right", "left", "all masked"])
def test_causal_and_padding(kind, tile, lengths):
    """At any lengths the last query sees the last key. The first rows may see no key at all."""
    with tiles(tile, kv=tile[::-1]):
        check(make_inputs(2, lengths, 1, 8), key_mask=key_masks(kind, 2, lengths[1]), causal=True)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["all masked", "some all masked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_a_row_that_sees_no_key_is_the_average_of_all(kind, dtype, p):
    """As eager's additive mask makes it; because masks are added, q and k of such a row have gradients."""
    inputs, key_mask = make_inputs(2, (19, 37), 1, 16, dtype), key_masks(kind, 2, 37)
    with tiles((16, 16)):
        results = check(inputs, key_mask=key_mask, p=p)
    if not p:
        expected = inputs["v"][1].double().mean(0, keepdim=True).expand(19, 1, 16)
        torch.testing.assert_close(results["y"][1], expected.to(dtype))
    assert results["dq"][1].any() and results["dk"][1].any() and results["dv"][1].any()


@pytest.mark.parametrize("valid", [1, 15, 16, 17, 32, 33])
def test_the_last_valid_key_at_the_edge_of_a_block(valid):
    """One key more or less is one block more or less to read, and every kernel has its own loop over them."""
    key_mask = (torch.arange(40) < valid).expand(2, -1).to(DEVICE)
    frozen = ("q", "k") if valid == 1 else ()  # as in test_padding
    with tiles((16, 16)):
        check(make_inputs(2, 40, 1, 8), key_mask=key_mask, frozen=frozen)


FORMS = [*itertools.product((1, 2), (1, 3), (1, 7), (1, 37)), (7, 37), (37,), (3, 1, 37)]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("added", [False, True], ids=["bool", "added"])
def test_every_shape_that_broadcasts(form, added):
    mask = torch.rand(form, device=DEVICE) > 0.3
    if added:
        mask = torch.where(mask, torch.randn(form, device=DEVICE), LOWEST[SINGLE])
    with tiles((16, 32)):
        check(make_inputs(2, (7, 37), 3, 8), mask=mask)


def added_mask(kind, dtype, *shape):
    """One number per score: biases, or minus infinity's stand-in for a third of the keys, or both."""
    masked = torch.rand(shape) < 0.3
    biases = torch.randn(shape, dtype=DOUBLE)
    nothing = torch.zeros_like(biases)
    values = {
        "biases": biases,
        "small biases": 1e-3 * biases,
        "lowest": nothing.masked_fill(masked, LOWEST[dtype]),
        "-10000": nothing.masked_fill(masked, -10000.0),
        "-inf": biases.masked_fill(masked, -torch.inf),
        "mixed": biases.masked_fill(masked, LOWEST[dtype]),
    }
    return values[kind].to(DEVICE, dtype)


ADDED = ("biases", "small biases", "lowest", "-10000", "-inf", "mixed")
OF_DTYPES = [(SINGLE, SINGLE), (HALF, HALF), (HALF, SINGLE), (DOUBLE, DOUBLE), (DOUBLE, SINGLE), (SINGLE, BFLOAT)]


@pytest.mark.parametrize("kind", ADDED)
@pytest.mark.parametrize("dtype, mask_dtype", OF_DTYPES, ids=lambda dtype: dtype_name(dtype))
def test_added_masks(dtype, mask_dtype, kind):
    """In the dtype of the scores, or in autocast's combination: float32 masks with float16 queries."""
    mask = added_mask(kind, mask_dtype, 1, 2, 19, 37)
    with tiles((32, 16)):
        check(make_inputs(1, (19, 37), 2, 16, dtype), mask=mask)


# Not in float64: 10,000 in units of log2 is inexact, and eager in float64 shows no such error.
@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=dtype_name)
def test_every_key_10000_lower_is_as_none(dtype):
    """The mask of BERT's first releases does not average a fully masked row: the scores still count."""
    check(make_inputs(1, (19, 37), 1, 16, dtype), mask=normal(1, 1, 1, 37) * 0 - 10000.0, relative_fp32=None)


@pytest.mark.parametrize("value", [-torch.inf, LOWEST[SINGLE]], ids=["-inf", "lowest"])
@pytest.mark.parametrize("rows", [slice(None), slice(3, 5)], ids=["all", "two"])
def test_every_key_masked_by_addition(rows, value):
    mask = torch.randn(1, 1, 19, 37, device=DEVICE)
    mask[:, :, rows] = value
    # Eager's -inf gives NaN in such rows. The reference gives the average, without a gradient through the mask.
    frozen = ("q", "k") if value == -torch.inf else ()
    with tiles((16, 16)):
        results = check(make_inputs(1, (19, 37), 1, 16), mask=mask, frozen=frozen)
    assert all(t.isfinite().all() for t in results.values() if t is not None)


@pytest.mark.parametrize("form", ["transposed", "every second", "offset", "expanded", "cut"])
@pytest.mark.parametrize("added", [False, True], ids=["bool", "added"])
def test_layouts_of_masks(added, form):
    """Any strides; the elements in between would mask or spoil other scores."""
    mask = torch.rand(2, 2, 19, 37, device=DEVICE) > 0.3
    filler = False
    if added:
        mask, filler = torch.where(mask, torch.randn_like(mask, dtype=SINGLE), LOWEST[SINGLE]), torch.nan
    if form == "transposed":
        mask = mask.transpose(2, 3).contiguous().transpose(2, 3)
    elif form == "every second":
        mask = mask.new_full([2 * n for n in mask.shape], filler)[::2, ::2, ::2, ::2].copy_(mask)
    elif form == "offset":
        mask = mask.new_full((mask.numel() + 3,), filler)[3:].view(mask.shape).copy_(mask)
    elif form == "expanded":
        mask = mask[:1, :, :, :].expand(2, -1, -1, -1)
    else:
        mask = mask.new_full((2, 2, 19, 64), filler)[..., :37].copy_(mask)
    check(make_inputs(2, (19, 37), 2, 8), mask=mask)


@pytest.mark.parametrize("kind", ["right", "left", "holes", "all masked"])
@pytest.mark.parametrize("general", ["bool", "added", "bool and causal", "added and causal"])
def test_every_kind_at_once(general, kind):
    """Padding together with a general mask, for which no block of keys can be skipped."""
    causal, length = general.endswith("causal"), 40
    mask = torch.rand(2, 1, length, length, device=DEVICE) > 0.3
    if general.startswith("added"):
        mask = torch.randn_like(mask, dtype=SINGLE)
    with tiles((16, 16), kv=(32, 16), q=(16, 32)):
        check(make_inputs(2, length, 1, 8), key_mask=key_masks(kind, 2, length), mask=mask, causal=causal)


@pytest.mark.parametrize("general", ["bool", "added"])
def test_a_general_mask_says_the_same_as_padding_and_causality(general):
    """Equal to the bit: what is skipped has a weight of 0."""
    inputs, dy = make_inputs(2, 40, 1, 8), normal(2, 40, 1, 8)
    seen = key_masks("right", 2, 40)[:, None, None, :] & torch.ones(40, 40, dtype=torch.bool, device=DEVICE).tril()
    mask = seen if general == "bool" else torch.zeros((), device=DEVICE).masked_fill(~seen, LOWEST[SINGLE])
    with tiles((16, 16)):
        one = run(attention, inputs, dy, key_mask=key_masks("right", 2, 40), causal=True)
        assert_same(run(attention, inputs, dy, mask=mask), one)


@pytest.mark.parametrize("view", [lambda m: m.t().contiguous().t(), lambda m: m[:1].expand_as(m)], ids=["t", "expand"])
def test_layouts_of_padding(view):
    key_mask = view(key_masks("holes", 2, 37))
    check(make_inputs(2, 37, 1, 8), key_mask=key_mask)


@pytest.mark.no_launch
@pytest.mark.parametrize("length", [1, 2, 5, 64])
def test_bounds(length):
    """Against the definition, for every mask of up to five keys and for random ones."""
    masks = list(itertools.product((False, True), repeat=length)) if length <= 5 else (torch.rand(99, length) > 0.5)
    masks = torch.as_tensor(masks, dtype=torch.bool).reshape(-1, length).to(DEVICE)
    bounds = bounds_of(masks)
    assert bounds.dtype == torch.int32 and bounds.shape == (len(masks), 3)
    for mask, (first, leading, end) in zip(masks.tolist(), bounds.tolist(), strict=True):
        valid = [place for place, seen in enumerate(mask) if seen]
        assert first == (valid[0] if valid else length)
        assert leading == (mask.index(False) if False in mask else length)
        assert end == (valid[-1] + 1 if valid else 0)


def test_bounds_may_be_given(launches):
    inputs, dy, key_mask = make_inputs(2, 40, 1, 8), normal(2, 40, 1, 8), key_masks("both ends", 2, 40)
    with tiles((16, 16)):
        expected = run(attention, inputs, dy, key_mask=key_mask)
        strided = bounds_of(key_mask).t().contiguous().t()
        for bounds in (bounds_of(key_mask), strided):
            assert_same(run(attention, inputs, dy, key_mask=key_mask, key_bounds=bounds), expected)
