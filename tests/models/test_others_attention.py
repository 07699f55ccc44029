"""Attention that is not transformers' own: a user's module among stock ones, a user's registered function.

Each gets the masks that stock would pass, and no kernel replaces it.
"""

import copy
import functools
import math

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, BertModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert import modeling_bert as bert

import fastbert
from fastbert.testing.models import assert_equal, counting, doubled, run
from tests.models.tiny import BASE, CLASSIFICATION, MLM, make, make_batch


class Own(bert.BertSelfAttention):
    """Self-attention that adds the mask to the scores and accepts additive masks only."""

    def forward(self, hidden_states, attention_mask=None, *args, **kwargs):
        split = (*hidden_states.shape[:-1], self.num_attention_heads, -1)
        q, k, v = (linear(hidden_states).view(split).transpose(1, 2) for linear in (self.query, self.key, self.value))
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.attention_head_size)
        if attention_mask is not None:
            assert attention_mask.dim() == 4 and attention_mask.is_floating_point(), attention_mask
            scores = scores + attention_mask
        weights = scores.softmax(-1)
        return (weights @ v).transpose(1, 2).reshape(hidden_states.shape), weights


class OwnModule(nn.Module):
    """Self-attention unrelated to transformers' class, for SDPA's bool masks."""

    def __init__(self, stock):
        super().__init__()
        self.config = stock.config
        self.query, self.key, self.value = stock.query, stock.key, stock.value
        self.heads = stock.num_attention_heads

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        split = (*hidden_states.shape[:-1], self.heads, -1)
        q, k, v = (linear(hidden_states).view(split).transpose(1, 2) for linear in (self.query, self.key, self.value))
        assert self.config._attn_implementation == "sdpa"
        assert attention_mask is None or (attention_mask.dim() == 4 and attention_mask.dtype == torch.bool)
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        return out.transpose(1, 2).reshape(hidden_states.shape), None


def with_own(model, index=1):
    body = getattr(model, "bert", model)
    attention = body.encoder.layer[index].attention
    if body.config._attn_implementation == "eager":
        attention.self.__class__ = Own
    else:
        attention.self = OwnModule(attention.self)
    return model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("rows", [1, 2, 9])  # 9: as many as there are tokens
@pytest.mark.parametrize("kind", [BASE, CLASSIFICATION], ids=str)
def test_a_self_attention_of_ones_own_gets_the_masks_it_knows(kind, rows, when, attention):
    model = make(kind, attention=attention)
    batch = make_batch(kind, "left")
    batch = {name: value.repeat(5, *[1] * (value.dim() - 1))[:rows] for name, value in batch.items()}
    own = with_own(copy.deepcopy(model))
    stock, exact = run(copy.deepcopy(own), batch), run(copy.deepcopy(own).double(), doubled(batch))
    patched = fastbert.patch(own) if when == "before" else with_own(fastbert.patch(model))
    with counting() as launched:
        assert_equal(run(patched, batch), stock, exact)
    # Under eager all layers fall back, because weights could be seen; under SDPA the other layer runs on the kernel.
    assert launched["attention_fwd_kernel"] == (1 if attention == "sdpa" else 0)
    assert launched["bias_gelu_fwd_kernel"] == 2
    rows_of = {row.module.rpartition("layer.")[2]: row for row in fastbert.report(patched).rows}
    assert "1.attention.self" not in rows_of or rows_of["1.attention.self"].state == "untouched"
    assert rows_of["0.attention.self"].state == ("active" if attention == "sdpa" else "fell back")


@pytest.fixture
def registered():
    """Registers, until the test ends, an attention function whose scores decrease with distance, under any name."""
    before = dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)
    calls = []

    def with_distance(module, query, key, value, attention_mask, **kwargs):
        calls.append(module)
        places = torch.arange(query.shape[2])
        bias = (-0.3 * (places[:, None] - places).abs().to(query.dtype)).expand(len(query), 1, -1, -1)
        if attention_mask is not None:
            bias = bias.masked_fill(~attention_mask, -1e9)
        return sdpa_attention_forward(module, query, key, value, bias, **kwargs)

    def register(name, wrapped=False):
        AttentionInterface.register(name, functools.wraps(sdpa_attention_forward)(with_distance) if wrapped else with_distance)
        AttentionMaskInterface.register(name, sdpa_mask)
        return calls

    yield register
    for mapping, former in zip((ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS), before, strict=True):
        mapping._global_mapping.clear()
        mapping._global_mapping.update(former)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("name", "wrapped"), [("with_distance", False), ("sdpa", False), ("sdpa", True)])
