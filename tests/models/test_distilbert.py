"""DistilBERT, whose layers, masks and heads are built differently: equal to stock, packed, or stock with the reason."""

import copy

import pytest
import torch
from torch import nn
from transformers import DistilBertConfig
from transformers.models.distilbert import modeling_distilbert as distilbert

import fastbert
from fastbert.layers.masks import CarriedMask
from fastbert.testing.models import assert_equal, assert_no_fallback, counting, doubled, rows_in_products, run
from fastbert.testing.rows import DEVICE

pytestmark = pytest.mark.one_in(2)

VOCABULARY, ROWS, LENGTH = 61, 2, 9
TOKENS = 6 + LENGTH  # of a batch with padding
HEADS = {
    "base": ("DistilBertModel", {}),
    "mlm": ("DistilBertForMaskedLM", {"labels": (ROWS, LENGTH)}),
    "classification": ("DistilBertForSequenceClassification", {"labels": (ROWS,)}),
    "multiple-choice": ("DistilBertForMultipleChoice", {"labels": (ROWS,)}),
    "ner": ("DistilBertForTokenClassification", {"labels": (ROWS, LENGTH)}),
    "qa": ("DistilBertForQuestionAnswering", {"start_positions": (ROWS,), "end_positions": (ROWS,)}),
}


def make(head="classification", attention="sdpa", dtype=torch.float32, **more):
    sizes = {"vocab_size": VOCABULARY, "dim": 40, "hidden_dim": 56, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 24}
    dropout = dict.fromkeys(("dropout", "attention_dropout", "qa_dropout", "seq_classif_dropout"), 0.0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = getattr(distilbert, HEADS[head][0])(DistilBertConfig(**sizes | dropout | more))
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape))
    model.set_attn_implementation(attention)
    return model.to(DEVICE, dtype).eval()


def make_batch(head="classification", padded=True):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        shape = (ROWS, 2, LENGTH) if head == "multiple-choice" else (ROWS, LENGTH)
        batch = {"input_ids": torch.randint(1, VOCABULARY, shape)}
        if padded:
            batch["attention_mask"] = torch.ones(shape, dtype=torch.long)
            batch["attention_mask"][1:, ..., 6:] = 0
        batch |= {name: torch.randint(0, 2, size) for name, size in HEADS[head][1].items()}
        if head == "mlm":
            batch["labels"][:, 2::3] = -100
            batch["labels"][1, 6:] = -100
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


def check(model, batch, change=lambda model: None, **switches):
    """The patched copy after a forward and a backward that equal stock's."""
    patched = fastbert.patch(copy.deepcopy(model), **switches)
    for one in (patched, model):
        change(one)
    results = run(patched, batch)
    stock, exact = run(copy.deepcopy(model), batch), run(copy.deepcopy(model).double(), doubled(batch))
    assert_equal(results, *({name: found[name] for name in results} for found in (stock, exact)))
    return patched


def test_a_width_that_the_config_does_not_have():
    """A call computes the number of heads from the hidden states, whatever the config has become."""
    model = make("base")
    model.config.dim = 80
    assert_no_fallback(check(model, make_batch("base")))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("head", HEADS)
def test_a_head_is_equal(head, attention):
    patched = check(make(head, attention), make_batch(head))
    assert_no_fallback(patched, but=("Transformer",))


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("switches", [{"mlm_logits": "none"}, {"unpad": True, "mlm_logits": "none"}, {"unpad": False}], ids=str)
def test_an_mlm_head_is_equal(switches, padded):
    patched = check(make("mlm").train(), make_batch("mlm", padded), **switches)
    assert fastbert.report(patched).rows[0].state == "active"


def test_float64_and_sinusoidal_positions():
    check(make(dtype=torch.float64, sinusoidal_pos_embds=True), make_batch())


@pytest.mark.parametrize("head", ["classification", "multiple-choice"])
def test_only_tokens_run_and_one_row_of_each_sequence_is_read(head):
    model, batch = fastbert.patch(make(head)), make_batch(head)
    tokens, sequences = int(batch["attention_mask"].sum()), batch["attention_mask"].flatten(0, -2).shape[0]
    rows = rows_in_products(lambda: model(**batch))
    assert rows[:5] == [tokens] * 4 + [sequences] or rows[:4] == [tokens] * 4
    assert rows.count(tokens) == 5 and max(rows) == tokens  # four products of the first layer; keys and values of the last
    assert_no_fallback(model)


def test_a_layer_is_one_op():
    patched = fastbert.patch(make())
    with counting() as launched:
        run(patched, make_batch())
    assert launched["attention_fwd_kernel"] == launched["bias_gelu_fwd_kernel"] == 2
    assert launched["dropout_add_layernorm_fwd_kernel"] == launched["dropout_add_layernorm_bwd_kernel"] == 4
    (row, *_) = [row for row in fastbert.report(patched).rows if row.hf_class == "TransformerBlock"]
    assert (row.state, row.kernel_calls) == ("active", 1)


