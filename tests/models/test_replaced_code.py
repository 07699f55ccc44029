"""Forwards, buffers and decoders that a user replaced, before or after patching, are honoured."""

import copy
import functools
import logging

import pytest
import torch
from torch import nn
from transformers.models.bert import modeling_bert as bert

import fastbert
from fastbert import forwards
from fastbert.testing.models import assert_equal, counting, doubled, run
from tests.models.tiny import BASE, CLASSIFICATION, CLM, KINDS, LENGTH, MLM, make, make_batch

# A module of each class that is patched or depended on, and the kernel that a replaced forward keeps from running.
PLACES = {
    "bert.embeddings": "embedding_layernorm",
    "bert.encoder.layer.0.attention.self": "attention",
    "bert.encoder.layer.0.attention.output": "dropout_add_layernorm",
    "bert.encoder.layer.0.intermediate": "bias_gelu",
    "bert.encoder.layer.0.output": "dropout_add_layernorm",
    "cls.predictions.transform": "gelu_layernorm",
    "cls.predictions": "linear_cross_entropy",
    "cls": "linear_cross_entropy",
    "": "linear_cross_entropy",
    "bert": None,
    "bert.encoder": None,
    "bert.encoder.layer.0": None,
    "bert.encoder.layer.0.attention": None,
    # Classes that are not patched but whose work kernels do.
    "bert.encoder.layer.0.output.LayerNorm": "dropout_add_layernorm",
    "bert.encoder.layer.0.output.dropout": "dropout_add_layernorm",
    "bert.encoder.layer.0.intermediate.intermediate_act_fn": "bias_gelu",
    "bert.embeddings.token_type_embeddings": "embedding_layernorm",
    "bert.encoder.layer.0.output.dense": None,
}


def scaled(output):
    """The output of any forward, slightly enlarged."""
    if isinstance(output, torch.Tensor):
        return output * 1.25
    if isinstance(output, tuple):
        return (scaled(output[0]), *output[1:])
    if isinstance(output, dict):
        output["last_hidden_state" if "last_hidden_state" in output else "loss"] *= 1.25
    return output


def replacing(function):
    @functools.wraps(function)  # wrapped with functools.wraps, it looks like the original
    def mine(*args, **kwargs):
        return scaled(function(*args, **kwargs))

    return mine


@pytest.fixture
def on_class(monkeypatch):
    """Replaces the forward of a library class until the test ends."""

    def replace(cls):
        monkeypatch.setattr(cls, "forward", replacing(cls.forward))

    return replace


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", PLACES)
def test_a_forward_replaced_on_its_class(on_class, name, when):
    model, batch = make(MLM, attention="sdpa"), make_batch(MLM)
    plain = run(copy.deepcopy(model), batch)
    stock, patched = copy.deepcopy(model), copy.deepcopy(model)
    if when == "after":
        fastbert.patch(patched)
    on_class(type(model.get_submodule(name)))
    eager, exact = run(copy.deepcopy(stock), batch), run(stock.double(), doubled(batch))
    if when == "before":
        fastbert.patch(patched)
    with counting(heads=True) as launched:
        assert_equal(run(patched, batch), eager, exact)
    assert not torch.equal(plain["loss"], eager["loss"]), "the replacement changes nothing: it proves nothing"
    kernel = PLACES[name]
    others = 2 if name.endswith("output") else 0  # of BertOutput, or BertSelfOutput, which have the same kernel
    assert not kernel or launched[f"{kernel}_fwd_kernel"] == others
    for row in fastbert.report(patched).rows:
        if kernel and row.kernel == kernel and row.hf_class == type(model.get_submodule(name)).__name__:
            assert row.state != "active" and "was replaced by" in row.reason, row


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", PLACES)
def test_a_forward_replaced_on_a_module(name, when):
    model, batch = make(MLM, attention="sdpa"), make_batch(MLM)
    stock, patched = copy.deepcopy(model), copy.deepcopy(model)
    if when == "after":
        fastbert.patch(patched)
    for each in (stock, patched):
        module = each.get_submodule(name)
        module.forward = replacing(module.forward)
    eager = run(stock, batch)
    wide = copy.deepcopy(model).double()
    wide.get_submodule(name).forward = replacing(wide.get_submodule(name).forward)
    exact = run(wide, doubled(batch))
    if when == "before":
        fastbert.patch(patched)
    assert_equal(run(patched, batch), eager, exact)
    for row in fastbert.report(patched).rows:
        if row.module == name and row.kernel:
            assert row.state == "untouched" and "replaced" in row.reason, row


