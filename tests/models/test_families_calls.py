"""The families in use: patch and unpatch, copies, saved models, decoders, checkpointing, autocast, compiling, Trainer."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    EncoderDecoderModel,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    T5Config,
    T5EncoderModel,
)

import fastbert
from fastbert.registry import model_classes
from fastbert.testing.models import assert_bitwise, assert_equal, check, counting, doubled, expected_launches, run
from tests.models import test_distilbert
from tests.models.families import DISCRIMINATOR, ELECTRA, ERNIE, FAMILIES, FAMILY_KINDS, LIKE_ROBERTA, ROBERTA
from tests.models.test_checkpointing import checkpointed
from tests.models.test_checkpointing import expected as launches_with_checkpoints
from tests.models.test_export import assert_serves, exported
from tests.models.test_generate import CACHE, WAYS, generate
from tests.models.test_patch import classes
from tests.models.test_trainer import train
from tests.models.tiny import KINDS, ROWS, make, make_batch

pytestmark = pytest.mark.one_in(2)

DISTINCT = [ROBERTA, ELECTRA, ERNIE]
OF_EVERY_FAMILY = [family.kind("mlm") for family in FAMILIES]


class TestPatching:
    def test_all_classes_are_proved(self):
        """Every model that `patch` supports is in `tiny`, in `families` or in test_distilbert.py."""
        proved = {kind.cls for kind in (*KINDS, *FAMILY_KINDS)} | {
            type(test_distilbert.make(head)) for head in test_distilbert.HEADS
        }
        assert set(model_classes()) == proved

    @pytest.mark.parametrize("kind", FAMILY_KINDS, ids=str)
    def test_stock_again(self, kind):
        model = make(kind)
        before, state = classes(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert fastbert.patch(model) is model
        patched = classes(model)
        assert {name: cls.__name__ for name, cls in patched.items()} == {name: cls.__name__ for name, cls in before.items()}
        assert sum(patched[name] is not before[name] for name in before) > 10
        fastbert.unpatch(model)
        assert classes(model) == before
        assert_bitwise(dict(model.state_dict()), state)

    @pytest.mark.parametrize("family", DISTINCT, ids=str)
    def test_within_a_block(self, family):
        model, batch = make(family.kind("mlm")), make_batch(family.kind("mlm"))
        stock, before = run(model, batch), classes(model)
        with pytest.raises(KeyError), fastbert.patched(model):
            assert classes(model) != before
            raise KeyError
        assert classes(model) == before
        assert_bitwise(run(model, batch), stock)

    @pytest.mark.one_in(2)
    @pytest.mark.parametrize("switch", ["attention", "residual_norm", "intermediate", "mlm_head", "embeddings"])
    @pytest.mark.parametrize("kind", [ROBERTA.kind("mlm"), DISCRIMINATOR], ids=str)
    def test_a_kernel_is_left_out(self, kind, switch):
        kernels = {
            "attention": ["attention"],
            "residual_norm": ["dropout_add_layernorm"],
            "intermediate": ["bias_gelu"],
            "mlm_head": ["gelu_layernorm"],
            "embeddings": ["embedding_layernorm"],
        }
        model, batch = make(kind), make_batch(kind)
        patched = fastbert.patch(copy.deepcopy(model), **{switch: False})
        with counting() as launched:
            results = run(patched, batch)
        assert launched == expected_launches(model, without=kernels[switch])
        assert_equal(results, run(copy.deepcopy(model), batch), run(copy.deepcopy(model).double(), doubled(batch)))

    @pytest.mark.parametrize("family", FAMILIES, ids=str)
    def test_strict(self, family):
        fastbert.patch(make(family.kind("single-label")), strict=True)
        model = make(family.kind("base"))
        model.embeddings.LayerNorm = nn.Identity()
        with pytest.raises(
            fastbert.UnsupportedModelError, match=rf"embeddings \({family}Embeddings\): LayerNorm is a Identity"
        ):
            fastbert.patch(model, strict=True)

    @pytest.mark.one_in(2)
    @pytest.mark.parametrize("kind", OF_EVERY_FAMILY, ids=str)
    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
    def test_a_copy_is_patched(self, kind, copied):
        model = fastbert.patch(make(kind), mlm_logits="none", unpad=True)
        twin = copied(model)
        assert classes(twin) == classes(model)
        fastbert.unpatch(twin)
        assert type(twin) is kind.cls and type(model) is not kind.cls

    @pytest.mark.one_in(2)
    @pytest.mark.parametrize("family", FAMILIES, ids=str)
    def test_saved_while_patched(self, family, tmp_path):
        """The folder names stock's class; Auto classes load it, and it is patched anew."""
        kind = family.kind("single-label")
        model = fastbert.patch(make(kind))
        model.save_pretrained(tmp_path)
        for auto, cls in ((AutoModelForSequenceClassification, kind.cls), (kind.cls, kind.cls)):
            loaded = auto.from_pretrained(tmp_path)
            assert type(loaded) is cls and loaded.config.architectures == [cls.__name__]
            batch = make_batch(kind)
            assert_bitwise(run(fastbert.patch(loaded.eval()), batch, backward=False), run(model, batch, backward=False))
        for auto, name in ((AutoModel, "base"), (AutoModelForMaskedLM, "mlm")):
            assert type(fastbert.unpatch(fastbert.patch(auto.from_pretrained(tmp_path)))) is family.kind(name).cls

    def test_the_patched_class_makes_a_model(self):
        """`type(model)(config)` and `from_pretrained` of a patched class work as with stock's."""
        for kind in OF_EVERY_FAMILY:
            model = fastbert.patch(make(kind))
            assert type(model)(model.config).state_dict().keys() == model.state_dict().keys()

    @pytest.mark.parametrize("family", DISTINCT, ids=str)
    def test_the_report(self, family):
        kind = family.kind("mlm")
        model = fastbert.patch(make(kind))
        run(model, make_batch(kind))
        text = str(fastbert.report(model))
        head = f"fastbert on {kind.cls.__name__}: 5 of 5 modules that have a kernel are active"
        assert text.splitlines()[0] == head
        for name in ("Embeddings", "Encoder", "Layer"):
            assert re.search(rf"\b{family}{name}\b", text)

    @pytest.mark.parametrize(
        "cls, config_class, model_type",
        [
            (MPNetModel, MPNetConfig, "mpnet"),
            (ModernBertModel, ModernBertConfig, "modernbert"),
            (T5EncoderModel, T5Config, "t5"),
        ],
    )
    def test_what_is_not_supported_says_what_is(self, cls, config_class, model_type):
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "pad_token_id": 0}
        model = cls(config_class(vocab_size=20, **sizes))
        with pytest.raises(fastbert.UnsupportedModelError) as raised:
            fastbert.patch(model)
        text = str(raised.value)
        assert f"model: found {cls.__name__} (model type '{model_type}')" in text
        for family in ("BERT (BertModel, BertFor...)", "RoBERTa (RobertaModel, RobertaFor...)", "XLM-RoBERTa", "CamemBERT"):
            assert family in text
        for family in (
            "Data2VecText (Data2VecTextModel, Data2VecTextFor...)",
            "ELECTRA (",
            "ERNIE (ErnieModel",
            "DistilBERT (",
        ):
            assert family in text


