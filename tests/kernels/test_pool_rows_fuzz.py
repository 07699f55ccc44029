"""Fuzzes pool_rows: any tokens of a batch, any of them left out, any sizes and layouts."""

import torch
from hypothesis import given, note
from hypothesis import strategies as st

from fastbert.kernels.pool_rows import MODES
from fastbert.testing.rows import DEVICE

from .layouts import LAYOUTS
from .test_pool_rows import DTYPES, all_rows, check, places, rows


@st.composite
def calls(draw):
    return {
        "mode": draw(st.sampled_from(MODES)),
        "batch": draw(st.integers(1, 6)),
        "seqlen": draw(st.integers(1, 70) | st.sampled_from([127, 128, 129, 200])),
        "tokens": draw(st.none() | st.sampled_from([0.05, 0.5, 0.9, 1.0])),
        "counted": draw(st.none() | st.sampled_from([0.1, 0.7, 1.0])),
        "spare": draw(st.sampled_from([0, 0, 1, 40])),
        "width": draw(st.integers(1, 130) | st.sampled_from([255, 256, 257, 1025])),
        "dtype": draw(st.sampled_from(DTYPES)),
        "scale": 10.0 ** draw(st.floats(-2.0, 2.0)),
        "layouts": (draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(LAYOUTS))),
        "values": draw(st.integers(0, 2**31)),
    }


@given(call=calls())
def test_any_legal_call(call):
    """`tokens`, `counted`: the share of the positions that are tokens, and of those that count; None without such a mask."""
    note(str(call))
    torch.manual_seed(call["values"])
    shape = call["batch"], call["seqlen"]
    options = all_rows(*shape)
    n_rows = call["batch"] * call["seqlen"]
    if call["tokens"] is not None:
        options = places(torch.rand(shape) < call["tokens"], call["spare"])
        n_rows = len(options["index"])
    if call["counted"] is not None:
        options["mask"] = torch.rand(shape, device=DEVICE) < call["counted"]
    layout, dy_layout = call["layouts"]
    x = rows(n_rows, call["width"], torch.float64) * call["scale"]
    x = layout(x.to(call["dtype"])) if n_rows else x.to(call["dtype"])
    check(x, call["mode"], options, dy_layout(rows(call["batch"], call["width"], call["dtype"])))