@pytest.mark.parametrize("cls", [bert.BertIntermediate, bert.BertLayer, bert.BertPooler, nn.Linear, nn.LayerNorm])
def test_a_forward_of_ones_own_never_sees_packed_rows(on_class, monkeypatch, cls):
    seen = []
    model, batch = make(CLASSIFICATION, attention="sdpa"), make_batch(CLASSIFICATION)
    original = cls.forward

    def watching(self, x, *args, **kwargs):
        seen.append(tuple(x.shape[:2]))
        return original(self, x, *args, **kwargs)

    monkeypatch.setattr(cls, "forward", watching)
    stock = run(copy.deepcopy(model), batch)
    expected = list(seen)
    seen.clear()
    results = run(fastbert.patch(model), batch)
    assert expected and set(seen) == set(expected)
    torch.testing.assert_close(results, stock)


def test_a_module_of_ones_own_in_a_layer_never_sees_packed_rows():
    class Neighbours(nn.Module):
        """A module in which each token depends on the one before it."""

        def forward(self, x):
            return x + 0.5 * x.roll(1, dims=1)

    model, batch = make(CLASSIFICATION, attention="sdpa"), make_batch(CLASSIFICATION)
    for layer in model.bert.encoder.layer:
        layer.output.dense = nn.Sequential(layer.output.dense, Neighbours())
    eager, exact = run(copy.deepcopy(model), batch), run(copy.deepcopy(model).double(), doubled(batch))
    assert_equal(run(fastbert.patch(model), batch), eager, exact)
    (row,) = [row for row in fastbert.report(model).rows if row.hf_class == "BertEncoder"]
    assert "Neighbours" in row.reason


def test_replaced_and_put_back(monkeypatch):
    model, batch = fastbert.patch(make()), make_batch()
    with monkeypatch.context() as context:
        context.setattr(bert.BertIntermediate, "forward", replacing(bert.BertIntermediate.forward))
        with counting() as launched:
            run(model, batch)
        assert not launched["bias_gelu_fwd_kernel"]
    with counting() as launched:
        run(model, batch)
    assert launched["bias_gelu_fwd_kernel"] == 2


def test_strict_raises_and_untested_takes_the_kernel(monkeypatch, caplog):
    monkeypatch.setattr(bert.BertOutput, "forward", lambda self, x, residual: self.LayerNorm(self.dense(x) + residual))
    model = make()
    types = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(fastbert.UnsupportedModelError, match="BertOutput.forward was replaced by"):
        fastbert.patch(model, strict=True)
    assert types == {name: type(module) for name, module in model.named_modules()}
    with caplog.at_level(logging.WARNING, "fastbert"):
        for _ in range(2):
            fastbert.patch(model)
    said = [record.getMessage() for record in caplog.records if "BertOutput.forward" in record.getMessage()]
    assert len(said) <= 1  # none if an earlier model of this process had the same reason
    batch = make_batch()
    assert fastbert.verify(model, batch, untested=True).ok
    fastbert.patch(model, strict=True, untested=True)
    with counting() as launched:
        run(model, batch)
    assert launched["dropout_add_layernorm_fwd_kernel"] == 4
    other = fastbert.patch(make())
    with counting() as launched:
        run(other, batch)
    assert launched["dropout_add_layernorm_fwd_kernel"] == 2, "another model was patched without it"


@pytest.fixture(autouse=True)
def nothing_accepted():
    """Clear what a test has accepted as tested."""
    yield
    forwards.clear_accepted()


def shifted(embeddings):
    embeddings.position_ids = (embeddings.position_ids + 3) % embeddings.position_ids.shape[1]


def of_type_one(embeddings):
    embeddings.token_type_ids = torch.ones_like(embeddings.token_type_ids)


