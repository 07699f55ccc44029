"""encode on mixed lengths, whatever the batches and options: of a trained model (all-MiniLM-L6-v2), and of a tiny one."""

import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch.nn.utils.rnn import pad_sequence

import fastbert
from fastbert.testing.models import assert_equal
from fastbert.testing.rows import DEVICE
from tests.embedders.tiny import assert_packs, close, features_of, make, row_of

TEXTS = [
    "The ferry left the harbour before sunrise, and nobody on deck said a word.",
    "Boats.",
    "Rye bread wants patience: a sour starter, coarse flour and a cool kitchen.",
    "A boat departed from the port early in the morning.",
]


def test_a_trained_model(trained):
    """Equal embeddings; sorted by length in batches, as encode does, or all in one packed batch of a token budget."""
    stock, model = (SentenceTransformer(trained, device=str(DEVICE)) for _ in range(2))
    exact = SentenceTransformer(trained, device=str(DEVICE)).double()
    fastbert.patch(model)
    results = [{"embeddings": m.encode(TEXTS, convert_to_tensor=True)} for m in (model, stock, exact)]
    assert_equal(*results)
    assert_packs(model)
    near, far = results[0]["embeddings"][0] @ results[0]["embeddings"][[3, 2]].T
    assert near > 0.4 > 0.15 > far, "the two texts about boats are near each other"

    by_length = model.encode(TEXTS, batch_size=2, convert_to_tensor=True)
    features = features_of(model, TEXTS)
    tokens = int(features["attention_mask"].sum())
    with fastbert.lengths(model, token_budget=64 * -(-tokens // 64)), torch.inference_mode():
        packed = model(dict(features))["sentence_embedding"]
    for embeddings in (by_length, packed):
        assert_equal({"embeddings": embeddings}, *results[1:])
    assert not row_of(model).fallback_calls


WORDS = ["w1 w2 w3 w4 w5 w6 w7 w8", "w9", "w10 w11 w12", "w13 w14 w15 w16 w17", "w18 w19"]


@pytest.fixture
def models(folder):
    """Stock and patched."""
    return make(folder), fastbert.patch(make(folder))


OPTIONS = {
    "normalized": {"normalize_embeddings": True},
    "truncated": {"truncate_dim": 8},
    "a prompt": {"prompt": "w20 w21 "},
    "quantized": {"precision": "binary"},
    "as tensors": {"convert_to_tensor": True},
    "one by one": {"batch_size": 1},
    "two by two": {"batch_size": 2},
    "tokens": {"output_value": "token_embeddings"},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options(models, option):
    stock, model = models
    result, expected = (m.encode(WORDS, **OPTIONS[option]) for m in (model, stock))
    assert type(result) is type(expected)
    for ours, theirs in zip(result, expected, strict=True):
        close(torch.as_tensor(ours), torch.as_tensor(theirs))


def test_a_single_text(models):
    result, expected = (m.encode(WORDS[0]) for m in models)
    assert result.shape == expected.shape == (32,)
    close(torch.as_tensor(result), torch.as_tensor(expected))


def test_no_text(models):
    assert [len(m.encode([])) for m in models] == [0, 0]


def test_prompts_that_are_left_out(folder):
    stock, model = make(folder, include_prompt=False), fastbert.patch(make(folder, include_prompt=False))
    texts = ["w1 w2 w3", "w4", "w5 w6"]
    results = [m.encode(texts, prompt="w7 w8 ", convert_to_tensor=True) for m in (stock, model)]
    torch.testing.assert_close(*results)
    assert_packs(model)
    model[1].include_prompt = True
    assert not torch.allclose(model.encode(texts, prompt="w7 w8 ", convert_to_tensor=True), results[0])


def test_a_batch_that_was_made_by_hand(models):
    stock, model = models
    rows = [torch.tensor([2, *range(6, 6 + n), 3]) for n in (3, 9, 1)]
    ids = pad_sequence(rows, batch_first=True)
    features = {"input_ids": ids.to(DEVICE), "attention_mask": (ids != 0).long().to(DEVICE)}
    with torch.no_grad():
        close(*(m(dict(features))["sentence_embedding"] for m in models))
