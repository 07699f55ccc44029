"""Fuzzes shapes, layouts, dtypes, scales and options with hypothesis: whatever is legal is right, within the one bound."""

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st

from fastbert.kernels.core.checks import ACTIVATIONS
from fastbert.testing.rows import (
    BIAS_GELU,
    DEVICE,
    DROPOUT_ADD_LAYERNORM,
    GELU_LAYERNORM,
    OPS,
    check,
    make_inputs,
    seed_tensor,
)

from .layouts import LAYOUTS

# Narrower rows have gradients that are mostly cancellation, in eager too; gradcheck covers those.
WIDTHS = st.one_of(st.integers(16, 130), st.sampled_from([255, 256, 257, 1023]))
LEADING = st.lists(st.integers(1, 6), max_size=2)
DTYPES = [torch.float64, torch.float32, torch.float16]
PROBABILITIES = st.one_of(st.just(0.0), st.sampled_from([0.1, 0.5, 1.0]), st.floats(1e-4, 0.95))


@st.composite
def calls(draw, op):
    dtype = draw(st.sampled_from(DTYPES))
    # float16 ends at 65504, and the gradients contain squares and reciprocals of the inputs.
    exponents = st.floats(-1.0, 1.5) if dtype == torch.float16 else st.floats(-4.0, 4.0)
    options = {}
    if op is not BIAS_GELU:
        options["eps"] = draw(st.sampled_from([1e-12, 1e-5, 1e-2]))
    if op is DROPOUT_ADD_LAYERNORM:
        options |= {"p": draw(PROBABILITIES), "seed": draw(st.integers(0, 2**62 - 1))}
    else:
        options["activation"] = draw(st.sampled_from(ACTIVATIONS))
    names = (*op.rows, *op.vectors)
    return {
        "shape": (*draw(LEADING), draw(WIDTHS)),
        "dtype": dtype,
        "scale": 10.0 ** draw(exponents),
        "optional": draw(st.booleans()),
        "layouts": {name: draw(st.sampled_from(LAYOUTS)) for name in (*op.rows, "dy")},
        "frozen": tuple(name for name in names if draw(st.booleans()) and draw(st.booleans())),
        "values": draw(st.integers(0, 2**31)),
        "options": options,
    }


def laid_out(layout, tensor):
    rows = tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])
    return layout(rows).view(tensor.shape) if tensor.dim() == 2 else layout(rows).reshape(tensor.shape)


@pytest.mark.parametrize("op", OPS, ids=str)
@given(data=st.data())
def test_any_legal_call(op, data):
    call = data.draw(calls(op))
    note(f"{op}: {call}")
    torch.manual_seed(call["values"])
    inputs = make_inputs(op, call["shape"], call["dtype"], optional=call["optional"], scale=call["scale"])
    for name in op.rows:
        inputs[name] = laid_out(call["layouts"][name], inputs[name])
    dy = laid_out(call["layouts"]["dy"], torch.randn(call["shape"], dtype=torch.float64).to(DEVICE, call["dtype"]))
    options = dict(call["options"])
    if "seed" in options:
        options["seed"] = seed_tensor(options["seed"])
    check(op, inputs, dy, frozen=[n for n in call["frozen"] if inputs[n] is not None], **options)


@st.composite
def autocast_calls(draw):
    """Autocast's dtypes: any mixture of float16 and float32, and either of them as the result."""
    dtype = st.sampled_from([torch.float16, torch.float32])
    return {
        "shape": (draw(st.integers(1, 20)), draw(WIDTHS)),
        "dtypes": {name: draw(dtype) for name in ("x", "residual", "weight", "bias", "x_bias")},
        "out_dtype": draw(st.none() | dtype),
        "values": draw(st.integers(0, 2**31)),
    }


@pytest.mark.parametrize("op", [DROPOUT_ADD_LAYERNORM, GELU_LAYERNORM], ids=str)
@settings(max_examples=100)
@given(call=autocast_calls())
def test_any_mixture_of_dtypes(op, call):
    torch.manual_seed(call["values"])
    check(op, make_inputs(op, call["shape"], dtypes=call["dtypes"]), out_dtype=call["out_dtype"])