def of_mixed_types(embeddings):
    embeddings.token_type_ids = torch.arange(embeddings.token_type_ids.numel()).remainder(2)[None]


def both(embeddings):
    shifted(embeddings)
    of_mixed_types(embeddings)


def longer(embeddings):
    embeddings.position_ids = torch.arange(500)[None].remainder(embeddings.position_embeddings.num_embeddings)
    embeddings.token_type_ids = torch.zeros(1, 500, dtype=torch.long)


@pytest.mark.parametrize("change", [shifted, of_type_one, of_mixed_types, both, longer], ids=lambda f: f.__name__)
@pytest.mark.parametrize("given", ["nothing", "segments", "positions"])
@pytest.mark.parametrize("when", ["before", "after", "between"])
def test_buffers_of_ones_own_are_read(change, given, when):
    model, batch = make(BASE), make_batch(BASE, labels=False)
    if given != "segments":
        del batch["token_type_ids"]
    if given == "positions":
        batch["position_ids"] = torch.arange(LENGTH).flip(0)[None]
    stock, patched = copy.deepcopy(model), copy.deepcopy(model)
    change(stock.embeddings)
    if when == "before":
        change(patched.embeddings)
    fastbert.patch(patched)
    if when == "between":
        patched(**batch)
    if when != "before":
        change(patched.embeddings)
    with counting() as launched:
        results = run(patched, batch)
    assert_equal(results, run(copy.deepcopy(stock), batch), run(stock.double(), doubled(batch)))
    assert launched["embedding_layernorm_fwd_kernel"] == 1


def test_a_buffer_that_is_written_to_is_looked_at_again():
    model, batch = make(BASE), make_batch(BASE, labels=False)
    model.embeddings.position_ids = model.embeddings.position_ids.clone()
    stock, patched = copy.deepcopy(model), fastbert.patch(model)
    patched(**batch)
    for each in (stock, patched):
        each.embeddings.position_ids.copy_(each.embeddings.position_ids.flip(1))
    torch.testing.assert_close(patched(**batch).last_hidden_state, stock(**batch).last_hidden_state)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def subclassed(decoder):
    decoder.__class__ = Doubled
    return decoder


def in_sequence(decoder):
    return nn.Sequential(nn.Dropout(0.0), decoder)


def without_a_weight(decoder):
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = decoder

        def forward(self, x):
            return self.inner(x).tanh()

    return Product()


@pytest.mark.parametrize("change", [subclassed, in_sequence, without_a_weight], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.name in ("mlm", "clm", "pretraining")], ids=str)
@pytest.mark.parametrize("mlm_logits", ["full", "none"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.one_in(3)
def test_a_decoder_of_ones_own(when, mlm_logits, kind, change):
    model, batch = make(kind).train(), make_batch(kind)

    def changed(model):
        predictions = model.cls.predictions
        predictions.decoder = change(predictions.decoder)
        return model

    stock = changed(copy.deepcopy(model))
    eager, exact = run(copy.deepcopy(stock), batch), run(stock.double(), doubled(batch))
    if when == "before":
        patched = fastbert.patch(changed(model), mlm_logits=mlm_logits)
    else:
        patched = changed(fastbert.patch(model, mlm_logits=mlm_logits))
    with counting(heads=True) as launched:
        assert_equal(run(patched, batch), eager, exact)
    assert not launched["linear_cross_entropy_fwd_kernel"]


def test_a_decoder_quantized_after_patching():
    model, batch = make(MLM), make_batch(MLM)
    quantized = torch.ao.quantization.quantize_dynamic
    stock = quantized(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    patched = quantized(fastbert.patch(model), {nn.Linear}, dtype=torch.qint8)
    with torch.no_grad():
        torch.testing.assert_close(patched(**batch).loss, stock(**batch).loss)


def test_a_causal_loss_of_ones_own():
    model, batch = make(CLM), make_batch(CLM)
    model.loss_function = lambda logits, labels, **_: logits.float().square().mean() + labels.numel()
    stock = run(copy.deepcopy(model), batch)
    torch.testing.assert_close(run(fastbert.patch(model), batch)["loss"], stock["loss"])
