"""Parameters that are tied, resized or frozen in any pattern; activations, epsilons and widths of a config."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

import fastbert
from fastbert.testing.models import check, counting, expected_launches, launches_of, run
from tests.models.tiny import CLASSIFICATION, KINDS, MLM, VOCABULARY, make, make_batch

PRETRAINING = next(kind for kind in KINDS if kind.name == "pretraining")
# Deliberately not read from the layers: an activation that falls back by mistake must fail here.
FUSED = {
    "gelu",
    "gelu_python",
    "gelu_new",
    "gelu_fast",
    "gelu_accurate",
    "gelu_pytorch_tanh",
    "gelu_python_tanh",
    "relu",
    "silu",
    "swish",
}


@pytest.mark.parametrize("kind", [MLM, PRETRAINING], ids=str)
def test_tied_after_a_resize(kind):
    model = make(kind)
    model.resize_token_embeddings(VOCABULARY + 9, mean_resizing=False)
    decoder, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    assert decoder.weight is embeddings.weight and decoder.out_features == VOCABULARY + 9
    results = check(model, make_batch(kind))
    # One gradient for both uses, under the name of the embedding.
    assert "gradient of bert.embeddings.word_embeddings.weight" in results
    assert "gradient of cls.predictions.decoder.weight" not in results


def test_resized_while_patched():
    model = make()
    model.resize_token_embeddings(VOCABULARY + 9, mean_resizing=False)
    later = fastbert.patch(make())
    later.resize_token_embeddings(VOCABULARY + 9, mean_resizing=False)
    later.load_state_dict(model.state_dict())
    with counting() as launched:
        results = run(later, make_batch())
    assert launched == expected_launches(model)
    stock = run(model, make_batch())
    assert results.keys() == stock.keys()
    torch.testing.assert_close(results["loss"], stock["loss"])
    assert later.get_output_embeddings().weight is later.get_input_embeddings().weight


# The frozen parameters, and how many of the two layers still run a backward.
FROZEN = {
    "embeddings": (lambda name: "embeddings" in name, 2),
    "first layer and embeddings": (lambda name: "embeddings" in name or "layer.0." in name, 1),
    "all LayerNorms": (lambda name: "LayerNorm" in name, 2),
    "LayerNorm weights": (lambda name: "LayerNorm.weight" in name, 2),
    "LayerNorm biases": (lambda name: "LayerNorm.bias" in name, 2),
    "all biases": (lambda name: name.endswith("bias"), 2),
    "all weights": (lambda name: name.endswith("weight"), 2),
    "dense layers": (lambda name: "dense" in name, 2),
    "all but the last bias": (lambda name: name != "classifier.bias", 0),
    "all but the head": (lambda name: name.startswith("bert."), 0),
    "only the head": (lambda name: not name.startswith("bert."), 2),
}


@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen(frozen):
    is_frozen, layers = FROZEN[frozen]
    model = make(CLASSIFICATION)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not is_frozen(name))
    expected = expected_launches(model, backward=False)
    expected += launches_of("bias_gelu", 0, layers) + launches_of("attention", 0, layers)
    expected += launches_of("dropout_add_layernorm", 0, 2 * layers)
    expected += launches_of("embedding_layernorm", 0, any(p.requires_grad for p in model.bert.embeddings.parameters()))
    results = check(model, make_batch(CLASSIFICATION), expected=expected)
    gradients = {name for name in results if name.startswith("gradient")}
    assert gradients == {f"gradient of {name}" for name, _ in model.named_parameters() if not is_frozen(name)}


def fused_launches(model, fused):
    """Expected launches by activation: two of the three kernels contain it, the residual norm does not."""
    return expected_launches(model, without=() if fused else ("bias_gelu", "gelu_layernorm"))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", sorted(set(ACT2FN) | FUSED))
def test_activation_of_the_config(name):
    if name not in ACT2FN:
        pytest.skip("not in this release of transformers")
    try:
        # Its parameter's gradient is one number, which eager in float32 may compute exactly by luck.
        model = make(hidden_act=name, dtype=torch.float64 if name == "prelu" else torch.float32)
        run(model, make_batch())
    except Exception as error:
        pytest.skip(f"stock BERT does not run with it here: {error}")
    check(model, make_batch(), expected=fused_launches(model, name in FUSED))
    if name not in FUSED:
        rows = fastbert.report(fastbert.patch(model)).rows
        stock = [row for row in rows if row.kernel in ("bias_gelu", "gelu_layernorm")]
        assert len(stock) == 3
        assert all(row.state == "untouched" and "activation" in row.reason for row in stock)
        with pytest.raises(fastbert.UnsupportedModelError, match="activation"):
            fastbert.patch(model, strict=True)


@pytest.mark.parametrize(
    ("activation", "fused"),
    [(F.gelu, True), (F.relu, True), (F.silu, True), (torch.tanh, False), (lambda x: x * x, False)],
    ids=["F.gelu", "F.relu", "F.silu", "tanh", "lambda"],
)
def test_activation_that_is_a_function(activation, fused):
    model = make()
    transform = model.cls.predictions.transform
    transform.transform_act_fn = None
    del transform._modules["transform_act_fn"]
    transform.transform_act_fn = activation
    for layer in model.bert.encoder.layer:
        del layer.intermediate._modules["intermediate_act_fn"]
        layer.intermediate.intermediate_act_fn = activation
    check(model, make_batch(), expected=fused_launches(model, fused))


@pytest.mark.parametrize("activation", [nn.GELU(), nn.GELU("tanh"), nn.ReLU(), nn.SiLU()], ids=repr)
def test_activation_that_is_a_module_of_torch(activation):
    model = make()
    model.cls.predictions.transform.transform_act_fn = activation
    for layer in model.bert.encoder.layer:
        layer.intermediate.intermediate_act_fn = activation
    check(model, make_batch())


@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.5])
def test_layer_norm_eps(eps):
    check(make(layer_norm_eps=eps), make_batch())


@pytest.mark.parametrize(("hidden", "heads", "intermediate"), [(1, 1, 1), (2, 1, 7), (37, 1, 111), (64, 4, 128), (120, 3, 30)])
def test_width(hidden, heads, intermediate):
    check(make(hidden_size=hidden, num_attention_heads=heads, intermediate_size=intermediate), make_batch())


@pytest.mark.parametrize("layers", [1, 5])
def test_depth(layers):
    check(make(num_hidden_layers=layers), make_batch())