class TestGroups:
    @pytest.mark.parametrize("kind", [*OF_EVERY_FAMILY, DISCRIMINATOR], ids=str)
    def test_pretrained_heads_are_no_new_head(self, kind):
        with pytest.raises(ValueError, match="head_lr: expected parameters beside the pretrained ones"):
            fastbert.param_groups(make(kind), 1.0, head_lr=5.0)

    @pytest.mark.parametrize("family", FAMILIES, ids=str)
    def test_a_new_head_and_rates_by_depth(self, family):
        model = make(family.kind("single-label"))
        groups = fastbert.param_groups(model, 1.0, head_lr=5.0, layer_decay=0.5)
        rates = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
        assert len(rates) == len(list(model.parameters()))
        for name, parameter in model.named_parameters():
            rate, decay = rates[id(parameter)]
            expected = 5.0 if name.startswith("classifier") else 1.0
            expected = 0.5 if ".layer.0." in name else 0.25 if ".embeddings" in name else expected
            assert rate == expected, name
            assert (decay == 0.0) == (name.endswith("bias") or "LayerNorm" in name), name

    def test_distilberts(self):
        with pytest.raises(ValueError, match="head_lr: expected parameters beside the pretrained ones"):
            fastbert.param_groups(test_distilbert.make("mlm"), 1.0, head_lr=5.0)
        model = test_distilbert.make("classification")
        groups = fastbert.param_groups(model, 1.0, head_lr=5.0, layer_decay=0.5)
        rates = {id(p): group["lr"] for group in groups for p in group["params"]}
        expected = {"pre_classifier.bias": 5.0, "distilbert.transformer.layer.1.ffn.lin1.weight": 1.0}
        expected |= {"distilbert.transformer.layer.0.ffn.lin1.weight": 0.5, "distilbert.embeddings.LayerNorm.weight": 0.25}
        assert {name: rates[id(model.get_parameter(name))] for name in expected} == expected