def test_a_function_of_ones_own_is_called(registered, name, wrapped, when):
    # wrapped: it looks like the transformers function that it calls, including the name of its module
    model, batch = make(CLASSIFICATION, attention="sdpa"), make_batch(CLASSIFICATION)
    plain = run(copy.deepcopy(model), batch)
    if when == "after":
        fastbert.patch(model)
    calls = registered(name, wrapped)
    model.set_attn_implementation(name)
    stock = fastbert.unpatch(copy.deepcopy(model))
    eager, exact = run(stock, batch), run(copy.deepcopy(stock).double(), doubled(batch))
    calls.clear()
    with counting(heads=True) as launched:
        results = run(fastbert.patch(model), batch)
    assert_equal(results, eager, exact)
    assert not torch.allclose(plain["logits"], results["logits"]), "the function changes nothing: it proves nothing"
    assert len(calls) == 2 and not launched["attention_fwd_kernel"] and not launched["gather_rows_kernel"]
    reasons = {row.reason for row in fastbert.report(model).rows if row.hf_class == "BertSelfAttention"}
    assert reasons == {f"attention implementation {name!r} is not one of transformers' own"}
    model.set_attn_implementation("eager")
    with counting() as launched:
        run(model, batch)
    assert launched["attention_fwd_kernel"] == 2, "the kernel is back with transformers' own"


def test_masks_of_ones_own_are_handed_on(registered):
    registered("mine")
    AttentionInterface.register("mine", sdpa_attention_forward)
    AttentionMaskInterface.register("mine", lambda *args, **kwargs: sdpa_mask(*args, **kwargs).roll(1, -1))
    model, batch = make(BASE), make_batch(BASE, labels=False)
    model.set_attn_implementation("mine")
    stock = model(**batch).last_hidden_state
    torch.testing.assert_close(fastbert.patch(model)(**batch).last_hidden_state, stock)


def test_verify_compares_with_the_models_own_attention(registered):
    registered("with_distance")
    model = make(BASE)
    model.set_attn_implementation("with_distance")
    result = fastbert.verify(model, make_batch(BASE, labels=False))
    assert result.ok and any("own attention" in note for note in result.notes)
    assert fastbert.verify(with_own(make(BASE, attention="sdpa")), make_batch(BASE, labels=False)).ok


def test_a_model_made_from_a_patched_models_config_is_stock():
    model = fastbert.patch(make(BASE, attention="sdpa"))
    reference = BertModel(model.config).eval()
    batch = make_batch(BASE, labels=False)
    with counting() as launched:
        reference(**batch)
    assert not launched and reference.config._attn_implementation == "sdpa"
    assert {row.state for row in fastbert.report(reference).rows} == {"untouched"}


def test_the_kernel_selected_by_name_is_reported():
    model = make(BASE)
    model.set_attn_implementation("fastbert")
    model(**make_batch(BASE, labels=False))
    rows = [row for row in fastbert.report(model).rows if row.hf_class == "BertSelfAttention"]
    assert [(row.state, row.kernel, row.kernel_calls, row.reason) for row in rows] == [
        ("active", "attention", 1, "selected by name")
    ] * 2


@pytest.mark.parametrize("how", ["config", "keyword"])
def test_attention_weights_of_a_model_that_was_eager(how):
    model, batch = make(MLM), make_batch(MLM, "left")
    if how == "keyword":
        batch["output_attentions"] = True
    patched = fastbert.patch(copy.deepcopy(model))
    for each in (model, patched):
        if how == "config":
            each.config.output_attentions = True
    stock, results = model(**batch).attentions, patched(**batch).attentions
    assert len(stock) == len(results) == 2
    for a, b in zip(stock, results, strict=True):
        torch.testing.assert_close(a, b)
