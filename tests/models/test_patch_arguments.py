"""Arguments of patch: switches, strict, wrong types, unknown models, and FASTBERT_DISABLE."""

import logging

import pytest
import torch
from torch import nn
from transformers import MPNetConfig, MPNetForMaskedLM, RobertaPreLayerNormConfig, RobertaPreLayerNormModel

import fastbert
from fastbert.patch import _log_disabled
from fastbert.testing.models import counting, expected_launches, run
from tests.models.test_patch import classes, contents
from tests.models.tiny import CLASSIFICATION, MLM, make, make_batch

SWITCHES = {
    "residual_norm": ["dropout_add_layernorm"],
    "intermediate": ["bias_gelu"],
    "mlm_head": ["gelu_layernorm", "linear_cross_entropy"],
    "attention": ["attention"],
    "embeddings": ["embedding_layernorm"],
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_leaves_its_kernel_out(switch):
    model, kernels = make(), SWITCHES[switch]
    stock = run(model, make_batch())
    expected = expected_launches(model, without=kernels)
    with counting() as launched:
        results = run(fastbert.patch(model, **{switch: False}), make_batch())
    assert launched == expected
    torch.testing.assert_close(results["loss"], stock["loss"])
    for row in fastbert.report(model).rows:
        layer = row.hf_class == "BertLayer" and switch in ("attention", "residual_norm", "intermediate")
        if row.kernel in kernels or layer:
            assert (row.state, row.reason) == ("untouched", f"{switch}=False")
        elif row.kernel:
            assert row.state == "active"


def test_all_switches_off():
    model = make()
    before, types = contents(model), classes(model)
    fastbert.patch(model, **dict.fromkeys(SWITCHES, False))
    assert classes(model) == types and contents(model) == before


def test_patching_again_replaces_the_switches():
    model = fastbert.patch(make())
    fastbert.patch(model, intermediate=False)
    with counting() as launched:
        run(model, make_batch())
    assert launched == expected_launches(make(), without=["bias_gelu"])
    fastbert.patch(model)
    with counting() as launched:
        run(model, make_batch())
    assert launched == expected_launches(make())


@pytest.mark.parametrize("unpad", ["auto", False])
def test_padding_stays_where_it_can_be_seen(unpad):
    """It is visible in the logits of a masked language model."""
    model = fastbert.patch(make(), unpad=unpad)
    assert type(model.bert.encoder) is type(make().bert.encoder)
    assert classes(model) == classes(fastbert.patch(make()))


@pytest.mark.parametrize("patched_before", [False, True])
def test_strict_raises_and_leaves_the_model_as_it_was(patched_before):
    model = make(hidden_act="tanh")
    if patched_before:
        fastbert.patch(model, residual_norm=False)
    before, types, report = contents(model), classes(model), str(fastbert.report(model))
    with pytest.raises(fastbert.UnsupportedModelError) as raised:
        fastbert.patch(model, strict=True)
    for name in (
        "bert.encoder.layer.0.intermediate",
        "bert.encoder.layer.1.intermediate",
        "cls.predictions.transform",
    ):
        assert name in str(raised.value)
    assert "activation" in str(raised.value)
    assert contents(model) == before and classes(model) == types and str(fastbert.report(model)) == report


def test_strict_asks_only_for_what_is_switched_on():
    model = fastbert.patch(make(hidden_act="tanh"), strict=True, intermediate=False, mlm_head=False)
    with counting() as launched:
        run(model, make_batch())
    assert launched == expected_launches(make(), without=["bias_gelu", "gelu_layernorm"])
    fastbert.patch(make(), strict=True)


SIZES = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


def mpnet():
    return MPNetForMaskedLM(MPNetConfig(**SIZES, max_position_embeddings=16))


def prelayernorm():
    return RobertaPreLayerNormModel(RobertaPreLayerNormConfig(**SIZES, max_position_embeddings=16))


@pytest.mark.parametrize(
    ("make_other", "found"),
    [
        (mpnet, "MPNetForMaskedLM (model type 'mpnet')"),
        (prelayernorm, "RobertaPreLayerNormModel (model type 'roberta-prelayernorm')"),
        (lambda: nn.Linear(2, 2), "Linear"),
        (lambda: nn.Sequential(nn.LayerNorm(4)), "Sequential"),
    ],
)
def test_an_unknown_family_is_named(make_other, found):
    model = make_other()
    before, types = contents(model), classes(model)
    for call in (fastbert.patch, lambda model: fastbert.patch(model, strict=True)):
        with pytest.raises(fastbert.UnsupportedModelError) as raised:
            call(model)
        assert f"found {found}," in str(raised.value)
        assert "supported are the models of BERT (BertModel, BertFor...), RoBERTa (RobertaModel" in str(raised.value)
    assert contents(model) == before and classes(model) == types


WRONG = [({name: value}, TypeError, name) for name in (*SWITCHES, "strict") for value in ("yes", None, 1)] + [
    ({"unpad": "never"}, ValueError, "unpad"),
    ({"unpad": None}, ValueError, "unpad"),
    ({"unpad": 1}, ValueError, "unpad"),
    ({"mlm_logits": "some"}, ValueError, "mlm_logits"),
    ({"mlm_logits": None}, ValueError, "mlm_logits"),
    ({"mlm_logits": []}, ValueError, "mlm_logits"),
    ({"attentoin": True}, TypeError, "attentoin"),
]


@pytest.mark.parametrize(("keywords", "error", "name"), WRONG, ids=str)
def test_a_wrong_argument_is_one_clear_error(keywords, error, name):
    model = make(CLASSIFICATION)
    before, types = contents(model), classes(model)
    with pytest.raises(error, match=name):
        fastbert.patch(model, **keywords)
    with pytest.raises(error, match=name), fastbert.patched(model, **keywords):
        pass
    assert contents(model) == before and classes(model) == types


@pytest.mark.parametrize("model", [None, "bert-base-uncased", make().config, make, torch.zeros(2)])
@pytest.mark.parametrize("call", [fastbert.patch, fastbert.unpatch, fastbert.report, fastbert.patched])
def test_what_is_no_model_is_one_clear_error(call, model):
    def use():
        result = call(model)
        if call is fastbert.patched:
            result.__enter__()

    with pytest.raises(TypeError, match=f"model: expected a torch.nn.Module, got {type(model).__name__}"):
        use()


def test_switches_are_keywords_only():
    with pytest.raises(TypeError, match="positional"):
        fastbert.patch(make(), False)


def test_the_environment_can_switch_it_off(monkeypatch, caplog):
    monkeypatch.setenv("FASTBERT_DISABLE", "1")
    _log_disabled.cache_clear()
    model = make()
    types = classes(model)
    with caplog.at_level(logging.WARNING, logger="fastbert"), counting() as launched:
        assert fastbert.patch(model) is model
        fastbert.patch(model, strict=True)
        with fastbert.patched(model):
            run(model, make_batch())
    assert classes(model) == types and not launched
    assert len(caplog.records) == 1 and "FASTBERT_DISABLE" in caplog.text
    with pytest.raises(TypeError):
        fastbert.patch("not a model")


@pytest.mark.parametrize("value", ["0", ""])
def test_the_environment_can_leave_it_on(monkeypatch, value):
    monkeypatch.setenv("FASTBERT_DISABLE", value)
    assert classes(fastbert.patch(make(MLM))) != classes(make(MLM))
