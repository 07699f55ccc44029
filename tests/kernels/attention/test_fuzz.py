"""Fuzzes attention's shapes, layouts, masks, dtypes, scales and options with hypothesis: whatever is legal is right."""

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st

from fastbert.testing.attention import check, make_inputs, normal, tiles
from fastbert.testing.rows import DEVICE, seed_tensor

from . import test_layouts as layouts

# At each commit in float64, where a wrong result cannot hide behind rounding. In narrower types, luck in one small case among
# hundreds decides the bound of twice eager's error.
DTYPES = [
    pytest.param([torch.float64], id="float64"),
    pytest.param([torch.float32, torch.float16], id="narrower", marks=pytest.mark.long),
]
LAYOUTS = [torch.clone, layouts.heads_first, layouts.head_size_first, layouts.every_second, layouts.shared_heads]
# With one or two keys the gradients of q and k are cancellation only, in eager too: see test_one_key. With few keys in 16 bits,
# delta comes from a rounded output (as in FlashAttention), which eager's does not, and that shows.
LENGTHS = st.one_of(st.integers(3, 33), st.sampled_from([16, 17, 31, 32, 33, 64]))
LONGER = st.sampled_from([24, 31, 32, 33, 64])
HEAD_SIZES = st.one_of(st.integers(1, 40), st.sampled_from([59, 64, 80, 111, 128, 256]))
PROBABILITIES = st.one_of(st.just(0.0), st.just(0.0), st.sampled_from([0.1, 1.0]), st.floats(1e-4, 0.95))
MASKS = ["none", "none", "key_mask", "bool", "added", "key_mask and added"]


@st.composite
def calls(draw, dtypes):
    packed = draw(st.sampled_from([False, False, True]))
    dtype = draw(st.sampled_from(dtypes))
    of_sequences = st.integers(24, 33) if dtype == torch.float16 else st.integers(3, 30)
    of_dtype = LONGER if dtype == torch.float16 else LENGTHS
    lengths = draw(of_dtype), draw(of_dtype)
    # float16 ends at 65504, and the gradients contain sums of products of values and upstream gradients.
    exponents = st.floats(-1.0, 1.0) if dtype == torch.float16 else st.floats(-4.0, 4.0)
    side = st.sampled_from([32, 64, 64])
    return {
        "packed": packed,
        "sequences": draw(st.lists(of_sequences | st.just(0), min_size=1, max_size=3)) if packed else None,
        "batch_and_heads": draw(st.sampled_from([(1, 1), (1, 1), (1, 1), (1, 2), (2, 1)])),
        "lengths": lengths if draw(st.booleans()) else lengths[:1] * 2,
        "head_size": draw(HEAD_SIZES),
        "dtype": dtype,
        "scale_of_scores": 10.0 ** draw(st.floats(-2.0, 0.0)),
        "scale_of_values": 10.0 ** draw(exponents),
        "layouts": {name: draw(st.sampled_from(LAYOUTS)) for name in ("q", "k", "v", "dy")},
        "mask": "none" if packed else draw(st.sampled_from(MASKS)),
        "broadcast": draw(st.tuples(st.booleans(), st.booleans(), st.booleans())),
        "frozen": tuple(name for name in "qkv" if draw(st.integers(0, 4)) == 0),
        "options": {
            "causal": draw(st.booleans()),
            # The gradients of rows with one weight near 1 cancel: to the bit in eager, which has one dP, but only up to
            # rounding in the kernels, which compute dP in two products. test_scale has larger scales.
            "scale": draw(st.none() | st.sampled_from([0.125, -0.05])),
            "p": draw(PROBABILITIES),
        },
        "seed": draw(st.integers(0, 2**62 - 1)),
        "tiles": [(draw(side), draw(side)) for _ in range(3)],  # mostly large: programs cost the interpreter time
        "values": draw(st.integers(0, 2**31)),
    }


def masks_of(call):
    """Each row of a mask shows at least its first three keys, for the reason above; the others are random."""
    batch, heads = call["batch_and_heads"]
    lengths, options = call["lengths"], {}
    if "key_mask" in call["mask"]:
        options["key_mask"] = seen(batch, lengths[1])
    if call["mask"] in ("bool", "added", "key_mask and added"):
        whole = (batch, heads, lengths[0])
        form = [1 if one else size for one, size in zip(call["broadcast"], whole, strict=True)]
        mask = seen(*form, lengths[1])
        if call["mask"] != "bool":
            mask = normal(*mask.shape, dtype=call["dtype"]).masked_fill(~mask, torch.finfo(call["dtype"]).min)
        options["mask"] = mask
    return options


def seen(*shape):
    mask = torch.rand(shape, device=DEVICE) > 0.4
    mask[..., :3] = True
    return mask


@pytest.mark.parametrize("dtypes", DTYPES)
@settings(derandomize=True)
@given(data=st.data())
def test_any_legal_call(dtypes, data):
    check_call(data.draw(calls(dtypes)))


@pytest.mark.long
@pytest.mark.timeout(7200)
@settings(max_examples=500)
@given(call=calls([torch.float64]))
def test_other_calls_each_time(call):
    check_call(call)


def check_call(call):
    note(str(call))
    torch.manual_seed(call["values"])
    dtype, layouts = call["dtype"], call["layouts"]
    if call["packed"]:
        lengths = call["sequences"]
        heads, rows = call["batch_and_heads"][1], max(24 if dtype == torch.float16 else 3, sum(lengths))
        lengths[0] += rows - sum(lengths)
        inputs = {name: normal(rows, heads, call["head_size"], dtype=dtype) for name in "qkv"}
        bounds = torch.tensor([0, *lengths], device=DEVICE).cumsum(0, dtype=torch.int32)
        options = {"cu_seqlens": bounds, "max_seqlen": max(lengths)}
    else:
        batch, heads = call["batch_and_heads"]
        inputs, options = make_inputs(batch, call["lengths"], heads, call["head_size"], dtype), masks_of(call)
    dy = normal(*inputs["q"].shape, dtype=dtype)
    inputs["q"] = inputs["q"] * call["scale_of_scores"]
    inputs["v"] = inputs["v"] * call["scale_of_values"]
    for name, x in inputs.items():
        inputs[name] = laid_out(layouts[name], x)
    with tiles(*call["tiles"]):
        check(
            inputs,
            laid_out(layouts["dy"], dy),
            frozen=call["frozen"],
            seed=seed_tensor(call["seed"]),
            **call["options"],
            **options,
        )


def laid_out(layout, x):
    return layout(x) if x.dim() == 4 else layout(x[None])[0]