class TestDecoders:
    def make(self, family, **overrides):
        return make(family.kind("clm"), bos_token_id=None, eos_token_id=None, **overrides)

    @pytest.mark.one_in(3)
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("family", FAMILIES, ids=str)
    def test_generate_gives_stocks_tokens(self, family, way):
        """With a cache, whose length RoBERTa adds to its positions."""
        model = self.make(family)
        stock = generate(model, **{"do_sample": False} | WAYS[way])
        assert torch.equal(generate(fastbert.patch(model), **{"do_sample": False} | WAYS[way]), stock)

    @pytest.mark.one_in(2)
    @pytest.mark.parametrize("family", FAMILIES, ids=str)
    def test_cross_attention(self, family):
        model = self.make(family, add_cross_attention=True)
        states, seen = torch.randn(ROWS, 5, 40, requires_grad=True), torch.ones(ROWS, 5, dtype=torch.long)
        seen[0, 3:] = 0
        given = {"encoder_hidden_states": states, "encoder_attention_mask": seen, "use_cache": False}
        results = check(model, make_batch(family.kind("clm")) | given)
        assert results["gradient of encoder_hidden_states"].abs().max() > 0

    def test_a_cache(self):
        check(self.make(ROBERTA), make_batch(ROBERTA.kind("clm"), labels=False) | {"use_cache": True})

    @pytest.mark.parametrize("family", DISTINCT, ids=str)
    def test_a_second_step_on_the_cache(self, family):
        """Positions that are not given count on from the cache, in RoBERTa from its padding index too."""
        model = fastbert.patch(self.make(family))
        ids = make_batch(family.kind("clm"), labels=False)["input_ids"].clamp(min=2)
        with torch.no_grad():
            whole = model(ids).logits[:, -2:]
            cache = model(ids[:, :-2], use_cache=True)[CACHE]
            continued = model(ids[:, -2:], **{CACHE: cache}).logits
        torch.testing.assert_close(continued, whole)

    def test_encoder_and_decoder_in_one_model(self):
        model = EncoderDecoderModel(encoder=make(ROBERTA.kind("base")), decoder=self.make(ROBERTA, add_cross_attention=True))
        batch = make_batch(ROBERTA.kind("mlm"))
        labels = batch.pop("labels")
        batch["decoder_input_ids"] = labels.clamp(min=0)
        del batch["token_type_ids"]
        model.eval()
        patched = fastbert.patch(copy.deepcopy(model))
        batch |= {"use_cache": False}
        with counting() as launched:
            results = run(patched, batch, backward=False)
        assert launched == expected_launches(model, backward=False)
        exact = run(copy.deepcopy(model).double(), doubled(batch), backward=False)
        assert_equal(results, run(model, batch, backward=False), exact)


class TestMixed:
    """Modules of two families in one model: right, whatever runs."""

    @pytest.mark.parametrize("part", ["layer", "attention", "self", "embeddings", "encoder"])
    def test_a_part_of_bert_in_a_roberta(self, part):
        kind = ROBERTA.kind("single-label")
        model, bert = make(kind), make(next(kind for kind in KINDS if kind.name == "base"), seed=3)
        body = model.roberta
        if part == "layer":
            body.encoder.layer[0] = bert.encoder.layer[0]
        elif part == "attention":
            body.encoder.layer[0].attention = bert.encoder.layer[0].attention
        elif part == "self":
            body.encoder.layer[1].attention.self = bert.encoder.layer[1].attention.self
        elif part == "embeddings":
            body.embeddings = bert.embeddings
        else:
            body.encoder = bert.encoder
        batch = make_batch(kind)
        for switches in ({}, {"unpad": False}):
            patched = fastbert.patch(copy.deepcopy(model), **switches)
            assert_equal(
                run(patched, batch), run(copy.deepcopy(model), batch), run(copy.deepcopy(model).double(), doubled(batch))
            )

    def test_two_families_side_by_side(self):
        class Both(nn.Module):
            dtype = torch.float32

            def __init__(self):
                super().__init__()
                self.a, self.b = make(ROBERTA.kind("single-label")), make(ELECTRA.kind("single-label"))

            def forward(self, **batch):
                return {"loss": self.a(**batch).loss + self.b(**batch).loss}

        check(Both(), make_batch(ROBERTA.kind("single-label")))

    def test_another_eager_attention_in_one_familys_module(self, monkeypatch):
        """It is looked up in the family's module: RoBERTa's layers run it, BERT's do not."""
        kind = ROBERTA.kind("base")
        own, calls = ROBERTA.module.eager_attention_forward, []

        def replaced(*args, **kwargs):
            calls.append(1)
            return own(*args, **kwargs)

        monkeypatch.setattr(ROBERTA.module, "eager_attention_forward", replaced)
        run(fastbert.patch(make(kind)), make_batch(kind))
        assert len(calls) == 2
        bert = fastbert.patch(make(KINDS[0]))
        run(bert, make_batch(KINDS[0]))
        assert len(calls) == 2 and not any(row.fallback_calls for row in fastbert.report(bert).rows if row.kernel != "-")

    @pytest.mark.parametrize("name", ["create_bidirectional_mask"])
    def test_another_mask_function_in_one_familys_module(self, name, monkeypatch):
        kind = ROBERTA.kind("single-label")
        own, calls = getattr(ROBERTA.module, name), []
        monkeypatch.setattr(ROBERTA.module, name, lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs))
        run(fastbert.patch(make(kind)), make_batch(kind))
        assert calls == [1]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", DISTINCT, ids=str)
