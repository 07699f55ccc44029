"""The nine classes: outputs, loss and every parameter gradient equal those of the stock model."""

import pytest
import torch

import fastbert
from fastbert.testing.models import check, run
from tests.models.tiny import CLM, KINDS, LENGTH, MASKS, MLM, ROWS, Kind, make, make_batch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "fp64": torch.float64}
ATTENTION = ("eager", "sdpa")


def check_kind(kind: Kind, dtype: str, attention: str, training: bool, mask: str) -> None:
    # In eval mode dropout is configured and must not be applied.
    model, eager = (
        make(kind, DTYPES[dtype], chosen, hidden_dropout_prob=0.0 if training else 0.3).train(training)
        for chosen in (attention, "eager")
    )
    batch = make_batch(kind, mask)
    if batch.get("attention_mask", batch["input_ids"]).is_floating_point():
        batch["attention_mask"] = batch["attention_mask"].to(DTYPES[dtype])
    # A row that sees no key (left padding in a decoder) is eager's average, where SDPA gives zeros.
    results = check(model, batch, eager=eager)
    assert len(results) > len(list(model.parameters()))  # every gradient, and outputs beside them


@pytest.mark.one_in(4)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_class_is_equal(kind, dtype, attention, mode):
    check_kind(kind, dtype, attention, mode == "train", "right")


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_class_is_equal_in_float64(kind):
    # Rounding hides nothing here: an error of 1e-13 shows.
    check_kind(kind, "fp64", "eager", True, "holes")


@pytest.mark.one_in(3)
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("mask", [mask for mask in MASKS if mask != "right"])
@pytest.mark.parametrize("kind", [MLM, CLM], ids=str)
def test_mask_is_equal(kind, mask, attention):
    check_kind(kind, "fp32", attention, True, mask)


@pytest.mark.long
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_combination_is_equal(kind, dtype, attention, mask, mode):
    check_kind(kind, dtype, attention, mode == "train", mask)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_three_dimensional_mask_does_what_stock_does(dtype, attention):
    # transformers 5.17 does not take such a mask; a patched model does what the release does.
    model = make(MLM, attention=attention)
    mask = torch.ones(ROWS, LENGTH, LENGTH).tril()
    batch = make_batch(MLM, "none") | {"attention_mask": mask.to(model.device, dtype)}
    try:
        run(model, batch)
    except Exception as error:
        with pytest.raises(type(error)) as raised:
            run(fastbert.patch(model), batch)
        assert str(raised.value) == str(error)
    else:
        check(model, batch)


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 7), (5, 1)])
def test_other_sizes_are_equal(rows, length):
    batch = {name: tensor[:1, :1].expand(rows, length) for name, tensor in make_batch(MLM, "none").items()}
    check(make(), batch)


def test_rows_of_padding_alone_are_equal():
    # Stock spreads such a row's attention evenly: finite, never NaN.
    batch = make_batch()
    batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    results = check(make(), batch)
    assert all(tensor.isfinite().all() for tensor in results.values())
