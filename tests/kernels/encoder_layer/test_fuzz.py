"""Fuzzes shapes, masks, packings, dtypes, layouts and frozen inputs with hypothesis: whatever is legal is right."""

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st

from fastbert.kernels.core.checks import ACTIVATIONS
from fastbert.kernels.encoder_layer import Settings
from fastbert.testing.encoder_layer import NAMES, check, make_inputs, seeds
from fastbert.testing.rows import DEVICE

from ..layouts import contiguous, offset, sliced, transposed

PROBABILITIES = st.one_of(st.just(0.0), st.sampled_from([0.1, 0.5]), st.floats(1e-4, 0.8))
LAYOUTS = [contiguous, transposed, sliced, offset]


@st.composite
def calls(draw):
    """Rows see at least three keys and have at least 16 columns: below, gradients are cancellation, in eager too."""
    head_size = draw(st.sampled_from([8, 11, 16, 32]))
    heads = draw(st.integers(-(-16 // head_size), 3))
    lengths = draw(st.lists(st.integers(3, 20), min_size=1, max_size=3))
    kind = draw(st.sampled_from(["padded", "packed", "read"]))
    # Not float64: eager may have no error there at all, and none would be allowed. gradcheck has it (test_gradcheck.py).
    low = draw(st.sampled_from([torch.float32, torch.float16]))
    is_mixed = low == torch.float16 and draw(st.booleans())
    smooth = [activation for activation in ACTIVATIONS if activation != "relu"]  # relu's gradient at 0 depends on a rounding
    names = ("x", *(("queries",) if kind == "read" else ()), *NAMES)
    frozen = {name for name in names if draw(st.booleans()) and draw(st.booleans())}
    if "value_bias" in frozen:  # against it the key bias's gradient is judged, which is 0 in exact arithmetic
        frozen.add("key_bias")
    return {
        "kind": kind,
        "lengths": lengths,
        "on_the_left": draw(st.booleans()),
        "read": [draw(st.integers(1, length)) for length in lengths] if kind == "read" else None,
        "hidden": heads * head_size,
        "inner": draw(st.integers(16, 70)),
        "dtypes": (torch.float32, draw(st.sampled_from([torch.float32, torch.float16]))) if is_mixed else (low, low),
        "product": torch.float16 if is_mixed else None,
        "norm": draw(st.sampled_from([None, torch.float32])) if is_mixed else None,
        "settings": Settings(
            heads,
            draw(st.sampled_from(smooth if low == torch.float16 else ACTIVATIONS)),
            *(draw(st.sampled_from([1e-12, 1e-5])) for _ in range(2)),
            *(draw(PROBABILITIES) for _ in range(3)),
            causal=kind == "padded" and draw(st.booleans()),
            scale=draw(st.sampled_from([None, 0.5])),
        ),
        "layouts": {name: draw(st.sampled_from(LAYOUTS)) for name in ("x", "queries", "dy", "output", "key")},
        "frozen": frozen,
        "seed": draw(st.integers(0, 2**20)),
        "values": draw(st.integers(0, 2**31)),
    }


def tensors(call):
    lengths = torch.tensor(call["lengths"], device=DEVICE)
    longest, hidden = max(call["lengths"]), call["hidden"]
    dtype, weight_dtype = call["dtypes"]
    options = {"product_dtype": call["product"], "norm_dtype": call["norm"]}
    read = None
    if call["kind"] == "padded":
        shape = (len(lengths), longest, hidden)
        options["key_mask"] = torch.arange(longest, device=DEVICE) < lengths[:, None]
        if call["on_the_left"] and not call["settings"].causal:  # otherwise a row would see only masked keys
            options["key_mask"] = options["key_mask"].flip(1)
    else:
        shape = (int(lengths.sum()), hidden)
        options |= {"cu_seqlens": starts(call["lengths"]), "max_seqlen": longest}
        if call["read"]:
            read = sum(call["read"])
            options |= {"cu_seqlens_q": starts(call["read"]), "max_seqlen_q": max(call["read"])}
    inputs = make_inputs(shape, call["inner"], dtype, queries=read, weight_dtype=weight_dtype)
    dy = torch.randn(shape if read is None else (read, hidden), dtype=torch.float64)
    result_dtype = torch.promote_types(dtype, call["product"] or dtype) if call["norm"] is None else call["norm"]
    return inputs, dy.to(DEVICE, result_dtype), options


def starts(lengths):
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)


def laid_out(layout, tensor):
    return layout(tensor.reshape(-1, tensor.shape[-1])).reshape(tensor.shape)


@settings(max_examples=60)
@given(call=calls())
def test_any_legal_call(call):
    note(str(call))
    torch.manual_seed(call["values"])
    inputs, dy, options = tensors(call)
    for name, layout in call["layouts"].items():
        if name == "dy":
            dy = laid_out(layout, dy)
        elif inputs[name] is not None:
            inputs[name] = laid_out(layout, inputs[name])
    check(inputs, call["settings"], dy, frozen=call["frozen"], seed=seeds(call["seed"]), **options)


@pytest.mark.long
@settings(max_examples=600)
@given(call=calls())
def test_many_legal_calls(call):
    test_any_legal_call.hypothesis.inner_test(call)
