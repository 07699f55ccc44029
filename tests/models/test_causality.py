"""Causality of attention: the model's config defines it, and a module or a call may differ."""

import copy
from inspect import signature

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import fastbert
from fastbert.testing.models import assert_equal, counting, doubled, expected_launches, run
from tests.models.tiny import BASE, CLASSIFICATION, CLM, make, make_batch


def decoder_looks_both_ways(model):
    model.config.is_causal = False


def decoder_becomes_an_encoder(model):
    model.config.is_decoder = False


def encoder_becomes_a_decoder(model):
    model.config.is_decoder = True


def every_attention_looks_back(model):
    for layer in model.encoder.layer:
        layer.attention.self.is_causal = True


def one_attention_looks_back(model):
    model.encoder.layer[1].attention.self.is_causal = True


CHANGES = (
    (CLM, decoder_looks_both_ways),
    (CLM, decoder_becomes_an_encoder),
    (BASE, encoder_becomes_a_decoder),
    (BASE, every_attention_looks_back),
    (BASE, one_attention_looks_back),
)


@pytest.mark.parametrize("mask", ["none", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("kind", "change"), CHANGES)
def test_causality_that_was_changed_by_hand(kind, change, attention, mask):
    model, batch = make(kind, attention=attention), make_batch(kind, mask)
    patched = fastbert.patch(copy.deepcopy(model))
    change(patched)
    change(model)
    results = run(patched, batch, backward=False)
    stock = run(model, batch, backward=False)
    assert_equal(results, stock, run(model.double(), doubled(batch), backward=False))


def test_a_decoder_as_it_was_made_uses_the_kernel():
    model = make(CLM)
    with counting() as launched:
        run(fastbert.patch(model), make_batch(CLM), backward=False)
    assert launched == expected_launches(model, backward=False)


@pytest.mark.parametrize(("from_kind", "attention"), [(CLM, "sdpa"), (CLM, "eager"), (BASE, "eager"), (BASE, "sdpa")])
@pytest.mark.parametrize("mask", ["none", "right"])
def test_a_layer_of_another_patched_model(from_kind, attention, mask):
    # It interprets the model's masks by its own causality and by the implementation that its own config names.
    model, other, batch = make(BASE, attention="sdpa"), make(from_kind, attention=attention, seed=3), make_batch(BASE, mask)

    def with_a_layer(model, other):
        model.encoder.layer[1] = getattr(other, "bert", other).encoder.layer[0]
        return model

    patched = with_a_layer(fastbert.patch(copy.deepcopy(model)), fastbert.patch(copy.deepcopy(other)))
    stock = with_a_layer(model, other)
    results, eager = run(patched, batch), run(copy.deepcopy(stock), batch)
    assert_equal(results, eager, run(stock.double(), doubled(batch)))


CHANGING = {"is_causal": True, "position_bias": torch.linspace(-3, 3, 162).view(1, 2, 9, 9)}


@pytest.mark.parametrize("unpad", ["auto", False])
@pytest.mark.parametrize("mask", ["none", "right"])
@pytest.mark.parametrize("name", CHANGING)
def test_a_keyword_of_the_attention_function(name, mask, unpad):
    # BERT's forward passes unknown keywords down to the attention function.
    batch = make_batch(CLASSIFICATION, mask) | {name: CHANGING[name]}
    model = make(CLASSIFICATION, attention="sdpa")
    patched = fastbert.patch(copy.deepcopy(model), unpad=unpad)
    results, stock = run(patched, batch), run(copy.deepcopy(model), batch)
    plain = run(copy.deepcopy(model), make_batch(CLASSIFICATION, mask))
    assert_equal(results, stock, run(model.double(), doubled(batch)))
    if name not in signature(sdpa_attention_forward).parameters:  # position_bias, which older releases do not have
        return
    if name == "position_bias" or mask == "none":  # with a mask, SDPA ignores is_causal
        assert not torch.equal(plain["logits"], stock["logits"]), "the keyword changes nothing: it proves nothing"
    reasons = {reason for row in fastbert.report(patched).rows for reason in row.fallback_calls}
    assert f"{name}, an argument of the attention function" in reasons


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["dropout", "scaling", "query"])
def test_a_keyword_that_stock_refuses(name, attention):
    model = make(CLASSIFICATION, attention=attention)
    for each in (model, fastbert.patch(copy.deepcopy(model))):
        with pytest.raises((TypeError, KeyError), match=name):  # a KeyError in transformers 5.0
            each(**make_batch(CLASSIFICATION), **{name: 1.0})


OTHERS = {"packing": 7, "queries": 7, "reading": 7, "lengths": [1, 1], "read_lengths": torch.tensor([1, 1]), "row": "a"}


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("name", OTHERS)
def test_a_column_of_the_users_own_is_passed_over(name):
    # Stock ignores it, and so does fastbert, which passes an object of its own under that name.
    for kind, unpad in ((CLASSIFICATION, "auto"), (BASE, True), (BASE, False)):
        patched, batch = fastbert.patch(make(kind, attention="sdpa"), unpad=unpad), make_batch(kind)
        expected = run(patched, batch, backward=False)
        results = run(patched, batch | {name: OTHERS[name]}, backward=False)
        assert all(torch.equal(results[key], expected[key]) for key in expected)
