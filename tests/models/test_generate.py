"""Decoders: caches, generation and cross-attention give stock's tokens."""

import copy
import inspect

import pytest
import torch
from transformers import BertModel, EncoderDecoderModel

import fastbert
from fastbert.testing.models import check, counting, expected_launches, run
from tests.models.tiny import BASE, CLM, LENGTH, MLM, ROWS, make, make_batch

NEW_TOKENS = 5
# transformers' names for the cache, in calls and outputs: the second up to 5.23.
CACHE = next(name for name in ("cache", "past_key_values") if name in inspect.signature(BertModel.forward).parameters)
WAYS = {"greedy": {}, "beams": {"num_beams": 3}, "sampled": {"do_sample": True, "top_k": 8}}


def decoder(**overrides):
    # Without an end token every row runs to its full length, so the number of launches is known.
    return make(CLM, bos_token_id=None, eos_token_id=None, **overrides)


def generate(model, **keywords):
    torch.manual_seed(5)
    batch = make_batch(CLM, "left", labels=False)
    return model.generate(**batch, max_new_tokens=NEW_TOKENS, **keywords)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_generate_gives_stocks_tokens(way, cache):
    model = decoder()
    keywords = {"do_sample": False, "use_cache": cache} | WAYS[way]
    stock = generate(model, **keywords)
    assert stock.shape == (ROWS, LENGTH + NEW_TOKENS)
    expected = expected_launches(model, forward=NEW_TOKENS, backward=False)
    with counting() as launched:
        patched = generate(fastbert.patch(model), **keywords)
    assert torch.equal(patched, stock)
    assert launched == expected


def test_cache_is_equal():
    results = check(decoder(), make_batch(CLM, labels=False) | {"use_cache": True})
    assert {f"{CACHE}[{layer}].{part}" for layer in (0, 1) for part in ("keys", "values")} <= results.keys()


def test_a_second_step_on_the_cache_is_equal_to_the_whole():
    model = fastbert.patch(decoder())
    ids = make_batch(CLM, labels=False)["input_ids"]
    with torch.no_grad():
        whole = model(ids).logits[:, -2:]
        cache = model(ids[:, :-2], use_cache=True)[CACHE]
        continued = model(ids[:, -2:], **{CACHE: cache}).logits
    torch.testing.assert_close(continued, whole)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", [BASE, CLM], ids=str)
def test_cross_attention(kind, attention):
    model = make(kind, attention=attention, is_decoder=True, add_cross_attention=True)
    states = torch.randn(ROWS, 5, model.config.hidden_size, device=model.device, requires_grad=True)
    seen = torch.ones(ROWS, 5, dtype=torch.long, device=model.device)
    seen[0, 3:] = 0
    batch = make_batch(kind) | {"encoder_hidden_states": states, "encoder_attention_mask": seen, "use_cache": False}
    # Three residual norms per layer: after self-attention, cross-attention and feed-forward.
    assert expected_launches(model)["dropout_add_layernorm_fwd_kernel"] == 3 * model.config.num_hidden_layers
    results = check(model, batch)
    assert results["gradient of encoder_hidden_states"].abs().max() > 0


def test_cross_attentions_and_both_caches():
    model = make(CLM, is_decoder=True, add_cross_attention=True)
    states = torch.randn(ROWS, 5, model.config.hidden_size, device=model.device)
    batch = make_batch(CLM, labels=False) | {"encoder_hidden_states": states, "output_attentions": True}
    results = check(model, batch, expected=expected_launches(model, without=["attention"]))
    assert {
        "cross_attentions[1]",
        f"{CACHE}.cross[1].keys",
        f"{CACHE}.self[0].values",
    } <= results.keys()


def test_keys_of_the_encoder_are_cached_once():
    """Appending them at every step would give the same output from a growing cache."""
    model = fastbert.patch(decoder(add_cross_attention=True))
    ids = make_batch(CLM, labels=False)["input_ids"]
    states = torch.randn(ROWS, 5, model.config.hidden_size, device=model.device)
    with torch.no_grad():
        whole = model(ids, encoder_hidden_states=states).logits[:, -2:]
        cache = model(ids[:, :-2], encoder_hidden_states=states, use_cache=True)[CACHE]
        continued = model(ids[:, -2:], encoder_hidden_states=states, **{CACHE: cache}).logits
    torch.testing.assert_close(continued, whole)
    assert [layer.keys.shape[2] for layer in cache.cross_attention_cache.layers] == [5, 5]


def test_encoder_and_decoder_in_one_model():
    model = EncoderDecoderModel(encoder=make(BASE), decoder=decoder(add_cross_attention=True)).eval()
    batch = make_batch(MLM)
    labels = batch.pop("labels")
    batch["decoder_input_ids"] = labels.clamp(min=0)
    del batch["token_type_ids"]
    with torch.no_grad():
        stock = model(**batch)
        with counting() as launched:
            patched = fastbert.patch(copy.deepcopy(model))(**batch)
    # The decoder ends in the head; the encoder's pooler is not used.
    assert launched == expected_launches(model, backward=False)
    torch.testing.assert_close(patched.logits, stock.logits)
    results = run(fastbert.patch(model), batch | {"use_cache": False})
    assert sum(name.startswith("gradient of encoder") for name in results) > 20
