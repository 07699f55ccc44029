"""What keeps a SentenceTransformer padded, each with its reason: stock's numbers, computed by stock's pooling."""

import copy

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, WordWeights
from torch import nn

import fastbert
from fastbert.errors import UnsupportedModelError
from tests.embedders.tiny import TEXTS, WIDTH, assert_packs, assert_padded, check, close, embed, features_of, make, row_of

VISIBLE = "the model's output is visible to other code than the pooling, or its encoder does not pack"


def compare(stock, model, reason):
    """Both give the same embeddings, and `model` stays padded with this reason."""
    for m in (stock, model):
        m.eval()
    expected, result = (embed(m, features_of(m), False)["output"] for m in (stock, model))
    close(result, expected)
    assert_padded(model, reason)


SEEN = ["0.model", "0.model.encoder", "0.model.pooler"]


@pytest.mark.parametrize("name", SEEN)
def test_hooks_between_encoder_and_pooling(folder, name):
    """They see every position, with stock's values."""
    stock, model, seen = make(folder), fastbert.patch(make(folder)), []
    for m in (stock, model):
        m.get_submodule(name).register_forward_hook(
            lambda _, inputs, output: seen.append(inputs[0] if name.endswith("pooler") else output[0])
        )
    compare(stock, model, VISIBLE)
    if name == "0.model":  # sentence-transformers calls its forward, past hooks
        assert not seen
    else:
        close(*seen)


def test_a_hook_on_a_layer(folder):
    stock, model, shapes = make(folder), fastbert.patch(make(folder)), []
    for m in (stock, model):
        m[0].model.encoder.layer[1].register_forward_hook(lambda _, inputs, output: shapes.append(output[0].shape))
    compare(stock, model, "a layer with hooks")
    assert shapes[0] == shapes[1]


def test_global_hooks(folder):
    stock, model = make(folder), fastbert.patch(make(folder))
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        compare(stock, model, VISIBLE)
    finally:
        handle.remove()


def test_a_pooler_of_the_users_own(folder):
    class Pooler(nn.Module):
        def forward(self, hidden_states):
            self.seen = hidden_states.clone()
            return hidden_states[:, 0]

    stock, model = make(folder), fastbert.patch(make(folder))
    for m in (stock, model):
        m[0].model.pooler = Pooler()
    compare(stock, model, VISIBLE)
    close(model[0].model.pooler.seen, stock[0].model.pooler.seen)


def replaced(cls, name):
    """A forward that does the same as that of `cls`, but is not the library's."""
    original = getattr(cls, name)
    return lambda self, *args, **kwargs: original(self, *args, **kwargs)


def test_replaced_forwards_of_transformers(folder, monkeypatch):
    stock, model = make(folder), fastbert.patch(make(folder))
    cls = type(stock[0].model)
    monkeypatch.setattr(cls, "forward", replaced(cls, "forward"))
    compare(stock, model, VISIBLE)


REPLACED = [(0, "forward"), (1, "forward"), (1, "_forward_padded"), (1, "_exclude_prompt_from_mask")]


@pytest.mark.parametrize("place, name", REPLACED)
def test_replaced_code_of_sentence_transformers(folder, monkeypatch, place, name):
    stock, model = make(folder), fastbert.patch(make(folder))
    cls = type(stock[place])
    function = replaced(cls, name)
    monkeypatch.setattr(cls, name, staticmethod(function) if name == "_exclude_prompt_from_mask" else function)
    compare(stock, model, f"{cls.__name__}.{name} was replaced by <lambda>")
    again = fastbert.patch(make(folder))
    assert type(again[place]) is cls
    if place == 1:
        assert row_of(again).state == "untouched" and "was replaced" in row_of(again).reason
        with pytest.raises(UnsupportedModelError, match=f"Pooling.{name} was replaced"):
            fastbert.patch(make(folder), strict=True)


@pytest.mark.parametrize("name", ["_forward_padded", "_exclude_prompt_from_mask"])
def test_replaced_steps_of_one_pooling(folder, name):
    stock, model = make(folder), fastbert.patch(make(folder))
    for m in (stock, model):
        setattr(m[1], name, getattr(m[1], name))
    compare(stock, model, "a Pooling that was changed")


def test_a_replaced_forward_of_one_pooling(folder):
    stock, model = make(folder), fastbert.patch(make(folder))
    for m in (stock, model):
        m[1].forward = lambda features: features | {"sentence_embedding": features["token_embeddings"].amax(1)}
    expected, result = (embed(m, features_of(m), False)["output"] for m in (stock, model))
    close(result, expected)
    assert row_of(model, "BertEncoder").kernel_calls == 0


def test_a_release_that_is_not_known(folder, monkeypatch):
    from fastbert import forwards
    from fastbert.integrations import sentence_transformers as integration

    monkeypatch.setitem(forwards.table("sentence_transformers"), "Pooling.forward", {"0": "6.2.0"})
    monkeypatch.setattr(forwards, "_judged", {})
    pairs = integration.CODE["Pooling"].pairs
    monkeypatch.setitem(integration.CODE, "Pooling", forwards.Code(*pairs))
    reason = integration.CODE["Pooling"].untested()
    assert "Pooling.forward is not one that fastbert was tested against (sentence-transformers " in reason
    model = fastbert.patch(make(folder))
    embed(model, features_of(model), False)
    assert_padded(model, reason)


