"""Fuzzes sizes, layouts, dtypes, labels and paths with hypothesis; then invariances: other rows, their order, an offset."""

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st

from fastbert.kernels.linear_cross_entropy import linear_cross_entropy
from fastbert.testing.linear_cross_entropy import WAYS, check, chunk_rows, chunks_of, make_inputs, make_weights, run
from fastbert.testing.rows import DEVICE

from ..layouts import LAYOUTS
from .test_memory import WEIGHT_LAYOUTS

DTYPES = [torch.float64, torch.float32, torch.float16]
ROW_RESULTS = ("y", "dhidden")


@st.composite
def calls(draw, dtypes=tuple(DTYPES)):
    dtype = draw(st.sampled_from(dtypes))
    # In a row or two float16's roundings do not average: eager may be exact by luck.
    n_rows = draw(st.integers(8 if dtype == torch.float16 else 1, 32))
    smoothing = draw(st.sampled_from([0.0, 0.0, 0.1]))
    # Eager's smoothing adds up all of a row's log-probabilities in float16, which overflows there.
    wide = dtype == torch.float16 and (smoothing > 0 or draw(st.booleans()))
    return {
        "n_rows": n_rows,
        # With few classes the gradients are mostly cancellation, in eager too; gradcheck covers those.
        "n_cols": draw(st.one_of(st.integers(16, 130), st.sampled_from([255, 256, 257]))),
        # One column sums few products, and eager may be exact in its one element by luck.
        "width": draw(st.integers(16, 48)),
        "dtype": dtype,
        "bias": draw(st.booleans()),
        # float16's own rounding decides which class wins if logits are far apart.
        "scale": 10.0 ** draw(st.floats(-2.0, 0.5) if dtype == torch.float16 else st.floats(-4.0, 2.0)),
        "ignored": draw(st.sampled_from([0.0, 0.3, 0.9])),
        "rows": draw(st.sampled_from([None, n_rows, -(-n_rows // 2)])),
        "layouts": [draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(WEIGHT_LAYOUTS))],
        "frozen": tuple(name for name in ("hidden", "weight", "bias") if draw(st.integers(0, 3)) == 3),
        "values": draw(st.integers(0, 2**31)),
        # float64 for float64 inputs, because the exact result is made from them; any type otherwise.
        "weights": draw(st.sampled_from([None, None, dtype if dtype == torch.float64 else torch.float32])),
        "options": {
            "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
            "label_smoothing": smoothing,
            "ignore_index": draw(st.sampled_from([-100, -1, 0])),
            "out_dtype": torch.float32 if wide else None,
        },
    }


@settings(max_examples=200, derandomize=True)
@given(call=calls())
def test_any_legal_call(call):
    check_call(call)


@pytest.mark.long
@pytest.mark.timeout(7200)
@settings(max_examples=500)
@given(call=calls([torch.float64]))
def test_other_calls_each_time(call):
    """In float64, where eager's luck in a small case decides nothing."""
    check_call(call)


def check_call(call):
    note(str(call))
    torch.manual_seed(call["values"])
    make = {name: call[name] for name in ("n_rows", "n_cols", "width", "dtype", "bias", "scale", "ignored")}
    inputs, labels = make_inputs(**make)
    labels[labels == -100] = call["options"]["ignore_index"]
    for name, layout in zip(("hidden", "weight"), call["layouts"], strict=True):
        inputs[name] = layout(inputs[name])
    frozen = [name for name in call["frozen"] if inputs[name] is not None]
    # None of them is 0: a mean over labels that weigh nothing has a test of its own.
    weights = None if call["weights"] is None else make_weights(call["n_cols"], call["weights"], zeros=0.0)
    check(inputs, labels, rows=call["rows"], frozen=frozen, class_weights=weights, **call["options"])


def rows_of(inputs, index):
    return inputs | {"hidden": inputs["hidden"][index]}


@pytest.mark.parametrize("reduction, way", [("sum", "kept"), ("sum", "formed"), ("none", "formed")])
def test_the_order_of_rows(reduction, way):
    inputs, labels = make_inputs(70, 40, dtype=torch.float64)
    order = torch.randperm(70, device=DEVICE)
    with chunks_of(chunk_rows(way, 32)):
        straight = run(linear_cross_entropy, inputs, labels, reduction=reduction)
        shuffled = run(linear_cross_entropy, rows_of(inputs, order), labels[order], reduction=reduction)
    torch.testing.assert_close(shuffled["dhidden"], straight["dhidden"][order])
    torch.testing.assert_close(shuffled["y"], straight["y"][order] if reduction == "none" else straight["y"])
    torch.testing.assert_close(shuffled["dweight"], straight["dweight"])


@pytest.mark.parametrize("rows", [1, 7, 33, 64, 65])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_length_of_a_chunk(reduction, rows):
    """For chunks of any number of rows, even one, the sums differ only in their order."""
    inputs, labels = make_inputs(65, 40, dtype=torch.float64)
    kept = run(linear_cross_entropy, inputs, labels, reduction=reduction)
    with chunks_of(rows):
        chunked = run(linear_cross_entropy, inputs, labels, reduction=reduction)
    for name, result in chunked.items():
        torch.testing.assert_close(result, kept[name], msg=name)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("way", WAYS)
def test_ignored_rows_are_rows_left_out(way, reduction):
    """Whatever they contain, except NaN (0 times NaN is NaN, in eager too)."""
    inputs, labels = make_inputs(33, 40, dtype=torch.float64)
    counted = labels != -100
    inputs["hidden"][~counted] *= 1e30
    with chunks_of(chunk_rows(way, 8)):
        all_rows = run(linear_cross_entropy, inputs, labels, reduction=reduction)
        chosen = run(linear_cross_entropy, rows_of(inputs, counted), labels[counted], reduction=reduction)
    assert not all_rows["dhidden"][~counted].any()
    torch.testing.assert_close(all_rows.pop("dhidden")[counted], chosen.pop("dhidden"))
    for name, result in all_rows.items():
        torch.testing.assert_close(result, chosen[name], msg=name)


@pytest.mark.parametrize("constant", [-1000.0, 1.0, 1e4])
@pytest.mark.parametrize("way", WAYS)
def test_a_constant_on_all_logits(way, constant):
    """Softmax does not depend on it."""
    inputs, labels = make_inputs(9, 40, dtype=torch.float64)
    with chunks_of(chunk_rows(way, 4)):
        one = run(linear_cross_entropy, inputs, labels)
        other = run(linear_cross_entropy, inputs | {"bias": inputs["bias"] + constant}, labels)
    for name, result in one.items():
        torch.testing.assert_close(other[name], result, msg=name)
    assert abs(float(one["dbias"].sum())) < 1e-12


def test_classes_may_change_places():
    inputs, labels = make_inputs(9, 40, dtype=torch.float64)
    order = torch.randperm(40, device=DEVICE)
    weights, options = make_weights(40, torch.float64), {"reduction": "sum", "label_smoothing": 0.1}
    one = run(linear_cross_entropy, inputs, labels, class_weights=weights, **options)
    moved = inputs | {"weight": inputs["weight"][order], "bias": inputs["bias"][order]}
    places = torch.empty_like(order)
    places[order] = torch.arange(40, device=DEVICE)
    labels = torch.where(labels == -100, -100, places[labels.clamp(min=0)])
    other = run(linear_cross_entropy, moved, labels, class_weights=weights[order], **options)
    torch.testing.assert_close(other["y"], one["y"])
    torch.testing.assert_close(other["dhidden"], one["dhidden"])
    torch.testing.assert_close(other["dweight"], one["dweight"][order])


@pytest.mark.parametrize("factor", [0.25, 4.0])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_linear_in_the_losss_own(way, factor):
    inputs, labels = make_inputs(9, 40)
    with chunks_of(chunk_rows(way, 4)):
        one = run(linear_cross_entropy, inputs, labels)
        other = run(linear_cross_entropy, inputs, labels, torch.tensor(factor, device=DEVICE))
    for name in one.keys() - {"y"}:
        assert torch.equal(other[name], factor * one[name]), name


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_row_stays_alone(bad):
    inputs, labels = make_inputs(9, 40, ignored=0.0)
    clean = run(linear_cross_entropy, inputs, labels, reduction="none")
    inputs["hidden"][4, 0] = bad
    spoiled = run(linear_cross_entropy, inputs, labels, reduction="none")
    others = torch.arange(9, device=DEVICE) != 4
    for name in ROW_RESULTS:
        torch.testing.assert_close(spoiled[name][others], clean[name][others])
        assert not spoiled[name][4].isfinite().any()


def test_a_mean_is_the_sum_over_its_labels():
    inputs, labels = make_inputs(9, 40, dtype=torch.float64)
    mean, total = (run(linear_cross_entropy, inputs, labels, reduction=reduction) for reduction in ("mean", "sum"))
    n = (labels != -100).sum()
    for name, result in mean.items():
        torch.testing.assert_close(n * result, total[name], msg=name)
