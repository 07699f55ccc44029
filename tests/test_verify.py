"""`fastbert.verify` passes equal models, finds differences and their place, and leaves the model unchanged."""

import json

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel

import fastbert
from fastbert import ops
from fastbert.verify import _only

CONFIG = BertConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=50, pad_token_id=0
)


CALLS = 4  # embeddings, packing encoder, two layers


def classifier() -> BertForSequenceClassification:
    return BertForSequenceClassification(CONFIG)


def batch(**more):
    ids = torch.randint(1, 50, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask, **more}


def labelled():
    return batch(labels=torch.tensor([0, 1]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_equal_model_passes(dtype):
    result = fastbert.verify(classifier().to(dtype), labelled())
    assert result and result.ok, str(result)
    assert result.kernel_calls == CALLS
    assert {c.name for c in result.outputs} == {"loss", "logits"}
    assert len(result.gradients) == len(list(classifier().parameters()))
    assert "EQUAL" in str(result) and result.first_divergence is None


def test_without_labels_a_projection_is_differentiated():
    result = fastbert.verify(BertModel(CONFIG), batch())
    assert result.ok, str(result)
    assert result.gradients and "projection" in str(result)


def test_every_output_is_compared():
    result = fastbert.verify(classifier(), {**labelled(), "output_hidden_states": True, "output_attentions": True})
    names = {c.name for c in result.outputs}
    assert {"hidden_states[0]", "hidden_states[2]", "attentions[1]"} <= names
    assert result.ok, str(result)


def test_decoder_cache_is_compared():
    model = BertModel(BertConfig(**{**CONFIG.to_dict(), "is_decoder": True})).eval()
    result = fastbert.verify(model, batch())
    assert any(c.name.endswith("keys") for c in result.outputs), [c.name for c in result.outputs]
    assert result.ok, str(result)


def wrong(monkeypatch, *names, by=1.01):
    for name in names:
        right = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, right=right, **k: right(*a, **k) * by)


@pytest.mark.parametrize(
    ("names", "keywords", "found"),
    [
        (["encoder_layer"], {}, "bert.encoder.layer.0"),
        (["bias_gelu"], {"residual_norm": False}, "bert.encoder.layer.0.intermediate"),
        (["encoder_layer", "bias_gelu"], {}, "bert.encoder.layer.0.intermediate"),
        (["embed", "bias_gelu"], {}, "bert.embeddings"),
    ],
    ids=str,
)
def test_wrong_forward_is_found_and_named(names, keywords, found, monkeypatch):
    """A layer op is named by its layer, or by an inner module that also differs module by module."""
    wrong(monkeypatch, *names)
    result = fastbert.verify(classifier(), labelled(), **keywords)
    assert not result.ok
    assert result.first_divergence == found
    assert "DIFFERENT" in str(result) and "DIFFERS" in str(result)


def test_wrong_gradient_alone_is_found_and_named(monkeypatch):
    right = ops.gelu_layernorm

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            return 2 * dy

    monkeypatch.setattr(ops, "gelu_layernorm", lambda *a, **k: Doubled.apply(right(*a, **k)))
    ids = batch()
    result = fastbert.verify(BertForMaskedLM(CONFIG), {**ids, "labels": ids["input_ids"]})
    assert all(c.ok for c in result.outputs)
    assert not all(c.ok for c in result.gradients)
    assert result.first_divergence == "cls.predictions.transform.LayerNorm (in the backward)"


def test_missing_gradient_is_a_difference(monkeypatch):
    right = ops.encoder_layer

    def forgetful(x, weights, *rest):
        return right(x, weights._replace(intermediate_bias=weights.intermediate_bias.detach()), *rest)

    monkeypatch.setattr(ops, "encoder_layer", forgetful)
    result = fastbert.verify(classifier(), labelled())
    assert [c.name for c in result.gradients if not c.ok] == [f"bert.encoder.layer.{i}.intermediate.dense.bias" for i in (0, 1)]
    assert "only the eager model has it" in str(result)


def test_nothing_through_a_kernel_is_not_a_pass(monkeypatch):
    monkeypatch.setenv("FASTBERT_DISABLE", "1")
    result = fastbert.verify(classifier(), labelled())
    assert not result.ok and result.kernel_calls == 0
    assert "NOTHING VERIFIED" in str(result)


def test_keywords_reach_patch():
    result = fastbert.verify(classifier(), labelled(), residual_norm=False)
    assert result.ok and result.kernel_calls == 6


@pytest.mark.parametrize("labels", [False, True])
def test_padding_that_is_left_out_is_not_compared(labels):
    given = batch()
    if labels:
        given["labels"] = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    result = fastbert.verify(BertForMaskedLM(CONFIG), given, unpad=True)
    assert result.ok and any("padded positions" in note for note in result.notes), str(result)
    assert any(c.name == "logits" and c.error > 0 for c in result.outputs)
    assert not any("padded" in note for note in fastbert.verify(BertForMaskedLM(CONFIG), given).notes)


def test_real_positions_are_compared_where_padding_is_left_out(monkeypatch):
    head = ops.gelu_layernorm
    monkeypatch.setattr(ops, "gelu_layernorm", lambda *args, **options: head(*args, **options) * 1.01)
    result = fastbert.verify(BertForMaskedLM(CONFIG), batch(), unpad=True)
    assert not result.ok and not next(c for c in result.outputs if c.name == "logits").ok


def test_a_row_of_as_many_columns_as_positions_is_compared_whole():
    real, rows = torch.tensor([[True] * 8, [True] * 3 + [False] * 5]), torch.ones(2, 8)
    assert torch.equal(_only(real, "pooler_output", rows), rows)
    assert torch.equal(_only(real, "start_logits", rows), real.float())


@pytest.mark.parametrize("unpad", ["auto", True])
def test_logits_that_are_left_out_are_not_compared(unpad):
    given = batch()
    given["labels"] = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    result = fastbert.verify(BertForMaskedLM(CONFIG).train(), given, unpad=unpad, mlm_logits="none")
    assert result.ok and any("logits" in note for note in result.notes), str(result)
    assert {c.name for c in result.outputs} == {"loss"} and result.gradients


def test_autocast_of_the_caller_is_kept():
    with torch.autocast("cpu", torch.float16):
        result = fastbert.verify(classifier(), labelled())
    assert result.ok, str(result)
    assert result.kernel_calls == CALLS
    logits = next(c for c in result.outputs if c.name == "logits")
    assert logits.eager_error > 1e-6, "eager ran in float32: the autocast was lost"


def test_frozen_model_is_compared_without_gradients():
    model = classifier().requires_grad_(False)
    result = fastbert.verify(model, labelled())
    assert result.ok and not result.gradients and "no parameter requires a gradient" in str(result)


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_model_comes_back_as_it_was(patched, training):
    model = classifier().train(training)
    model.bert.encoder.layer[0].eval()
    if patched:
        fastbert.patch(model)
    model(**labelled()).loss.backward()
    rng = torch.get_rng_state()
    before = snapshot(model)
    fastbert.verify(model, labelled())
    assert snapshot(model) == before
    torch.manual_seed(7)
    torch.rand(3)
    rng = torch.get_rng_state()
    fastbert.verify(model, {k: v.clone() for k, v in fixed().items()})
    assert torch.equal(torch.get_rng_state(), rng)


def fixed():
    return {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([1])}


def snapshot(model: nn.Module):
    parameters = {n: (id(p), p.sum().item(), None if p.grad is None else id(p.grad)) for n, p in model.named_parameters()}
    gradients = {n: p.grad.sum().item() for n, p in model.named_parameters() if p.grad is not None}
    modules = {n: (type(m), m.training, len(m._forward_hooks), getattr(m, "p", None)) for n, m in model.named_modules()}
    return parameters, gradients, modules, model.config._attn_implementation


def test_result_as_data_is_json():
    data = fastbert.verify(classifier(), labelled()).to_dict()
    assert json.loads(json.dumps(data))["ok"] is True


def test_batch_on_no_mapping_is_one_clear_error():
    with pytest.raises(TypeError, match="batch: expected a mapping .* got Tensor"):
        fastbert.verify(classifier(), torch.ones(2, 3))


def test_model_without_bert_is_one_clear_error():
    with pytest.raises(fastbert.UnsupportedModelError, match="found Linear"):
        fastbert.verify(nn.Linear(2, 2), {"input": torch.ones(1, 2)})


class Tagger(nn.Module):
    """A head that pools and scores with float32 tensors, whatever the model's dtype."""

    def __init__(self):
        super().__init__()
        self.bert = BertModel(CONFIG)
        self.score = nn.Linear(CONFIG.hidden_size, 5)

    def forward(self, input_ids, attention_mask, labels):
        hidden = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        weights = torch.zeros(hidden.shape[:2]).masked_fill(attention_mask.bool(), 1.0).unsqueeze(-1)
        pooled = (hidden * weights).sum(1) / weights.sum(1)
        logits = self.score(pooled.float() @ torch.eye(pooled.shape[-1])) + torch.arange(5.0)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("differs", [False, True])
def test_a_module_of_ones_own_that_makes_float32_tensors(differs, monkeypatch):
    if differs:
        wrong(monkeypatch, "encoder_layer", by=1.001)
    result = fastbert.verify(Tagger(), labelled())
    assert result.ok is not differs and result.kernel_calls
    assert result.reference_dtype == torch.float64 and any("widened" in note for note in result.notes)
    assert not differs or result.first_divergence == "bert.encoder.layer.0"
