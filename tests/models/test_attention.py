"""Patched attention: masks, the implementation that a config names, one product for q, k and v."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from transformers import BertModel, EncoderDecoderModel, RobertaConfig, RobertaModel

import fastbert
from fastbert import ops
from fastbert.layers.projection import project
from fastbert.testing.models import check, counting
from tests.models.tiny import BASE, CLASSIFICATION, CLM, config, make, make_batch


def implementations(model: nn.Module) -> set[str]:
    return {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")}


def test_a_model_that_shares_the_config_stays_stock():
    shared = config()
    teacher, student = BertModel(shared).eval(), BertModel(shared).eval()
    fastbert.patch(student)
    assert all(m.config is shared for m in (*teacher.modules(), *student.modules()) if hasattr(m, "config"))
    assert shared._attn_implementation == "sdpa"
    batch = make_batch(BASE, labels=False)
    with counting() as launched:
        teacher(**batch)
    assert not launched
    with counting() as launched:
        student(**batch)
    assert launched["attention_fwd_kernel"] == 2


@pytest.mark.parametrize("former", ["eager", "sdpa"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_patched_model_is_patched_and_can_be_unpatched(former, copied):
    model = fastbert.patch(make(BASE, attention=former))
    other, batch = copied(model), make_batch(BASE, labels=False)
    for each, kernels in ((other, 2), (model, 2), ("unpatched", 0), (model, 2)):
        each = fastbert.unpatch(other) if each == "unpatched" else each
        with counting() as launched:
            each(**batch)
        assert launched["attention_fwd_kernel"] == kernels
        assert implementations(each) == {former}


@pytest.mark.parametrize("first,then", [("eager", "sdpa"), ("sdpa", "eager"), ("sdpa", "fastbert")])
def test_implementations_of_transformers_compute_the_same(first, then):
    model = fastbert.patch(make(BASE, attention=first))
    batch = make_batch(BASE, "left", labels=False)
    before = model(**batch).last_hidden_state
    model.set_attn_implementation(then)
    with counting() as launched:
        after = model(**batch).last_hidden_state
    assert launched["attention_fwd_kernel"] == 2 and torch.equal(before, after)
    assert implementations(fastbert.unpatch(model)) == {then}


def test_saved_config_names_nothing_of_fastbert(tmp_path):
    fastbert.patch(make(CLASSIFICATION)).save_pretrained(tmp_path)
    assert "fastbert" not in (tmp_path / "config.json").read_text()


def test_attention_weights_are_eagers():
    model = make(BASE, attention="eager")
    batch = make_batch(BASE, "left", labels=False) | {"output_attentions": True}
    stock = model(**batch).attentions
    patched = fastbert.patch(model)(**batch).attentions
    assert len(stock) == len(patched) == 2
    for a, b in zip(stock, patched, strict=True):
        torch.testing.assert_close(a, b)
    row = next(r for r in fastbert.report(model).rows if r.hf_class == "BertSelfAttention")
    assert row.fallback_calls == {"attention weights were requested": 1}


@pytest.mark.parametrize("beams", [1, 3])
def test_encoder_decoder_generates_stocks_tokens(beams):
    model = EncoderDecoderModel(
        encoder=make(BASE), decoder=make(CLM, is_decoder=True, add_cross_attention=True, bos_token_id=None)
    ).eval()
    for settings in (model.config, model.generation_config):
        settings.decoder_start_token_id, settings.pad_token_id = 1, 0
    batch = make_batch(BASE, "left", labels=False)
    keywords = {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "num_beams": beams,
        "do_sample": False,
    }
    stock = model.generate(**keywords)
    with counting() as launched:
        patched = fastbert.patch(model).generate(**keywords)
    assert torch.equal(stock, patched)
    assert launched["attention_fwd_kernel"] == 2 + 4 * (2 + 2)  # encoder once; per token self- and cross-attention


@pytest.mark.parametrize("mask", ["none", "right", "left", "holes"])
def test_roberta_selects_the_kernel_by_name(mask):
    settings = config().to_dict() | {"model_type": "roberta", "max_position_embeddings": 40}
    model = RobertaModel(RobertaConfig(**settings)).eval()
    model.set_attn_implementation("eager")
    batch = make_batch(BASE, mask, labels=False)
    batch.pop("token_type_ids")
    stock = model(**batch).last_hidden_state
    model.set_attn_implementation("fastbert")
    with counting() as launched:
        result = model(**batch).last_hidden_state
    torch.testing.assert_close(result, stock)
    assert launched == {"attention_fwd_kernel": 2}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_fully_masked_row_is_eagers(attention):
    model = make(BASE)
    batch = make_batch(BASE, "none", labels=False)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0] = 0
    stock = model(**batch).last_hidden_state
    patched = fastbert.patch(make(BASE, attention=attention))(**batch).last_hidden_state
    assert stock.isfinite().all()
    torch.testing.assert_close(patched, stock)


@pytest.mark.usefixtures("each_way")
def test_bounds_of_a_mask_are_worked_out_once_a_forward(monkeypatch):
    calls = []
    right = ops.bounds_of
    monkeypatch.setattr(ops, "bounds_of", lambda mask: calls.append(mask.shape) or right(mask))
    model = fastbert.patch(make(BASE))
    batch = make_batch(BASE, "right", labels=False)
    batch["attention_mask"] = batch["attention_mask"].bool()
    first = model(**batch).last_hidden_state
    assert len(calls) == 1
    batch["attention_mask"][1] = True  # the same tensor with other values: nothing of the first forward may be kept
    second = model(**batch).last_hidden_state
    assert len(calls) == 2 and not torch.equal(first[1], second[1])


def linears(n: int = 3, width: int = 8, bias: bool = True) -> tuple[nn.Linear, ...]:
    return tuple(nn.Linear(width, width, bias=bias) for _ in range(n))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_one_product_is_three(n, bias):
    modules = linears(n, bias=bias)
    x = torch.randn(2, 5, 8, requires_grad=True)
    upstream = [torch.randn(2, 5, 2, 4) for _ in modules]
    gradients = []
    for results in (project(x, modules, 4), tuple(m(x).unflatten(-1, (2, 4)) for m in modules)):
        inputs = [x, *(p for m in modules for p in m.parameters())]
        gradients.append([*results, *torch.autograd.grad(results, inputs, upstream)])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_odd_linears_are_called_as_modules():
    called = []
    modules = linears()
    modules[1].register_forward_hook(lambda *_: called.append(1))
    q, k, v = project(torch.randn(2, 5, 8), modules, 4)
    assert called == [1]
    assert q.untyped_storage().data_ptr() != v.untyped_storage().data_ptr()


def test_gradient_of_the_product_is_the_buffer_of_the_backward(monkeypatch):
    def stacked(*arguments, **keywords):
        raise AssertionError("the three gradients were stacked")

    model = fastbert.patch(make(BASE))
    output = model(**make_batch(BASE, labels=False)).last_hidden_state
    monkeypatch.setattr(torch, "stack", stacked)
    output.sum().backward()
    assert model.encoder.layer[0].attention.self.key.weight.grad.isfinite().all()


@pytest.mark.parametrize("places", ["apart", "in another order", "one for all", "one number"])
def test_gradients_of_other_origin_are_stacked(places):
    """Gradients are one buffer only if they are its slices, in order and in place."""
    x, modules = torch.randn(2, 5, 8, requires_grad=True), linears()
    q, k, v = torch.randn(2, 5, 3, 2, 4).unbind(-3)
    upstream = {
        "apart": [q.clone(), k.clone(), v.clone()],
        "in another order": [v, k, q],
        "one for all": [q, q, q],
        "one number": [torch.tensor(2.0).expand_as(q)] * 3,  # as a sum's gradient
    }[places]
    (expected,) = torch.autograd.grad([m(x).unflatten(-1, (2, 4)) for m in modules], x, upstream)
    (found,) = torch.autograd.grad(project(x, modules, 4), x, upstream)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("form", ["bool", "additive", "broadcast"])
def test_general_masks(form):
    batch = make_batch(BASE, "none", labels=False)
    rows, length = batch["input_ids"].shape
    seen = torch.rand(rows if form != "broadcast" else 1, 1, length, length) < 0.6
    seen |= torch.eye(length, dtype=torch.bool)
    lowest = torch.finfo(torch.float32).min
    batch["attention_mask"] = torch.zeros(seen.shape).masked_fill(~seen, lowest)
    if form == "bool":  # SDPA's form
        batch["attention_mask"] = seen
        check(make(BASE, attention="sdpa"), batch)
    else:
        check(make(BASE), batch)


def test_a_bool_mask_that_eager_attention_adds_is_added():
    model, batch = make(BASE), make_batch(BASE, "none", labels=False)
    rows, length = batch["input_ids"].shape
    batch["attention_mask"] = torch.rand(rows, 1, length, length) < 0.6
    stock = model(**batch).last_hidden_state
    with counting() as launched:
        torch.testing.assert_close(fastbert.patch(model)(**batch).last_hidden_state, stock)
    assert not launched["attention_fwd_kernel"]
    (row,) = {row.reason for row in fastbert.report(model).rows if row.hf_class == "BertSelfAttention"}
    assert "zeros and ones" in row


def test_whole_model_through_torch_save():
    model = fastbert.patch(make(BASE))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    batch = make_batch(BASE, labels=False)
    with counting() as launched:
        assert torch.equal(loaded(**batch).last_hidden_state, model(**batch).last_hidden_state)
    assert launched["attention_fwd_kernel"] == 4