CONFIGS = {
    "hidden states": ({"output_hidden_states": True}, "hidden states were requested"),
    "attentions": ({"output_attentions": True}, "hidden states or attention weights were requested"),
    "chunks": ({"chunk_size_feed_forward": 4}, "a chunked feed-forward"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(folder, case):
    settings, reason = CONFIGS[case]
    stock, model = make(folder), fastbert.patch(make(folder))
    for m in (stock, model):
        if "output_attentions" in settings:
            m[0].model.set_attn_implementation("eager")
        for name, value in settings.items():
            setattr(m[0].model.config, name, value)
        for layer in m[0].model.encoder.layer:
            layer.chunk_size_feed_forward = settings.get("chunk_size_feed_forward", 0)
    compare(stock, model, reason)


def test_all_layers_are_stocks(folder):
    stock, model = make(folder), fastbert.patch(make(folder))
    for m in (stock, model):
        m[0].model.config.output_hidden_states = True
    expected, result = (m(features_of(m))["all_layer_embeddings"] for m in (stock, model))
    for ours, theirs in zip(result, expected, strict=True):
        close(ours, theirs)


FEATURES = {
    "a mask of weights": (lambda f: f | {"attention_mask": f["attention_mask"].float()}, "an attention mask of weights"),
    "token_weights_sum": (lambda f: f | {"token_weights_sum": torch.full((3,), 2.5)}, "token_weights_sum among the features"),
    "cls_token_embeddings": (
        lambda f: f | {"cls_token_embeddings": torch.ones(3, WIDTH)},
        "cls_token_embeddings among the features",
    ),
    "no mask": (lambda f: {k: v for k, v in f.items() if k != "attention_mask"}, "features without input_ids and an attention"),
    "position ids": (lambda f: f | {"position_ids": torch.arange(8).expand(3, 8)}, None),
    "hidden states": (lambda f: f | {"output_hidden_states": True}, "output_hidden_states among the features"),
    "of the user": (lambda f: f | {"reading": 1}, "reading among the features"),
    "an unknown one": (lambda f: f | {"colour": "green"}, None),
}


@pytest.mark.parametrize("case", FEATURES)
def test_features(folder, case):
    change, reason = FEATURES[case]
    model = make(folder, ("mean", "cls"))
    patched = check(model, change(features_of(model)), backward=False)
    row = row_of(patched)
    assert (
        (row.kernel_calls == 1) if reason is None and not row.fallback_calls else list(row.fallback_calls)[0].startswith(reason)
    )


def test_the_same_features_twice(folder):
    """A dictionary of features holds the outputs of the call before."""
    model = fastbert.patch(make(folder))
    features = features_of(model)
    first = model(features)["sentence_embedding"]
    assert torch.equal(model(features)["sentence_embedding"], first)
    assert_packs(model, calls=2)


class MyPooling(Pooling):
    """A subclass may read anything."""


CHAINS = {
    "a subclass": lambda model: [model[0], MyPooling(WIDTH, "max")],
    "a module in between": lambda model: [model[0], WordWeights([str(i) for i in range(70)], {"7": 2.0}), model[1]],
    "none": lambda model: [model[0], Dense(WIDTH, 4)],
}


@pytest.mark.parametrize("case", ["a subclass", "a module in between"])
def test_other_modules_behind_the_transformer(folder, case):
    stock, model = (SentenceTransformer(modules=CHAINS[case](make(folder)), device="cpu").eval() for _ in range(2))
    fastbert.patch(model)
    features = features_of(stock)
    if case == "a module in between":
        features["token_weights_sum"] = torch.ones(3)
    expected, result = (embed(m, features, False)["output"] for m in (stock, model))
    close(result, expected)
    assert row_of(model, "BertEncoder").kernel_calls == 0
    if case == "a module in between":
        row = row_of(model)
        assert (row.state, row.reason) == ("untouched", "no Transformer comes straight before it")


def test_a_pooling_put_in_later(folder):
    stock, model = make(folder, "max"), fastbert.patch(make(folder, "cls"))
    model[1] = Pooling(WIDTH, "max")
    for reason in (None, "token embeddings were read"):
        expected, result = (embed(m, features_of(m), False)["output"] for m in (stock, model))
        close(result, expected)
        assert vars(model[0])["_fastbert_pooling"].padded == "token embeddings were read", reason


@pytest.mark.parametrize("change", ["mode", "mask", "prompt"])
def test_what_changes_between_encoder_and_pooling(folder, change):
    stock, model = make(folder, "cls"), fastbert.patch(make(folder, "cls"))

    def changed(m):
        features = m[0](features_of(m))
        if change == "mode":
            m[1].pooling_mode = "mean"
        elif change == "mask":
            features["attention_mask"] = features["attention_mask"].clone()
            features["attention_mask"][:, 0] = 0
        else:
            m[1].include_prompt = False
            features["prompt_length"] = 2
        return m[1](features)["sentence_embedding"]

    close(changed(model), changed(stock))
    assert list(row_of(model).fallback_calls) == ["features or a Pooling that changed after the encoder ran"]


def test_switched_off(folder):
    model = fastbert.patch(make(folder), unpad=False)
    embed(model, features_of(model), False)
    assert (row_of(model).state, row_of(model).reason) == ("untouched", "unpad=False")
    assert row_of(model, "BertEncoder").reason == "unpad=False"


def test_two_poolings_behind_one_transformer(folder):
    from sentence_transformers.base.modules import Router

    def build():
        model = make(folder)
        routes = {"query": [model[0], Pooling(WIDTH, "cls")], "document": [model[0], model[1]]}
        return SentenceTransformer(modules=[Router(routes, default_route="document")], device="cpu").eval()

    stock, model = build(), fastbert.patch(build())
    for task in ("query", "document"):
        torch.testing.assert_close(*(m.encode(TEXTS, task=task, convert_to_tensor=True) for m in (model, stock)))
    assert copy.copy(row_of(model, "BertEncoder").kernel_calls) == 0
