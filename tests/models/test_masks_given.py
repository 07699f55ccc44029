"""Masks from the caller: any form is accepted, and the caller may write to it after the forward."""

import copy
import functools

import pytest
import torch
from transformers.models.bert import modeling_bert as bert

import fastbert
from fastbert.testing.models import assert_bitwise, assert_equal, doubled, gradients, run
from tests.models.tiny import BASE, HEADS, LENGTH, ROWS, make, make_batch


def seen(*shape):
    chosen = torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.3
    chosen[..., 0] = True
    return chosen


def added(chosen, low=-1e9):
    return torch.zeros(chosen.shape).masked_fill(~chosen, low)


KEYS = seen(ROWS, LENGTH)
EACH = seen(ROWS, 1, LENGTH, LENGTH)
HEADED = seen(ROWS, HEADS, LENGTH, LENGTH)
FORMS = {
    "ones and zeros in float": KEYS.float(),
    "halves": KEYS * 0.5,
    "bytes": KEYS.to(torch.uint8),
    "one row for all": KEYS[:1],
    "by columns": KEYS.long().t().contiguous().t(),
    "keys alone, added": added(KEYS)[:, None, None],
    "keys alone, bool": KEYS[:, None, None],
    "one for all rows": EACH[:1],
    "by heads": HEADED,
    "by heads, added": added(HEADED),
    "by heads, keys alone": HEADED[:, :, :1],
    "minus infinity": added(EACH, float("-inf")),
    "transposed": added(EACH, -3.0).transpose(2, 3),
    "integers": EACH.long(),
    "with a gradient": added(EACH, -1.0).requires_grad_(),
    "three dimensions": EACH[:, 0],
    "fewer keys": KEYS[:, :5],
    "more keys": torch.cat([KEYS, KEYS], 1),
    "more keys for each query": torch.cat([EACH, EACH], 3),
    "float64": added(EACH).double(),
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("form", FORMS)
def test_any_form_does_what_stock_does(form, attention):
    model, batch = make(BASE, attention=attention), make_batch(BASE) | {"attention_mask": FORMS[form]}
    patched = fastbert.patch(copy.deepcopy(model))
    try:
        stock = run(copy.deepcopy(model), batch, backward=False)
    except (RuntimeError, IndexError) as error:
        with pytest.raises(type(error)):
            run(patched, batch, backward=False)
        return
    results = run(patched, batch, backward=False)
    assert_equal(results, stock, run(model.double(), doubled(batch), backward=False))


@pytest.mark.parametrize(
    ("form", "attention"), [("int", "eager"), ("int", "sdpa"), ("bool", "eager"), ("bool", "sdpa"), ("added", "eager")]
)
def test_a_mask_overwritten_before_the_backward(form, attention):
    # Stock keeps none of these for its backward, so a caller may reuse one buffer for every batch.
    mask = {"int": KEYS.long(), "bool": KEYS, "added": added(EACH)}[form]
    patched = fastbert.patch(make(BASE, attention=attention))

    def backward(overwrite):
        buffer = mask.clone()
        loss = patched(**make_batch(BASE) | {"attention_mask": buffer}).last_hidden_state.square().mean()
        if overwrite:
            buffer.zero_()
        patched.zero_grad()
        loss.backward()
        return {name: grad.clone() for name, grad in gradients(patched.named_parameters()).items()}

    assert_bitwise(backward(overwrite=True), backward(overwrite=False))


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_makes_masks_was_replaced(wrapped, monkeypatch):
    # A replaced mask function: every token sees only its neighbours.
    near = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).abs() < 3

    def mine(config, attention_mask, **kwargs):
        return near.expand(len(attention_mask), 1, -1, -1)

    model, batch = make(BASE, attention="sdpa"), make_batch(BASE)
    patched = fastbert.patch(copy.deepcopy(model))
    original = bert.create_bidirectional_mask
    monkeypatch.setattr(bert, "create_bidirectional_mask", functools.wraps(original)(mine) if wrapped else mine)
    results, stock = run(patched, batch), run(copy.deepcopy(model), batch)
    assert_equal(results, stock, run(model.double(), doubled(batch)))