def test_checkpointing(family, reentrant):
    model = checkpointed(make(family.kind("mlm")), reentrant)
    check(model, make_batch(family.kind("mlm")), expected=launches_with_checkpoints(model))


@pytest.mark.parametrize("name", ["mlm", "single-label"])
@pytest.mark.parametrize("family", DISTINCT, ids=str)
def test_autocast(family, name):
    model, batch = make(family.kind(name)).train(), make_batch(family.kind(name))
    autocast = torch.autocast("cpu", torch.float16)
    with counting() as launched:
        results = run(fastbert.patch(copy.deepcopy(model)), batch, within=autocast)
    assert launched == expected_launches(model)
    eager = run(copy.deepcopy(model), batch, within=autocast)
    assert_equal(results, eager, run(copy.deepcopy(model).double(), doubled(batch)), torch.float16)


@pytest.mark.parametrize("kind", [ROBERTA.kind("mlm"), ELECTRA.kind("single-label")], ids=str)
def test_compiled_whole(kind):
    torch.compiler.reset()
    model, batch = make(kind, num_hidden_layers=1).train(), make_batch(kind)
    fast = torch.compile(fastbert.patch(copy.deepcopy(model)), fullgraph=True, backend="aot_eager")
    with counting() as launched:
        results = run(fast, batch)
    assert launched == expected_launches(model)
    results = {name.replace("_orig_mod.", ""): tensor for name, tensor in results.items()}
    assert_equal(results, run(copy.deepcopy(model), batch), run(copy.deepcopy(model).double(), doubled(batch)))


@pytest.mark.parametrize("kind", [ROBERTA.kind("single-label")], ids=str)
def test_exported(kind):
    model = make(kind, num_hidden_layers=1)
    program = exported(fastbert.patch(copy.deepcopy(model)), make_batch(kind, labels=False))
    assert_serves(program, model, make_batch(kind, labels=False, length=13))


@pytest.mark.parametrize("kind", [ROBERTA.kind("mlm"), DISCRIMINATOR, ERNIE.kind("multiple-choice")], ids=str)
def test_verify(kind):
    result = fastbert.verify(make(kind), make_batch(kind))
    assert result.ok, str(result)


def test_verify_finds_a_head_that_differs(monkeypatch):
    monkeypatch.setattr("fastbert.layers.prediction_head.kernel_activation", lambda function: "relu")
    result = fastbert.verify(make(ROBERTA.kind("mlm")), make_batch(ROBERTA.kind("mlm")))
    assert not result.ok and "lm_head" in str(result)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kind", [ROBERTA.kind("single-label"), DISCRIMINATOR, ROBERTA.kind("clm")], ids=str)
def test_trainer(kind, tmp_path):
    stock, patched = make(kind), fastbert.patch(make(kind))
    _, losses = train(stock, tmp_path / "stock", kind)
    _, ours = train(patched, tmp_path / "patched", kind)
    torch.testing.assert_close(ours, losses, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("family", LIKE_ROBERTA, ids=str)
def test_attention_by_name(family):
    """Without a patch."""
    kind = family.kind("base")
    model, batch = make(kind), make_batch(kind)
    named = copy.deepcopy(model)
    named.set_attn_implementation("fastbert")
    with counting() as launched:
        results = run(named, batch)
    assert launched == expected_launches(model, without={"embedding_layernorm", "dropout_add_layernorm", "bias_gelu"})
    assert_equal(results, run(copy.deepcopy(model), batch), run(copy.deepcopy(model).double(), doubled(batch)))


@pytest.mark.parametrize("flag", ["output_hidden_states", "output_attentions"])
@pytest.mark.parametrize("family", DISTINCT, ids=str)
def test_hidden_states_and_weights(family, flag):
    kind = family.kind("single-label")
    model, batch = make(kind), make_batch(kind) | {flag: True}
    without = ["attention"] if flag == "output_attentions" else []
    results = check(model, batch, expected=expected_launches(model, without=without))
    assert f"{flag.removeprefix('output_')}[1]" in results