def dropped_after_attention(model):
    """DistilBERT does not drop between attention and the first LayerNorm, so with p = 1 elsewhere that path is left."""
    for module in model.modules():
        if isinstance(module, distilbert.FFN):
            module.dropout.p = 1.0


def test_the_attention_output_is_not_dropped():
    check(make().train(), make_batch(), dropped_after_attention)


def hooked(model):
    model.get_submodule("distilbert.transformer.layer.0.ffn.lin1").register_forward_hook(lambda *_: None)


def chunked(model):
    model.distilbert.transformer.layer[0].ffn.chunk_size_feed_forward = 3


def own_norm(model):
    layer = model.distilbert.transformer.layer[1]
    layer.output_layer_norm = nn.RMSNorm(40, device=DEVICE)


def checkpointed(reentrant):
    def change(model):
        model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()

    return change


CHANGES = {
    "hook": (hooked, "ffn.lin1 is a Linear, or has hooks"),
    "chunks": (chunked, "a chunked or replaced feed-forward"),
    "norm": (own_norm, "output_layer_norm: LayerNorm is a RMSNorm, or has hooks"),
    "checkpointing": (checkpointed(False), None),
    "reentrant checkpointing": (checkpointed(True), None),
}


@pytest.mark.parametrize("switches", [{}, {"residual_norm": False, "unpad": False}], ids=str)
@pytest.mark.parametrize(("change", "reason"), CHANGES.values(), ids=CHANGES)
def test_what_the_op_does_not_take_is_stock(change, reason, switches):
    patched = check(make(), make_batch(), change, **switches)
    reasons = {why for row in fastbert.report(patched).rows if row.hf_class == "TransformerBlock" for why in row.fallback_calls}
    assert reasons == (set() if switches or reason is None else {reason})
    if change is chunked and not switches:
        (encoder,) = [row for row in fastbert.report(patched).rows if row.hf_class == "Transformer"]
        assert encoder.fallback_calls == {"a chunked feed-forward": 1}


def test_hidden_states_and_attentions_are_stocks():
    model, batch = make(attention="eager"), make_batch()
    patched = fastbert.patch(copy.deepcopy(model))
    for wanted in ("output_hidden_states", "output_attentions"):
        found, expected = (one(**batch, **{wanted: True})[wanted.removeprefix("output_")] for one in (patched, model))
        assert len(found) == len(expected)
        for ours, stocks in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, stocks)


@pytest.mark.parametrize("kind", ["4-D", "embeds", "positions"])
def test_other_inputs(kind):
    model, batch = make(), make_batch()
    if kind == "4-D":
        seen = torch.rand(ROWS, 1, LENGTH, LENGTH) < 0.7
        batch["attention_mask"] = (seen | torch.eye(LENGTH, dtype=torch.bool)).to(DEVICE)
    elif kind == "embeds":
        batch["inputs_embeds"] = torch.randn(ROWS, LENGTH, 40, device=DEVICE, requires_grad=True)
        del batch["input_ids"]
    else:
        batch["position_ids"] = torch.arange(LENGTH, device=DEVICE).flip(0)[None]
    check(model, batch)


def test_compiled():
    """It runs padded, on stock's masks."""
    model, batch = make(), make_batch()
    patched = fastbert.patch(copy.deepcopy(model))
    compiled = torch.compile(patched, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**batch).loss, model(**batch).loss)


def test_packed_tokens_module_by_module():
    """An activation without a kernel: the modules work row by row, the last layer's for the rows that are read."""
    model = make(activation="tanh")
    patched = check(model, make_batch())
    (encoder,) = [row for row in fastbert.report(patched).rows if row.hf_class == "Transformer"]
    (layer, *_) = [row for row in fastbert.report(patched).rows if row.hf_class == "TransformerBlock"]
    assert encoder.state == "active" and layer.state == "module by module"
    rows = rows_in_products(lambda: patched(**make_batch()))
    assert max(rows) == TOKENS and rows.count(ROWS) >= 4


def test_a_replaced_mask_function_is_called(monkeypatch):
    calls = []
    make_mask = distilbert.create_bidirectional_mask
    monkeypatch.setattr(distilbert, "create_bidirectional_mask", lambda *a, **k: calls.append(a) or make_mask(*a, **k))
    patched = fastbert.patch(make())
    patched(**make_batch())
    assert calls


def test_a_loss_of_ones_own_is_stocks():
    def smoothed(model):
        model.mlm_loss_fct = nn.CrossEntropyLoss(label_smoothing=0.1)

    patched = check(make("mlm"), make_batch("mlm"), smoothed)
    assert "its loss has weights, or other settings" in fastbert.report(patched).rows[0].fallback_calls


def test_unpatch_and_pickle(tmp_path):
    patched = fastbert.patch(make())
    torch.save(patched, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    torch.testing.assert_close(loaded(**make_batch()).logits, patched(**make_batch()).logits)
    fastbert.unpatch(patched)
    assert all(type(module).__module__.startswith(("transformers", "torch")) for module in patched.modules())


def test_a_carried_mask_survives_being_detached():
    carrier = CarriedMask.of("mask", None)
    assert carrier.dim() == 4 and carrier.detach().mask == "mask"
