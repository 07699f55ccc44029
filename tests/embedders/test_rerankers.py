"""CrossEncoder: its head reads the first position, so its encoder packs, and the last layer runs for one row per pair."""

import copy

import pytest
import torch
from sentence_transformers import CrossEncoder
from torch import nn
from transformers import AutoModelForSequenceClassification

import fastbert
from fastbert.testing.models import assert_equal, gradients, rows_in_products
from tests.embedders.tiny import close, row_of, save

PAIRS = [("w1 w2 w3", "w4 w5"), ("w1", "w2"), ("w1 w2", "w3 w4 w5 w6 w7")]
TOKENS = [8, 5, 10]


@pytest.fixture(params=["bert", "xlm-roberta"])
def make(request, tmp_path_factory):
    folder = save(tmp_path_factory.mktemp(request.param), request.param)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).save_pretrained(folder)

    def build():
        model = CrossEncoder(folder, device="cpu")
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model.eval()

    return build


def encoder_row(model):
    (row,) = [row for row in fastbert.report(model).rows if row.hf_class.endswith("Encoder")]
    return row


def test_predict(make):
    stock, model = make(), fastbert.patch(make())
    expected, scores = (m.predict(PAIRS, convert_to_tensor=True) for m in (stock, model))
    close(scores, expected)
    assert (encoder_row(model).kernel_calls, encoder_row(model).fallback_calls) == (1, {})
    ranked = [[entry["corpus_id"] for entry in m.rank("w1", ["w2 w3", "w4", "w5 w6 w7"])] for m in (stock, model)]
    assert ranked[0] == ranked[1]


def test_rows_that_enter_each_product(make):
    model = fastbert.patch(make())
    features = model.preprocess(PAIRS)
    assert features["attention_mask"].sum(1).tolist() == TOKENS
    rows = rows_in_products(lambda: model(features))
    tokens, pairs = sum(TOKENS), len(PAIRS)
    assert rows == [tokens] * 4 + [pairs, tokens] + [pairs] * 5  # in the last layer all but keys and values


def test_training(make):
    def step(model):
        features = model.preprocess(PAIRS)
        loss = nn.functional.binary_cross_entropy_with_logits(
            model(features)["scores"].squeeze(-1), torch.tensor([1.0, 0.0, 1.0], dtype=next(model.parameters()).dtype)
        )
        loss.backward()
        return {"loss": loss.detach()} | gradients(model.named_parameters())

    model = make().train()
    patched = fastbert.patch(copy.deepcopy(model))
    assert_equal(step(patched), step(copy.deepcopy(model)), step(copy.deepcopy(model).double()))
    assert not encoder_row(patched).fallback_calls


def test_saved_and_loaded(make, tmp_path):
    stock, model = make(), fastbert.patch(make())
    model.save_pretrained(str(tmp_path))
    loaded = CrossEncoder(str(tmp_path), device="cpu")
    assert torch.equal(loaded.predict(PAIRS, convert_to_tensor=True), stock.predict(PAIRS, convert_to_tensor=True))
    assert not [row for row in fastbert.report(model).rows if row.hf_class == "Pooling"]
    with pytest.raises(ValueError):
        row_of(model)
